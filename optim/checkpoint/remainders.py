"""What becomes of the remainders of parameters, and of parameters without any."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from octavo.pallas_kernels import Storage, Weights, has_16_bits

from ..checks import warn_once
from ..masters import in_parts, whole
from ..storage.state import REMAINDER, State
from .description import CheckpointError, flat
from .moves import Move
from .sources import Source, join
from .target import Target


class _Kept(NamedTuple):
    """Where a checkpoint has the remainder of a parameter."""

    path: str
    weights: Weights


class Remainders:
    """The moves of parameters and remainders that are not copies."""

    def __init__(
        self,
        folder: Any,
        arrays: Mapping[str, Any],
        sources: Sequence[Source],
        target: Target,
        convert: bool,
    ) -> None:
        self._folder, self._arrays, self._convert = folder, arrays, convert
        self._leaves, self._taken = flat(target.tree), target.taken
        self._kept = {
            parameter_of(leaf): _Kept(join(x.root, REMAINDER, leaf), kept)
            for x in sources
            for leaf, record in (x.records or {}).items()
            if (kept := _kept_by(record)) is not None
        }
        self._lost: dict[str, list[str]] = {}

    def masters(self, path: str, want: Any) -> Move | None:
        """A float32 parameter from one of 16 bits and its remainder, if it has one."""
        kept = self._kept.get(path)
        if kept is None or want != jnp.float32 or not self._convert:
            return None
        weights = kept.weights
        return Move((path, kept.path), lambda p, r: (_whole(p, r, weights),))

    def of_state(
        self, path: str, state: State, how: Mapping[str, Storage]
    ) -> Iterator[tuple[tuple[str, ...], Move]]:
        """For the leaves of a state, what is to be made, and how."""
        has_tree = state.remainders is not None
        for leaf, record in how.items():
            goal = join(path, REMAINDER, leaf) if has_tree else None
            yield from self._of_leaf(leaf, record, goal)

    def _of_leaf(
        self, leaf: str, record: Storage, goal: str | None
    ) -> Iterator[tuple[tuple[str, ...], Move]]:
        parameter = parameter_of(leaf)
        kept, wanted = self._kept.get(parameter), _kept_by(record)
        saved = _dtype(self._arrays.get(parameter))
        own = _dtype(self._leaves.get(parameter))
        restored = parameter in self._taken and saved is not None
        if goal is not None and wanted is None:
            yield (goal,), _zeros(record)
        same = kept is not None and kept.weights == wanted
        if same and (saved == own or not restored):
            assert goal is not None and kept is not None
            yield (goal,), Move((kept.path,), lambda x: (x,))
            return
        if wanted is None and (kept is None or own == jnp.float32):
            if restored and has_16_bits(own) and saved == jnp.float32:
                self._note(_NONE, parameter)
            return
        if saved is not None or kept is not None:  # else partial=True starts it anew
            self._check(parameter, kept, wanted)
        if wanted is None:
            self._note(_NONE, parameter)
            return
        assert goal is not None
        if not restored:
            if kept is not None:
                raise CheckpointError(
                    f"{self._folder}: the remainder of {parameter!r} is converted with "
                    "the parameter: restore params, too"
                )
            yield (goal,), _zeros(record)
            return
        finer = saved == jnp.float32 or (kept and kept.weights == "remainder16")
        if wanted == "remainder8" and finer:
            self._note(_LESS, parameter)
        reads = (parameter, kept.path) if kept else (parameter,)
        before = kept.weights if kept else None
        yield (
            (parameter, goal),
            Move(reads, functools.partial(_parts, own, before, wanted)),
        )

    def _check(
        self, parameter: str, kept: _Kept | None, wanted: Weights | None
    ) -> None:
        """Raise CheckpointError unless conversions are allowed."""
        if self._convert:
            return
        has = f"a remainder (weights={kept.weights!r})" if kept else "no remainder"
        keeps = f"weights={wanted!r}" if wanted else "no remainder"
        remedy = "convert=True converts"
        if kept:
            remedy = f"make it with weights={kept.weights!r}, or pass convert=True"
            if wanted is None:
                remedy += ", which drops the remainder: up to half a unit"
        raise CheckpointError(
            f"{self._folder}: {parameter!r} has {has}, but the optimizer has {keeps}; "
            f"{remedy}"
        )

    def _note(self, what: str, parameter: str) -> None:
        self._lost.setdefault(what, []).append(parameter)

    def warn_of_losses(self) -> None:
        """Say what conversions lose."""
        for what, parameters in self._lost.items():
            listed = ", ".join(map(repr, parameters[:3]))
            more = ", ..." if len(parameters) > 3 else ""
            warn_once(
                f"{self._folder}: converting {len(parameters)} parameters ({listed}"
                f"{more}) {what}"
            )


_NONE = (
    "loses up to half a unit of each: they are rounded to 16 bits, and the optimizer "
    "keeps no remainder. With weights='remainder16' nothing is lost"
)
_LESS = (
    "loses up to 1/512 of a unit of each: weights='remainder8' keeps 8 bits more than "
    "the parameters have. With weights='remainder16' nothing is lost"
)


def parameter_of(leaf: str) -> str:
    """The path of a parameter in a checkpoint."""
    return join("params", leaf)


def _kept_by(record: Storage) -> Weights | None:
    return record.weights if record.has_remainder else None


def _dtype(x: Any) -> Any:
    return None if x is None else jnp.dtype(x.dtype)


def _zeros(record: Storage) -> Move:
    """A remainder that starts anew, or an entry where there is none."""
    like = record.remainder
    return Move((), lambda: (jnp.zeros(like.shape, like.dtype),))


_whole = jax.jit(whole, static_argnums=2)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _parts(
    dtype: Any,
    before: Weights | None,
    wanted: Weights,
    p: jax.Array,
    remainder: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """A parameter of a type with its remainder, from one that is stored otherwise."""
    x = p.astype(jnp.float32)
    if before is not None and remainder is not None:
        x = whole(p, remainder.reshape(p.shape), before)
    return in_parts(x, dtype, wanted)
