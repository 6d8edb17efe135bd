"""`check_sharding` foresees what runs each leaf, and what it advises fits."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from octavo import optim

from meshes import layer_axes, mesh_of

# path -> shape, type and spec; and for TPU and GPU: what runs it, and why not a kernel.
ROWS: dict[str, tuple[tuple[int, ...], str, P, dict[str, tuple[str, str]]]] = {
    "kernel": (
        (4096, 1024),
        "float32",
        P("d", "m"),
        {"tpu": ("tpu", ""), "gpu": ("triton", "")},
    ),
    "bf16": (
        (4096, 1024),
        "bfloat16",
        P(("d", "m")),
        {"tpu": ("tpu", ""), "gpu": ("triton", "")},
    ),
    "layers/kernel": (
        (8, 128, 128),
        "float32",
        P("d", None, "m"),
        {"tpu": ("tpu", ""), "gpu": ("triton", "")},
    ),
    "vector": (
        (8192,),
        "float32",
        P("d"),
        {"tpu": ("xla", "rank 2 or more"), "gpu": ("triton", "")},
    ),
    "bias": (
        (64,),
        "float32",
        P("m"),
        {"tpu": ("xla", "not quantized"), "gpu": ("xla", "not quantized")},
    ),
    "count": (
        (8,),
        "int32",
        P(),
        {"tpu": ("none", "left alone"), "gpu": ("none", "left alone")},
    ),
    "odd": (
        (72, 64),
        "float32",
        P("d"),
        {"tpu": ("xla", "block_axis=1 fits"), "gpu": ("xla", "block_axis=1 fits")},
    ),
}


@pytest.mark.parametrize("platform", ["tpu", "gpu", "cpu", None])
def test_check_sharding_says_what_runs_each_leaf(platform: str | None) -> None:
    mesh = mesh_of("4x2", "auto")
    shapes = {
        path: jax.ShapeDtypeStruct(shape, dtype)
        for path, (shape, dtype, *_) in ROWS.items()
    }
    shardings = {
        path: NamedSharding(mesh, spec) for path, (_, _, spec, _) in ROWS.items()
    }
    tx = optim.lamb(0.1, layer_axes=layer_axes)
    report = optim.check_sharding(tx, shapes, shardings, platform)
    assert {row.path for row in report.rows} == set(ROWS)
    for row in report.rows:
        shape, _, spec, expected = ROWS[row.path]
        assert (row.shape, row.spec) == (shape, spec)
        assert row.aligned == (row.path != "odd")
        if platform in ("tpu", "gpu"):
            backend, why = expected[platform]
            assert row.backend == backend
            assert why in row.why and bool(why) == bool(row.why)
        else:
            assert row.backend == ("none" if row.path == "count" else "xla")
            if row.path == "kernel":
                assert row.why == "no kernel for cpu"
        assert row.path in str(report) and str(row.shape) in str(report)


# shape, spec, options: shards of 18, 25 (of all devices), 1016, 2032 and 1016 rows.
STRADDLING: list[tuple[tuple[int, ...], P, dict[str, Any]]] = [
    ((72, 64), P("d"), {}),
    ((3, 72, 64), P(None, "d", "m"), {"layer_axes": 0}),
    ((200, 32), P(("d", "m")), {}),
    ((4064, 1024), P("d"), {}),
    ((4064, 1024), P("d", "m"), {"block_size": 128}),
    ((4064, 1088), P("d", "m"), {"block_size": 128}),
    ((64, 4064), P("m", "d"), {"block_axis": 1}),
    ((5000,), P("d"), {}),
    ((48, 90), P("d", "m"), {"block_axis": 1}),
]


@pytest.mark.parametrize(("shape", "spec", "options"), STRADDLING, ids=str)
def test_advice_for_straddling_blocks_fits(
    shape: tuple[int, ...], spec: P, options: dict[str, Any]
) -> None:
    p = jax.ShapeDtypeStruct(shape, jnp.float32)
    sharding = NamedSharding(mesh_of("4x2", "auto"), spec)

    def row(**more: Any) -> optim.ShardingRow:
        tx = optim.lamb(0.1, **{**options, **more})
        return optim.check_sharding(tx, p, sharding, "tpu").rows[0]

    before = row()
    assert not before.aligned and before.backend == "xla"
    (advice,) = re.findall(r"; (.*) fits?$", before.why)
    for alternative in advice.split(" or "):
        settings = dict(re.findall(r"(\w+)='?(\w+)", alternative))
        if alternative == "another sharding,":
            continue
        after = row(**{k: int(v) if v.isdigit() else v for k, v in settings.items()})
        assert after.aligned, (alternative, after.why)
        assert after.backend == ("xla" if "state" in settings else "tpu")
