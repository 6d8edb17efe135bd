"""Moments of a state in 32 bits, and states from them."""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding

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
        placed = zip((c for c, _ in pairs), old.leaves, strict=True)
        codes[slot] = old.replaced([_placed(c, like) for c, like in placed])
        name = scale_name(slot)
        if name in scales:
            before = Leaves.of(scales[name])
            after = zip((s for _, s in pairs), before.leaves, strict=True)
            scales[name] = before.replaced(
                [b if s is None else _placed(s, b) for s, b in after]
            )
    taken = state.count if count is None else jnp.asarray(count, jnp.int32)
    return State(taken, codes, scales, state.extra)


def from_optax(state: State, optax_state: Any) -> State:
    """An Octavo state with the moments of an optax one.

    Where they have another sign (optax's LARS) they are negated. What optax does not
    keep, such as the history of `percentile_clipping`, starts anew.

    Args:
      state: how to store them: `tx.init(params)` of the same optimizer.
      optax_state: of the optax optimizer, or of a chain that has one of each moment.

    Raises:
      ValueError: if the optax state has no such moments, or several.

    >>> import jax.numpy as jnp, optax
    >>> from octavo import optim
    >>> params = jnp.ones((64, 128))
    >>> theirs = optax.adam(0.1).init(params)
    >>> ours = optim.from_optax(optim.adam(0.1).init(params), theirs)
    """
    try:
        moments = {name: optax.tree.get(optax_state, name) for name in state.moments}
    except KeyError:
        raise ValueError(
            f"the optax state has several {', '.join(state.moments)}: give the part "
            "that belongs to this optimizer"
        ) from None
    missing = [name for name, tree in moments.items() if tree is None]
    if missing:
        raise ValueError(
            f"the optax state has no {', '.join(missing)}: it belongs to another "
            "optimizer"
        )
    counts = [x for _, x in optax.tree.get_all_with_path(optax_state, "count")]
    moments = {slot: _signed(slot, tree) for slot, tree in moments.items()}
    made = requantize(state, moments, counts[0] if counts else None)
    return made._replace(extra=made.extra | _unknown_norms(state))


def _unknown_norms(state: State) -> dict[str, jax.Array]:
    """The history of `percentile_clipping` where it is not known: clip nothing yet."""
    history = state.extra.get("clip_history")
    return {} if history is None else {"clip_history": jnp.full_like(history, jnp.inf)}


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
    moments = {slot: _signed(slot, tree) for slot, tree in dequantize(state).items()}
    if optax.tree.get_all_with_path(optax_state, "count"):
        moments["count"] = state.count
    return optax.tree.set(optax_state, **moments)


# optax's LARS multiplies by minus the learning rate on the way into its momentum.
NEGATED = ("trace",)


def _signed(slot: str, moments: Any) -> Any:
    """Moments of optax as Octavo has them, and the other way round."""
    return jax.tree.map(jnp.negative, moments) if slot in NEGATED else moments


def decoded(how: StoredLeaf, slot: int, codes: Any, scales: Any) -> jax.Array:
    """One moment of one leaf, which lies as its codes do."""
    form, blocks = how.formats[slot], how.blocks
    free = freed(codes)
    with mesh_of(free), jax.numpy_dtype_promotion("standard"):  # wherever it is strict
        moment = _decode_leaf(form, blocks, free, freed(scales))
    return _placed(moment, codes)


def encoded(
    how: StoredLeaf, slot: int, moment: Any, like: Any
) -> tuple[jax.Array, jax.Array | None]:
    """Codes and scales of one moment of one leaf, of the type of other codes."""
    if moment.shape != like.shape:
        raise ValueError(f"a moment of shape {moment.shape} for one of {like.shape}")
    free = freed(moment)
    with mesh_of(free):
        dtype = jnp.dtype(like.dtype)
        return _encode_leaf(how.formats[slot], how.blocks, free, dtype)


_decode_leaf = jax.jit(decode_leaf, static_argnums=(0, 1))
_encode_leaf = jax.jit(encode_leaf, static_argnums=(0, 1, 3))


def automatic(sharding: NamedSharding) -> NamedSharding:
    """The sharding with axes that XLA may partition.

    Conversions reshape, which explicit axes forbid where blocks straddle shards.
    """
    mesh: Any = sharding.mesh
    kinds = (AxisType.Auto,) * len(mesh.axis_names)
    return NamedSharding(Mesh(mesh.devices, mesh.axis_names, kinds), sharding.spec)


def freed(x: Any) -> Any:
    """An array with axes that XLA may partition."""
    sharding = getattr(x, "sharding", None)
    named = isinstance(sharding, NamedSharding)
    return jax.device_put(x, automatic(sharding)) if named else x


def mesh_of(x: Any = None) -> Any:
    """A context in which JAX computes with an array, whatever mesh is set outside."""
    sharding = getattr(x, "sharding", None)
    named = isinstance(sharding, NamedSharding)
    mesh: Any = sharding.mesh if named else Mesh(np.empty((), object), ())
    return jax.set_mesh(mesh)


def _placed(x: jax.Array, like: Any) -> jax.Array:
    return jax.device_put(x, like.sharding) if isinstance(like, jax.Array) else x


def _scales(state: State, slot: str, leaves: int) -> list[Any]:
    tree = state.scales.get(scale_name(slot))
    return [None] * leaves if tree is None else Leaves.of(tree).leaves
