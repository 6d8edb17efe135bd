"""States from those of optax, and the other way round."""

from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax

from .convert import FROM_OPTAX, TO_OPTAX, dequantize, requantize, unknown_norms
from .storage.muon import MuonState
from .storage.quantized import QuantizedState, inner_path
from .storage.state import State
from .storage.table import records_of
from .storage.tree import path_name

_Ours = TypeVar("_Ours", State, QuantizedState, MuonState)
_S = TypeVar("_S")


def from_optax(state: _Ours, optax_state: Any) -> _Ours:
    """An Octavo state with the moments of an optax one.

    Where optax keeps something else (LARS' momentum with the other sign, Adamax' root)
    they are converted. What optax does not keep, such as the history of
    `percentile_clipping`, starts anew.

    Args:
      state: how to store them: `tx.init(params)` of the same optimizer, or of
        `optim.quantized` around the one of optax.
      optax_state: of the optax optimizer, or of a chain that has one of each moment.

    Raises:
      ValueError: if the optax state has no such moments, or several.

    >>> import jax.numpy as jnp, optax
    >>> from octavo import optim
    >>> params = jnp.ones((64, 128))
    >>> theirs = optax.adam(0.1).init(params)
    >>> ours = optim.from_optax(optim.adam(0.1).init(params), theirs)
    """
    if isinstance(state, QuantizedState):
        return _quantized(state, optax_state)
    if isinstance(state, MuonState):
        parts = _parts(optax_state)
        return MuonState(*(from_optax(s, parts[f]) for f, s in _named(state)))
    try:
        names = _names_in_optax(state.slots)
        moments = {k: optax.tree.get(optax_state, name) for k, name in names.items()}
    except KeyError:
        raise ValueError(
            f"the optax state has several {', '.join(state.slots)}: give the part "
            "that belongs to this optimizer"
        ) from None
    missing = [name for name, tree in moments.items() if tree is None]
    if missing:
        raise ValueError(
            f"the optax state has no {', '.join(missing)}: it belongs to another "
            "optimizer"
        )
    counts = [x for _, x in optax.tree.get_all_with_path(optax_state, "count")]
    moments = _from_optax(state, moments)
    made = requantize(state, moments, counts[0] if counts else None)
    return made._replace(extra=made.extra | unknown_norms(state))


def to_optax(state: State | QuantizedState | MuonState, optax_state: _S) -> _S:
    """An optax state with the moments of an Octavo one, in 32 bits.

    Args:
      state: the Octavo state, or that of `optim.quantized`; not traced.
      optax_state: gives the structure: `init(params)` of the same optimizer in optax.

    >>> import jax.numpy as jnp, optax
    >>> from octavo import optim
    >>> params = jnp.ones((64, 128))
    >>> ours = optim.adam(0.1).init(params)
    >>> theirs = optim.to_optax(ours, optax.adam(0.1).init(params))
    """
    if isinstance(state, QuantizedState):
        return _unquantized(state, optax_state)
    if isinstance(state, MuonState):
        theirs: Any = optax_state
        parts = _parts(theirs)
        made = {name: to_optax(own, parts[name]) for name, own in _named(state)}
        return theirs._replace(inner_states={**parts, **made})
    moments = _to_optax(state, dequantize(state))
    for name in ("count", "count_m2"):  # AdEMAMix has both
        if optax.tree.get_all_with_path(optax_state, name):
            moments[name] = state.count
    return optax.tree.set(optax_state, **moments)


def _named(state: MuonState) -> list[tuple[str, State]]:
    return list(zip(state._fields, state, strict=True))


def _parts(optax_state: Any) -> Any:
    """The parts of the state of `optax.contrib.muon`."""
    parts = getattr(optax_state, "inner_states", None)
    if not isinstance(parts, dict) or set(parts) != set(MuonState._fields):
        raise ValueError(
            f"the optax state is a {type(optax_state).__name__}, not that of "
            "optax.contrib.muon: give its own, such as one element of a chain's"
        )
    return parts


def _names_in_optax(slots: Sequence[str]) -> dict[str, str]:
    """The field of optax for each slot: a variance is made of `nu` and `mu`."""
    return {name: "nu" if name == "variance" else name for name in slots}


def _from_optax(state: State, moments: dict[str, Any]) -> dict[str, Any]:
    """Moments of optax as Octavo has them."""
    if "variance" in moments:
        centered = jax.tree.map(_centered, moments["variance"], moments["mu"])
        moments = moments | {"variance": centered}
    return _each(state, moments, FROM_OPTAX)


def _to_optax(state: State, moments: dict[str, Any]) -> dict[str, Any]:
    """Moments of Octavo as optax has them."""
    moments = _each(state, moments, TO_OPTAX)
    variance = moments.pop("variance", None)
    if variance is None:
        return moments
    nu = jax.tree.map(lambda v, m: v + m * m, variance, moments["mu"])
    return moments | {"nu": nu}


def _centered(nu: jax.Array, mu: jax.Array) -> jax.Array:
    return jnp.maximum(nu - mu * mu, 0.0)


def _each(state: State, moments: dict[str, Any], functions: Any) -> dict[str, Any]:
    records = list(records_of(state).values())
    kinds = {slot.name: slot.in_optax for r in records[:1] for slot in r.slots}
    return {
        name: jax.tree.map(functions[kinds.get(name, "same")], tree)
        for name, tree in moments.items()
    }


def _quantized(state: QuantizedState, optax_state: Any) -> QuantizedState:
    """Of `optim.quantized`: every array has its place in the other state, by its path.

    But for random numbers, steps are counted there.
    """
    flat, _ = jax.tree_util.tree_flatten_with_path(optax_state)
    theirs = {path_name(path): leaf for path, leaf in flat}

    def of(path: str) -> Any:
        if path not in theirs:
            raise ValueError(
                f"the optax state has no {path!r}: it belongs to another optimizer, or "
                "to other parameters"
            )
        return theirs[path]

    made = {}
    for key, part in state.moments.items():
        moments = {}
        for slot in part.slots:
            codes = part.codes(slot)
            leaves = [of(inner_path(key, slot, leaf)) for leaf in codes.paths]
            moments[slot] = codes.replaced(leaves)
        made[key] = requantize(part, _from_optax(part, moments))
    rest = jax.tree_util.tree_map_with_path(
        lambda path, like: _typed(of(path_name(path)), like), state.rest
    )
    return QuantizedState(made, rest)


def _unquantized(state: QuantizedState, optax_state: _S) -> _S:
    """The inverse of `_quantized`."""
    flat, _ = jax.tree_util.tree_flatten_with_path(state.rest)
    ours = {path_name(path): leaf for path, leaf in flat}
    for key, part in state.moments.items():
        for slot, tree in _to_optax(part, dequantize(part)).items():
            leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
            for path, leaf in leaves:
                ours[inner_path(key, slot, path_name(path))] = leaf

    def of(path: Any, like: Any) -> Any:
        if path_name(path) not in ours:
            raise ValueError(
                f"the state has no {path_name(path)!r}: it is not of this optimizer"
            )
        return _typed(ours[path_name(path)], like)

    return jax.tree_util.tree_map_with_path(of, optax_state)


def _typed(x: Any, like: Any) -> Any:
    """A value in the type of another; random keys have their own."""
    dtype = jnp.result_type(like)
    is_key = jnp.issubdtype(dtype, jax.dtypes.prng_key)
    return x if is_key else jnp.asarray(x, dtype)
