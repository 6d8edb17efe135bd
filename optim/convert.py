"""Moments of a state in 32 bits, and states from them."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding

from octavo.pallas_kernels import InOptax, Storage

from .sharding.geometry import of_parameter
from .storage.memory import DEVICE, on_device, put
from .storage.muon import MuonState, apart, merged
from .storage.state import State, scale_name
from .storage.table import records_of
from .storage.tree import Leaves


def dequantize(state: State | MuonState) -> dict[str, Any]:
    """The moments that a state stands for.

    Args:
      state: of an Octavo optimizer, not traced.

    Returns:
      Slot name (`mu`, `nu`, ...) to a tree like the parameters, float32. Of `muon`,
      `mu` is that of all leaves, and `nu` has `optax.MaskedNode` for matrices.

    >>> import jax.numpy as jnp
    >>> from octavo import optim
    >>> tx = optim.adam(0.1)
    >>> params = jnp.ones((64, 128))
    >>> _, state = tx.step(jnp.ones((64, 128)), tx.init(params), params)
    >>> print(f"{optim.dequantize(state)['mu'][0, 0]:.2f}")
    0.10
    """
    if isinstance(state, MuonState):
        muon, adam = map(dequantize, state)
        return adam | {name: merged(tree, adam[name]) for name, tree in muon.items()}
    records = records_of(state)
    trees = [state.codes(slot) for slot in state.slots]
    found: dict[int, list[jax.Array]] = {}
    for k in _in_order(records, len(trees)):
        scales = _scales(state, state.slots[k], trees[k])
        rows = enumerate(zip(trees[k].paths, trees[k].leaves, scales, strict=True))
        found[k] = [
            decoded(records[path], k, c, s, _reference(records[path], k, found, n))
            for n, (path, c, s) in rows
        ]
    return {
        slot: tree.replaced(found[k])
        for k, (slot, tree) in enumerate(zip(state.slots, trees, strict=True))
    }


def _in_order(records: dict[str, Storage], slots: int) -> list[int]:
    """The numbers of all slots, first those that others are relative to."""
    relative = {
        k
        for record in records.values()
        for k, slot in enumerate(record.slots)
        if slot.reference is not None
    }
    return sorted(range(slots), key=lambda k: k in relative)


def _reference(record: Storage, k: int, found: Any, n: int) -> Any:
    """Of the moments found, that of leaf n to which slot k is relative, if any."""
    other = record.slots[k].reference
    return None if other is None else found[other][n]


_S = TypeVar("_S", State, MuonState)


def requantize(state: _S, moments: dict[str, Any], count: Any = None) -> _S:
    """A state that is stored as another one, with other moments.

    Args:
      state: says how leaves are stored, for example a fresh one; not traced.
      moments: slot name to a tree like the parameters, as `dequantize` gives it.
      count: steps taken. Default None: those of `state`.

    Returns:
      The state; moments are rounded to the nearest code.

    Raises:
      ValueError: if slots or trees are others.
    """
    if isinstance(state, MuonState):
        return _requantized(state, moments, count)
    records = records_of(state)
    if set(moments) != set(state.slots):
        raise ValueError(
            f"moments for {sorted(moments)}, but the state has {sorted(state.slots)}"
        )
    given = [Leaves.of(moments[slot]) for slot in state.slots]
    for slot, new in zip(state.slots, given, strict=True):
        if state.codes(slot).paths != new.paths:
            raise ValueError(f"the tree of moments {slot!r} is not that of the state")
    trees, wide = {}, [tree.leaves for tree in given]
    for k, slot in enumerate(state.slots):
        old = state.codes(slot)
        rows = enumerate(zip(old.paths, wide[k], old.leaves, strict=True))
        pairs = [
            encoded(records[path], k, x, c, _reference(records[path], k, wide, n))
            for n, (path, x, c) in rows
        ]
        placed = zip((c for c, _ in pairs), old.leaves, strict=True)
        trees[slot] = old.replaced([_placed(c, like) for c, like in placed])
        before = state.scales(slot)
        if before is not None:
            after = zip((s for _, s in pairs), before.leaves, strict=True)
            trees[scale_name(slot)] = before.replaced(
                [b if s is None else _placed(s, b) for s, b in after]
            )
    taken = state.count if count is None else jnp.asarray(count, jnp.int32)
    return state._replace(count=taken, **trees)


def _requantized(state: MuonState, moments: dict[str, Any], count: Any) -> MuonState:
    """Each part with its moments."""
    if set(moments) != {"mu", "nu"}:
        raise ValueError(
            f"moments for {sorted(moments)}, but the state has ['mu', 'nu']"
        )
    muon, adam = apart(state, moments["mu"])
    return MuonState(
        requantize(state.muon, {"mu": muon}, count),
        requantize(state.adam, moments | {"mu": adam}, count),
    )


def unknown_norms(state: State) -> dict[str, jax.Array]:
    """The history of `percentile_clipping` where it is not known: clip nothing yet."""
    history = state.extra.get("clip_history")
    return {} if history is None else {"clip_history": jnp.full_like(history, jnp.inf)}


# A moment from what optax keeps of it (see `Slot.in_optax`), and the other way round.
FROM_OPTAX: Mapping[InOptax, Callable[[jax.Array], jax.Array]] = {
    "same": lambda x: x,
    "negated": jnp.negative,
    "root": jnp.square,
}
TO_OPTAX = {**FROM_OPTAX, "root": jnp.sqrt}


def decoded(
    record: Storage, slot: int, codes: Any, scales: Any, reference: Any = None
) -> jax.Array:
    """One moment of one leaf, sharded like its codes.

    From that to which it is relative, if any.
    """
    free = freed(codes)
    with mesh_of(free), jax.numpy_dtype_promotion("standard"):  # wherever it is strict
        moment = _decode(record, slot, free, freed(scales), freed(reference))
    if not isinstance(codes, jax.Array):
        return moment
    where = codes.sharding.with_memory_kind(DEVICE)
    if record.folded and isinstance(where, NamedSharding):
        where = of_parameter(where, codes.ndim)
    return jax.device_put(moment, where)


def encoded(
    record: Storage, slot: int, moment: Any, like: Any, reference: Any = None
) -> tuple[jax.Array, jax.Array | None]:
    """Codes and scales of one moment of one leaf, where other codes were.

    From that to which it is relative, if any.
    """
    whole = record.slots[slot].shape or record.shape
    if moment.shape != whole:
        raise ValueError(f"a moment of shape {moment.shape} for one of {whole}")
    free = freed(moment)
    with mesh_of(free):
        codes, scales = _encode(record, slot, free, freed(reference))
    return codes.astype(like.dtype), scales


_decode = jax.jit(Storage.decode, static_argnums=(0, 1))
_encode = jax.jit(Storage.encode, static_argnums=(0, 1))


def automatic(sharding: NamedSharding) -> NamedSharding:
    """The sharding with axes that XLA may partition.

    Conversions reshape, which explicit axes forbid where blocks cross shards.
    """
    mesh: Any = sharding.mesh
    kinds = (AxisType.Auto,) * len(mesh.axis_names)
    return NamedSharding(Mesh(mesh.devices, mesh.axis_names, kinds), sharding.spec)


def freed(x: Any) -> Any:
    """An array on devices, with axes that XLA may partition."""
    x = on_device(x)
    sharding = getattr(x, "sharding", None)
    named = isinstance(sharding, NamedSharding)
    return jax.device_put(x, automatic(sharding)) if named else x


def reshaped(x: Any, shape: tuple[int, ...]) -> jax.Array:
    """An array with its rows in groups, or without; see `Storage.folded`."""
    if x.shape == shape:
        return x
    free = freed(x)
    with mesh_of(free):
        return jnp.reshape(free, shape)


def mesh_of(x: Any = None) -> Any:
    """A context in which JAX computes with an array, whatever mesh is set outside."""
    sharding = getattr(x, "sharding", None)
    named = isinstance(sharding, NamedSharding)
    mesh: Any = sharding.mesh if named else Mesh(np.empty((), object), ())
    return jax.set_mesh(mesh)


def _placed(x: jax.Array, like: Any) -> jax.Array:
    return put(x, like.sharding) if isinstance(like, jax.Array) else x


def _scales(state: State, slot: str, codes: Leaves) -> list[Any]:
    scales = state.scales(slot)
    return [None] * len(codes.leaves) if scales is None else scales.leaves
