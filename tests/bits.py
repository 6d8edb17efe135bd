"""Equality to the last bit: comparisons of numbers do not tell 0 from -0."""

from typing import Any

import jax
import numpy as np

from octavo import optim


def assert_same_bits(a: Any, b: Any) -> None:
    """Trees of the same structure; leaves of the same types, shapes and bits."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    with_paths, _ = jax.tree_util.tree_flatten_with_path(a)
    for (path, x), y in zip(with_paths, jax.tree.leaves(b), strict=True):
        x, y = bits(x), bits(y)
        assert (x.dtype, x.shape) == (y.dtype, y.shape), jax.tree_util.keystr(path)
        assert x.tobytes() == y.tobytes(), jax.tree_util.keystr(path)


def moments(state: optim.State) -> dict[str, Any]:
    """The moments of a state as they are stored, by slot."""
    return {slot: getattr(state, slot) for slot in state.slots}


def bits(x: Any) -> np.ndarray:
    """A leaf as numpy has it; random keys as their data."""
    if hasattr(x, "dtype") and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    return np.asarray(x)
