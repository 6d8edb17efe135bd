"""`explain` foresees what runs each leaf, and what it advises fits."""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from octavo import optim

from meshes import layer_axes, mesh_of


class Row(NamedTuple):
    """A leaf, and for TPU and GPU: what runs it, and why it is no kernel."""

    shape: tuple[int, ...]
    dtype: str
    spec: P
    tpu: tuple[str, str] = ("tpu", "")
    gpu: tuple[str, str] = ("triton", "")


# The last has blocks of 4, and shards of 18 rows.
ROWS: dict[str, Row] = {
    "kernel": Row((4096, 1024), "float32", P("d", "m")),
    "bf16": Row((4096, 1024), "bfloat16", P(("d", "m"))),
    "layers/kernel": Row((8, 128, 128), "float32", P("d", None, "m")),
    "vector": Row((8192,), "float32", P("d"), tpu=("xla", "rank 2 or more")),
    "bias": Row(
        (64,), "float32", P("m"), ("xla", "not quantized"), ("xla", "not quantized")
    ),
    "count": Row((8,), "int32", P(), ("none", "left alone"), ("none", "left alone")),
    "odd": Row(
        (72, 64),
        "float32",
        P("d"),
        ("xla", "block_axis=1 fits"),
        ("xla", "block_axis=1 fits"),
    ),
}
SHAPES = {path: jax.ShapeDtypeStruct(r.shape, r.dtype) for path, r in ROWS.items()}
TX = optim.lamb(0.1, layer_axes=layer_axes)


def expect_rows(
    report: optim.Explanation, platform: str | None, aligned: bool = False
) -> None:
    """What is foreseen; `aligned`: where no sharding is known, for "odd", too."""
    assert [row.path for row in report.rows] == sorted(ROWS)
    for row in report.rows:
        given = ROWS[row.path]
        assert row.shape == given.shape
        assert row.aligned == (aligned or row.path != "odd")
        assert row.path in str(report) and str(row.shape) in str(report)
        quantized = row.path not in ("bias", "count")
        assert bool(re.fullmatch(r"\d+ along axis \d", row.blocks)) == quantized
        if platform in ("tpu", "gpu"):
            backend, why = given.tpu if platform == "tpu" else given.gpu
            if aligned and row.path == "odd":
                backend, why = {"tpu": "tpu", "gpu": "triton"}[platform], ""
            assert row.backend == backend
            assert why in row.why and bool(why) == bool(row.why)
        else:
            assert row.backend == ("none" if row.path == "count" else "xla")
            if row.path == "kernel":
                assert row.why == "no kernel for cpu"


@pytest.mark.parametrize("platform", ["tpu", "gpu", "cpu", None])
def test_explain_says_what_runs_each_leaf_on_a_mesh(platform: str | None) -> None:
    mesh = mesh_of("4x2", "auto")
    shardings = {path: NamedSharding(mesh, row.spec) for path, row in ROWS.items()}
    report = optim.explain(TX, SHAPES, shardings, platform)
    expect_rows(report, platform)
    for row in report.rows:
        assert row.spec == ROWS[row.path].spec


@pytest.mark.parametrize("known", ["argument", "default"])
@pytest.mark.parametrize("platform", ["tpu", "gpu", "cpu", None])
def test_explain_on_one_device(
    platform: str | None, known: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mesh of one device; or none, which is one device where a platform is given."""
    shardings = None
    if known == "argument":
        shardings = NamedSharding(mesh_of("1", "auto"), P())
    elif platform is None:
        monkeypatch.setattr(jax, "device_count", lambda: 1)
    report = optim.explain(TX, SHAPES, shardings, platform)
    expect_rows(report, platform, aligned=True)
    assert all(row.spec == (None if shardings is None else P()) for row in report.rows)


def test_explain_without_shardings_on_several_devices(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As a step: unknown shardings are XLA's, which can partition it."""
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    (row,) = optim.explain(TX, {"kernel": SHAPES["kernel"]}).rows
    assert (row.backend, row.spec, row.aligned) == ("xla", None, True)
    assert "tx = tx.bind(params)" in row.why
    named = optim.lamb(0.1, backend="tpu")
    (row,) = optim.explain(named, {"kernel": SHAPES["kernel"]}).rows
    assert (row.backend, row.why) == ("tpu", "")


def option() -> tuple[optim.Transformation, Any]:
    """The shardings that the optimizer was given."""
    sharding = NamedSharding(mesh_of("4x2", "auto"), P("d", "m"))
    return optim.lamb(0.1, sharding=sharding), SHAPES["kernel"]


def types() -> tuple[optim.Transformation, Any]:
    """Those in the types of arrays, on a mesh of explicit axes."""
    sharding = NamedSharding(mesh_of("4x2", "explicit"), P("d", "m"))
    return optim.lamb(0.1), jax.device_put(jnp.zeros((128, 64)), sharding)


@pytest.mark.parametrize("source", [option, types])
def test_explain_takes_the_shardings_that_a_step_would(
    source: Callable[[], tuple[optim.Transformation, Any]],
) -> None:
    tx, p = source()
    (row,) = optim.explain(tx, p, platform="tpu").rows
    assert (row.spec, row.backend, row.why) == (P("d", "m"), "tpu", "")


def test_explain_of_a_backend_that_refuses() -> None:
    """As a step, with the leaf's path; what is not quantized is no kernel's anyway."""
    tx = optim.lamb(0.1, backend="tpu")
    with pytest.raises(ValueError, match=r"'vector': backend='tpu' .*rank 2 or more"):
        optim.explain(tx, {"vector": SHAPES["vector"]})
    (row,) = optim.explain(tx, {"bias": SHAPES["bias"]}).rows
    assert row.backend == "xla"


# shape, spec, options: shards of 18, 25 (of all devices), 1016, 2032 and 1016 rows.
CROSSING: list[tuple[tuple[int, ...], P, dict[str, Any]]] = [
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


@pytest.mark.parametrize(("shape", "spec", "options"), CROSSING, ids=str)
def test_advice_for_blocks_that_cross_shards_fits(
    shape: tuple[int, ...], spec: P, options: dict[str, Any]
) -> None:
    p = jax.ShapeDtypeStruct(shape, jnp.float32)
    sharding = NamedSharding(mesh_of("4x2", "auto"), spec)

    def row(**more: Any) -> optim.ExplanationRow:
        tx = optim.lamb(0.1, **{**options, **more})
        return optim.explain(tx, p, sharding, "tpu").rows[0]

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
