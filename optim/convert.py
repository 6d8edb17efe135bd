"""Moments of a state in 32 bits, and states from them."""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax

from octavo.pallas_kernels import decode_leaf, encode_leaf

from .state import State, scale_name
from .stored import StoredLeaf, stored
from .tree import Leaves

_S = TypeVar("_S")


def dequantize(state: State) -> dict[str, Any]:
    """The moments that a state stands for.

    Args:
      state: of an Octavo optimizer, not traced.

    Returns:
      Slot name (`mu`, `nu`, ...) to a tree like the parameters, float32.

    >>> import jax.numpy as jnp
    >>> from octavo import optim
    >>> tx = optim.adam(0.1)
    >>> params = jnp.ones((64, 128))
    >>> _, state = tx.step(jnp.ones((64, 128)), tx.init(params), params)
    >>> print(f"{optim.dequantize(state)['mu'][0, 0]:.4f}")
    0.1001
    """
    how = stored(state)
    moments = {}
    for k, slot in enumerate(state.moments):
        codes = Leaves.of(state.moments[slot])
        scales = _scales(state, slot, len(codes.leaves))
        moments[slot] = codes.replaced(
            [
                decoded(how[path], k, c, s)
                for path, c, s in zip(codes.paths, codes.leaves, scales, strict=True)
            ]
        )
    return moments


def requantize(state: State, moments: dict[str, Any], count: Any = None) -> State:
    """A state that is stored as another one, with other moments.

    Args:
      state: tells how leaves are stored, for example a fresh one; not traced.
      moments: slot name to a tree like the parameters, as `dequantize` gives it.
      count: steps taken. Default None: those of `state`.

    Returns:
      The state; moments are rounded to the nearest code.

    Raises:
      ValueError: if slots or trees are others.
    """
    how = stored(state)
    if set(moments) != set(state.moments):
        raise ValueError(
            f"moments for {sorted(moments)}, but the state has {sorted(state.moments)}"
        )
    codes, scales = {}, dict(state.scales)
    for k, slot in enumerate(state.moments):
        old, new = Leaves.of(state.moments[slot]), Leaves.of(moments[slot])
        if old.paths != new.paths:
            raise ValueError(f"the tree of moments {slot!r} is not that of the state")
        pairs = [
            encoded(how[path], k, x, c)
            for path, x, c in zip(old.paths, new.leaves, old.leaves, strict=True)
        ]
        codes[slot] = old.replaced([c for c, _ in pairs])
        name = scale_name(slot)
        if name in scales:
            before = Leaves.of(scales[name])
            after = zip((s for _, s in pairs), before.leaves, strict=True)
            scales[name] = before.replaced([b if s is None else s for s, b in after])
    taken = state.count if count is None else jnp.asarray(count, jnp.int32)
    return State(taken, codes, scales, state.extra)


def from_optax(state: State, optax_state: Any) -> State:
    """An Octavo state with the moments of an optax one.

    Args:
      state: how to store them: `tx.init(params)` of the same optimizer.
      optax_state: of the optax optimizer, or of a chain that has one of each moment.

    Raises:
      ValueError: if the optax state has no such moments.

    >>> import jax.numpy as jnp, optax
    >>> from octavo import optim
    >>> params = jnp.ones((64, 128))
    >>> theirs = optax.adam(0.1).init(params)
    >>> ours = optim.from_optax(optim.adam(0.1).init(params), theirs)
    """
    moments = {name: optax.tree.get(optax_state, name) for name in state.moments}
    missing = [name for name, tree in moments.items() if tree is None]
    if missing:
        raise ValueError(
            f"the optax state has no {', '.join(missing)}: it belongs to another "
            "optimizer"
        )
    counts = [x for _, x in optax.tree.get_all_with_path(optax_state, "count")]
    return requantize(state, moments, counts[0] if counts else None)


def to_optax(state: State, optax_state: _S) -> _S:
    """An optax state with the moments of an Octavo one, in 32 bits.

    Args:
      state: the Octavo state, not traced.
      optax_state: gives the structure: `init(params)` of the same optimizer in optax.

    >>> import jax.numpy as jnp, optax
    >>> from octavo import optim
    >>> params = jnp.ones((64, 128))
    >>> ours = optim.adam(0.1).init(params)
    >>> theirs = optim.to_optax(ours, optax.adam(0.1).init(params))
    """
    moments = dequantize(state)
    if optax.tree.get_all_with_path(optax_state, "count"):
        moments["count"] = state.count
    return optax.tree.set(optax_state, **moments)


def decoded(how: StoredLeaf, slot: int, codes: Any, scales: Any) -> jax.Array:
    """One moment of one leaf."""
    return decode_leaf(how.formats[slot], how.blocks, codes, scales)


def encoded(
    how: StoredLeaf, slot: int, moment: Any, like: Any
) -> tuple[jax.Array, jax.Array | None]:
    """Codes and scales of one moment of one leaf, of the type of other codes."""
    if moment.shape != like.shape:
        raise ValueError(f"a moment of shape {moment.shape} for one of {like.shape}")
    return encode_leaf(how.formats[slot], how.blocks, moment, like.dtype)


def _scales(state: State, slot: str, leaves: int) -> list[Any]:
    tree = state.scales.get(scale_name(slot))
    return [None] * leaves if tree is None else Leaves.of(tree).leaves
