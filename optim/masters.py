"""The float32 weights that parameters of 16 bits and their remainders stand for."""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from octavo.pallas_kernels import (
    Stored,
    Weights,
    full,
    has_16_bits,
    keeping,
    noise_bits,
    remainder_dtype,
    split,
)

from .convert import freed, mesh_of, reshaped
from .storage.memory import on_device, put
from .storage.muon import MuonState, apart, merged
from .storage.state import REMAINDER, State, states_in
from .storage.table import records_of
from .storage.tree import Leaves


def masters(state: Any, params: Any) -> Any:
    """The float32 weights that a remainder stands for, for evaluation and export.

        weight = parameter + remainder / 2**bits of the parameter's unit

    With `weights="remainder16"` they are those of training in float32, bit for bit.
    Works inside jax.jit, too.

    Args:
      state: of an Octavo optimizer with `weights="remainder8"` or `"remainder16"`, or
        of a chain that contains one.
      params: the parameters, as the last step returned them.

    Returns:
      A tree like params: float32 where those are bfloat16 or float16, else as it is.

    Raises:
      ValueError: if the state has no remainders, or those of other parameters.

    >>> import jax.numpy as jnp
    >>> from octavo import optim
    >>> tx = optim.adam(1e-3, weights="remainder16")
    >>> params = jnp.ones((64, 128), jnp.bfloat16)
    >>> params, state = tx.step(params, tx.init(params), params)
    >>> weights = optim.masters(state, params)
    >>> print(f"{params[0, 0]:.4f} {weights[0, 0]:.4f}")
    1.0000 0.9990
    """
    remainders = _remainders(state)
    tree = Leaves.of(params)
    unknown = sorted(remainders.keys() - set(tree.paths))
    if unknown:
        raise ValueError(
            f"the state has a remainder of {unknown[0]!r}, which is not among the "
            "parameters: give those that were stepped with it"
        )
    pairs = zip(tree.paths, tree.leaves, strict=True)
    return tree.replaced([_master(p, remainders.get(path)) for path, p in pairs])


_S = TypeVar("_S", State, MuonState)


def from_masters(state: _S, weights: Any) -> tuple[Any, _S]:
    """Parameters of 16 bits and a state from float32 weights; the inverse of `masters`.

    With `weights="remainder16"` it is exact (for float16: down to 2**-40). With
    `"remainder8"` weights are rounded to 1/256 of a unit, to the nearest.

    Args:
      state: `tx.init(params)` of an optimizer with remainders, for parameters of the
        types that are wanted; not traced.
      weights: tree like those parameters, float32.

    Returns:
      The parameters, and the state with their remainders.

    Raises:
      ValueError: if the state has no remainders, or its tree is another one.

    >>> import jax, jax.numpy as jnp
    >>> from octavo import optim
    >>> weights = {"w": jnp.full((64, 128), 0.1)}
    >>> params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), weights)
    >>> state = optim.adam(1e-3, weights="remainder16").init(params)
    >>> params, state = optim.from_masters(state, weights)
    >>> bool(jnp.all(optim.masters(state, params)["w"] == weights["w"]))
    True
    """
    if isinstance(state, MuonState):
        pairs = zip(state, apart(state, weights), strict=True)
        params, states = zip(*(from_masters(*pair) for pair in pairs), strict=True)
        return merged(*params), MuonState(*states)
    tree, old = Leaves.of(weights), state.remainders
    if old is None:
        raise ValueError(_NONE)
    if old.paths != tree.paths:
        raise ValueError("the tree of weights is not that of the state")
    records, params, kept = records_of(state), [], []
    for path, x, remainder in zip(tree.paths, tree.leaves, old.leaves, strict=True):
        record = records[path]
        if not record.has_remainder:
            params.append(x)
            kept.append(remainder)
            continue
        free = freed(jnp.asarray(x))
        with mesh_of(free):
            p, r = _split(free, record.dtype, record.weights)
        params.append(jax.device_put(p, getattr(x, "sharding", None)))
        kept.append(put(reshaped(r, record.remainder.shape), remainder.sharding))
    new: dict[str, Any] = {REMAINDER: old.replaced(kept)}
    return tree.replaced(params), state._replace(**new)


def _remainders(state: Any) -> dict[str, Any]:
    """What is kept of each parameter, by its path."""
    found: dict[str, Any] = {}
    for one in states_in(state):
        tree = one.remainders
        if tree is not None:
            found |= dict(zip(tree.paths, tree.leaves, strict=True))
    if not found:
        raise ValueError(_NONE)
    return found


_NONE = (
    "no remainders in this state: make the optimizer with weights='remainder8' or "
    "'remainder16', and parameters of bfloat16 or float16"
)


def _master(p: Any, remainder: Any) -> Any:
    if not has_16_bits(jnp.result_type(p)):
        return p
    # Where nothing is kept of a leaf, there are zeros of another shape, or of this one.
    if remainder is not None and remainder.ndim > jnp.ndim(p) > 0:
        remainder = on_device(remainder).reshape(jnp.shape(p))
    if remainder is None or remainder.shape != jnp.shape(p):
        return jnp.asarray(p).astype(jnp.float32)
    return whole(p, on_device(remainder), keeping(remainder.dtype.itemsize))


def whole(p: Any, remainder: Any, weights: Weights) -> jax.Array:
    """The float32 weights of one leaf."""
    return full(
        Stored(p.astype(jnp.float32), remainder.astype(jnp.int32)), p.dtype, weights
    )


def in_parts(x: jax.Array, dtype: Any, weights: Weights) -> tuple[jax.Array, jax.Array]:
    """A parameter and its remainder, from float32 weights within its range."""
    largest = float(jnp.finfo(dtype).max)
    half = (1 << noise_bits(weights)) >> 1
    stored = split(jnp.clip(x, -largest, largest), dtype, weights, half)
    assert stored.remainder is not None
    kept = stored.remainder.astype(remainder_dtype(weights))
    return stored.p.astype(dtype), kept


_split = jax.jit(in_parts, static_argnums=(1, 2))
