"""Blocks are whole in as many shards as are declared, whatever the mesh at hand."""

import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from octavo import optim
from octavo.pallas_kernels import SMALLEST_BLOCK
from octavo.pallas_kernels.layout import blocks_of

from meshes import mesh_of

LEAF = {"w": jax.ShapeDtypeStruct((4096, 1024), jnp.float32)}


def size_of(leaf: str, tree: Any, *args: Any, **options: Any) -> str:
    tx = optim.adamw(1e-3, **options)
    rows = optim.explain(tx, tree, *args, platform="tpu").rows
    return next(row.blocks for row in rows if row.path == leaf)


@given(
    st.integers(1, 2**13),
    st.integers(1, 512),
    st.sampled_from([8, 24, 32, 64, 256]),
)
def test_blocks_are_whole_in_any_number_of_shards(
    length: int, most: int, block_size: int
) -> None:
    """Of those that are powers of two times an odd number, and divide the axis."""
    blocks = blocks_of((length, 2**20), block_size, 0, shards=(most, most))
    assert 1 <= blocks.size <= block_size
    for shards in range(2, most + 1):
        if length % shards == 0 and length % 2 == 0:
            assert length // shards % blocks.size == 0


def test_a_block_is_no_shorter_than_it_needs_to_be() -> None:
    for shards, size in ((1, 32), (128, 32), (129, 32), (255, 32), (256, 16), (512, 8)):
        assert size_of("w", LEAF, min_shards=shards) == f"{size} along axis 0"


def test_a_leaf_of_short_shards_takes_another_axis_or_32_bits() -> None:
    tree = {
        "other": jax.ShapeDtypeStruct((768, 4096), jnp.float32),
        "none": jax.ShapeDtypeStruct((128, 192), jnp.float32),
        "odd": jax.ShapeDtypeStruct((50257, 64), jnp.float32),
    }
    with pytest.warns(UserWarning, match=r"too short for blocks of 4.*'none' of shape"):
        assert size_of("other", tree, min_shards=256) == "16 along axis 1"
    assert size_of("none", tree, min_shards=256) == ""  # not quantized
    assert size_of("odd", tree, min_shards=256) == "32 along axis 0"


def test_it_may_be_given_by_leaf_and_by_mesh_axis() -> None:
    tree = {"a": LEAF["w"], "b": LEAF["w"]}
    by_path = {"min_shards": lambda path: 256 if path == "a" else 1}
    assert size_of("a", tree, **by_path) == "16 along axis 0"
    assert size_of("b", tree, **by_path) == "32 along axis 0"
    mesh = AbstractMesh((4, 2), ("fsdp", "tensor"))
    shardings = {
        "a": NamedSharding(mesh, P(("fsdp", "tensor"))),
        "b": NamedSharding(mesh, P("tensor", "fsdp")),
    }
    by_axis = {"sharding": shardings, "min_shards": {"fsdp": 64, "tensor": 8}}
    assert size_of("a", tree, **by_axis) == "8 along axis 0"
    assert size_of("b", tree, **by_axis) == "32 along axis 0"


@pytest.mark.parametrize("wrong", [0, -1, 2.0, True, "8"])
def test_what_is_no_number_of_shards_is_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match="min_shards"):
        optim.adamw(1e-3, min_shards=wrong)
    with pytest.raises(ValueError, match="min_shards for 'w'"):
        optim.adamw(1e-3, min_shards=lambda path: wrong).init({"w": jnp.ones(3)})


def test_counts_of_mesh_axes_need_shardings() -> None:
    with pytest.raises(ValueError, match=r"min_shards .*if sharding= is given, too"):
        optim.adamw(1e-3, min_shards={"fsdp": 8}).init({"w": jnp.ones(3)})


def test_the_advice_for_blocks_that_cross_shards_names_it() -> None:
    mesh = AbstractMesh((256,), ("fsdp",))
    (row,) = optim.explain(
        optim.adamw(1e-3), LEAF, NamedSharding(mesh, P("fsdp")), "tpu"
    ).rows
    assert not row.aligned and "min_shards=256 or" in row.why
    tx = optim.adamw(1e-3, min_shards=256)
    (row,) = optim.explain(tx, LEAF, NamedSharding(mesh, P("fsdp")), "tpu").rows
    assert row.aligned and row.backend == "tpu"


