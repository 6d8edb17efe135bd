"""Checksums of arrays of every type, wherever they lie."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from octavo.optim import checkpoint
from octavo.optim.checkpoint.__main__ import main
from octavo.optim.checkpoint.checksum import checksum, shown

from bits import assert_same_bits
from runs import TX, fresh, saved, step

P = PartitionSpec


def values() -> dict[str, Any]:
    """Leaves of every kind."""
    numbers = np.random.default_rng(0).normal(size=(6, 8))
    types = "int4 int8 uint8 int16 uint16 int32 uint32 bfloat16 float16 float32"
    types += " float8_e4m3fn complex64"
    return {
        **{t: jnp.asarray(9 * numbers, t) for t in types.split()},
        "bool": jnp.asarray(numbers > 0),
        "nan": jnp.array([jnp.nan, -0.0, jnp.inf]),
        "scalar": jnp.float32(2),
        "key": jax.random.key(0),
        "keys": jax.random.split(jax.random.key(1, impl="rbg"), 4),
        "float64 of numpy": numbers,
        "int64 of numpy": (1e12 * numbers).astype(np.int64),
        "complex128 of numpy": numbers + 1j * numbers[::-1],
        "number of numpy": np.float64(1 / 3),
        "int": 2**40 + 1,
        "float": 1 / 3,
        "bool of Python": True,
    }


@pytest.mark.parametrize("checksums", [True, False])
def test_types_of_leaves(checksums: bool, tmp_path: Path) -> None:
    tree = values()
    folder = saved(tmp_path, tree, checksums=checksums)
    restored = checkpoint.restore(folder, None, tree)
    assert_same_bits(restored, tree)
    assert all(type(restored[name]) is type(x) for name, x in tree.items())
    assert main(["inspect", str(folder)]) == 0


def test_64_bits(tmp_path: Path) -> None:
    with jax.enable_x64(True):
        state = fresh(TX, {"w": jnp.full((64, 128), 1 / 3, jnp.float64)})
        state = step(state, state.params)
        w = np.asarray(state.params["w"])
        folder = saved(tmp_path, state)
        assert_same_bits(checkpoint.restore(folder, TX, fresh(TX, state.params)), state)
    target = fresh(TX, {"w": jnp.ones((64, 128))})
    with pytest.raises(checkpoint.CheckpointError, match="'params/w' has type float64"):
        checkpoint.restore(folder, TX, target)
    with pytest.raises(checkpoint.CheckpointError, match=r"32bit \(float64\)"):
        checkpoint.restore(folder, TX, target, only=["opt_state"])
    got = checkpoint.restore(folder, TX, target, convert=True)
    assert_same_bits(got.params["w"], jnp.asarray(w, jnp.float32))


@pytest.mark.parametrize("name", values())
def test_every_bit_counts(name: str) -> None:
    x = values()[name]
    before = shown(checksum(x))
    if hasattr(x, "dtype") and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    raw = np.asarray(x)
    sub = "int4" in str(raw.dtype)
    changed = set()
    for place in {0, raw.size - 1}:
        for bit in range(4 if sub else 1 if raw.dtype == bool else 8 * raw.itemsize):
            flipped = bytearray(raw.tobytes())
            flipped[place * raw.itemsize + bit // 8] ^= 1 << bit % 8
            other = np.frombuffer(bytes(flipped), raw.dtype).reshape(raw.shape)
            changed.add(shown(checksum(jnp.asarray(other) if _fits(raw) else other)))
    assert before not in changed
    turned = raw.reshape(-1)[::-1].reshape(raw.shape)
    assert raw.tobytes() == turned.tobytes() or shown(checksum(turned)) != before


def _fits(x: np.ndarray) -> bool:
    return jax.dtypes.canonicalize_dtype(x.dtype) == x.dtype


def test_checksums_stay_what_old_checkpoints_say() -> None:
    assert shown(checksum(np.arange(6, dtype="float32").reshape(2, 3))) == (
        "0193f9b38075eca8"
    )


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_checksums_do_not_depend_on_the_mesh(kind: AxisType) -> None:
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(kind,) * 2)
    for dtype in ("float32", "int8", "complex64"):
        x = jnp.asarray(np.random.default_rng(0).normal(size=(16, 8)) * 50, dtype)
        sums = {
            shown(checksum(jax.device_put(x, NamedSharding(mesh, spec))))
            for spec in (P(), P("a"), P("b", "a"), P(("a", "b")), P(None, "b"))
        }
        assert sums == {shown(checksum(x))}