class Linear(nnx.Module):
    """128 rows over 8 devices: 16 in a shard."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        init = nnx.with_partitioning(nnx.initializers.ones_init(), ("d", None))
        bias = nnx.with_partitioning(nnx.initializers.zeros_init(), ("d",))
        self.dense = nnx.Linear(128, 8192, kernel_init=init, bias_init=bias, rngs=rngs)


def test_scales_take_the_parameters_spec_in_nnx() -> None:
    mesh = mesh_of("8 rows", "auto")
    with jax.set_mesh(mesh):
        model = Linear(nnx.Rngs(0))
        with pytest.raises(ValueError, match=r"'dense/kernel'.*pass min_shards=8"):
            nnx.Optimizer(model, optim.adamw(1e-3), wrt=nnx.Param)
        tx = optim.adamw(1e-3, min_shards=8)
        state = nnx.Optimizer(model, tx, wrt=nnx.Param).opt_state
    scale = state.mu_scale["dense"]["kernel"].get_raw_value()
    assert scale.shape == (8, 8192)
    assert scale.sharding.spec[0] == "d"


def test_scales_take_the_parameters_spec_in_linen() -> None:
    mesh = mesh_of("8 rows", "auto")
    init = nn.with_partitioning(nn.initializers.ones_init(), ("d", None))
    dense = nn.Dense(8192, kernel_init=init)
    for shards in (1, 8):
        tx = optim.adamw(1e-3, min_shards=shards)

        def make(tx: Any = tx) -> Any:
            return tx.init(dense.init(jax.random.key(0), jnp.ones((1, 128)))["params"])

        with jax.set_mesh(mesh), warnings.catch_warnings(record=True) as given:
            warnings.simplefilter("always")
            jax.eval_shape(make)
        told = "'kernel'" in str(given[0].message) if given else False
        assert told == (shards == 1)
        shardings = nn.get_sharding(jax.eval_shape(make), mesh)
        where = shardings.mu_scale["kernel"]
        shape = jax.eval_shape(make).mu_scale["kernel"].value.shape
        divides = shape[0] % 8 == 0
        assert where.spec == P("d", None) and divides == (shards == 8)
    with jax.set_mesh(mesh):
        state = jax.jit(make, out_shardings=shardings)()
    assert state.mu_scale["kernel"].value.sharding.spec[0] == "d"


def test_scales_of_4096_rows_over_256_devices_take_the_parameters_spec() -> None:
    """In nnx and in linen: 16 rows in a shard are one block."""
    program = Path(__file__).with_name("shards_256.py")
    done = subprocess.run(
        [sys.executable, str(program)],
        capture_output=True,
        text=True,
        env=os.environ | {"XLA_FLAGS": ""},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["(256, 256) (1, 256)"] * 2


def test_smallest_blocks_are_those_of_small_leaves() -> None:
    assert blocks_of((64, 64)).size == SMALLEST_BLOCK


def test_numbers_do_not_depend_on_the_mesh() -> None:
    """min_shards alone says what blocks are: with 8 shards, and with none."""
    p = {"w": jax.random.normal(jax.random.key(0), (128, 8192))}
    tx = optim.adamw(1e-2, min_shards=8)
    one, _ = jax.jit(tx.step)(p, tx.init(p), p)
    mesh = mesh_of("8 rows", "auto")
    assert AxisType.Auto in mesh.axis_types
    q = jax.device_put(p, NamedSharding(mesh, P("d")))
    bound = tx.bind(q)
    eight, state = jax.jit(bound.step)(q, bound.init(q), q)
    assert state.mu_scale["w"].sharding.spec[0] == "d"
    unit = jnp.spacing(jnp.abs(p["w"]).max())
    assert jnp.abs(one["w"] - jax.device_get(eight["w"])).max() <= unit
