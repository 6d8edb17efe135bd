"""Which saved array becomes which array of a target, and through what conversion."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from octavo.pallas_kernels import Storage

from ..convert import mesh_of, reshaped
from ..stepping.norms import HISTORY
from ..storage.memory import put
from ..storage.state import State, scale_name
from ..storage.table import table_of
from .description import CheckpointError, flat, form
from .files import Saved
from .moves import Conversion, Move, fresh, loaded_as, shown, typed
from .remainders import Remainders
from .sources import (
    Source,
    below,
    join,
    octavo_sources,
    optax_sources,
    unquantized,
)
from .target import Target


class Match:
    """The moves that fill a target."""

    def __init__(
        self,
        saved: Saved,
        target: Target,
        *,
        partial: bool,
        convert: bool,
        verify: bool,
    ) -> None:
        self._saved, self._target = saved, target
        self._partial, self._convert = partial, convert
        self._arrays = saved.arrays
        looks = target.states or convert  # else a damaged state must not matter
        self._octavo = octavo_sources(saved, verify) if looks else []
        self._remainders = Remainders(
            saved.folder, self._arrays, self._octavo, target, convert
        )
        self._used: set[str] = set()
        self._moves: dict[tuple[str, ...], Move] = {}
        inside = {p for p in target.taken for s in target.states if below(p, s)}
        leaves = flat(target.tree)
        # Whether rows are in groups is no difference.
        self._grouped = {
            join(path, leaf): tuple(np.shape(x))
            for path, state in target.states.items()
            for leaf, x in flat(state.trees).items()
        }
        for path in sorted(target.taken - inside):
            self._move_leaf(path, leaves[path])
        self._check_unused([path.partition("/")[0] for path in target.states])
        for path, state in target.states.items():
            self._move_state(path, state)
        self._check_unused([])
        self._remainders.warn_of_losses()

    def reads(self) -> dict[str, NamedSharding | None]:
        """The saved arrays that are needed, and where to load each."""
        found: dict[str, NamedSharding | None] = {}
        for goals, move in self._moves.items():
            for k, path in enumerate(move.reads):
                goal = goals[min(k, len(goals) - 1)]
                sharding, rank = self._target.shardings.get(goal), self._rank(goal)
                shape = tuple(self._arrays[path].shape)
                found[path] = loaded_as(sharding, shape, rank)
        return found

    def fill(self, arrays: Mapping[str, jax.Array]) -> dict[str, Any]:
        """The target's arrays, by their paths."""
        values = {}
        for goals, move in self._moves.items():
            read = [arrays[path] for path in move.reads]
            with mesh_of(*read[:1]):
                made = move.make(*read)
            for goal, x in zip(goals, made, strict=True):
                if x is not None:
                    where = self._target.shardings.get(goal)
                    if goal in self._grouped:
                        x = reshaped(x, self._grouped[goal])
                    values[goal] = x if where is None else put(x, where)
        return values

    def _rank(self, goal: str) -> int | None:
        """Of an array of the target that belongs to a parameter's state; else None."""
        shape = self._grouped.get(goal)
        return None if shape is None else len(shape)

    # ------------------------------------------------------------ leaves as they are

    def _move_leaf(self, goal: str, leaf: Any) -> None:
        path = unquantized(goal, self._arrays) if self._convert else goal
        if path not in self._arrays:
            if not self._partial:
                raise self._misfit(
                    path, "is not in the checkpoint", "partial=True keeps the target's"
                )
            return
        got, (shape, want) = self._arrays[path], form(leaf)
        self._check_shape(path, shape, tuple(got.shape))
        whole = self._remainders.masters(path, want)
        if whole is not None:
            self._take((goal,), *whole)
            return
        # Whether a step is a number of Python or an array differs between trainers.
        counts = shape == () and {np.dtype(got.dtype).kind, want.kind} == {"i"}
        if got.dtype != want and not (counts or self._convert):
            raise self._misfit(
                path,
                f"has type {got.dtype}, but the target's is {want}",
                "convert=True converts",
            )
        self._take((goal,), (path,), lambda x: (typed(x, leaf),))

    def _check_shape(
        self, path: str, shape: tuple[int, ...], got: tuple[int, ...]
    ) -> None:
        if got != shape:
            raise self._misfit(
                path,
                f"has shape {got}, but the target's is {shape}",
                "restore into a model of the same sizes, or give what is new another "
                "name and pass partial=True",
            )

    def _take(
        self, goals: tuple[str, ...], reads: tuple[str, ...], make: Callable[..., Any]
    ) -> None:
        self._used.update(reads)
        self._moves[goals] = Move(reads, make)

    def _misfit(self, path: str, what: str, remedy: str) -> CheckpointError:
        return CheckpointError(f"{self._saved.folder}: {path!r} {what}; {remedy}")

    def _check_unused(self, later: list[str]) -> None:
        """Every saved array has a place, but for those below some roots."""
        fields = {path.partition("/")[0] for path in self._target.taken}
        for path in sorted(set(self._arrays) - self._used):
            if any(below(path, root) for root in later):
                continue
            if path.partition("/")[0] in fields and not self._partial:
                raise self._misfit(
                    path, "is not in the target", "partial=True leaves it out"
                )

    # ------------------------------------------------------------ optimizers' states

    def _move_state(self, path: str, state: State) -> None:
        source = self._source(path, state)
        if source is None:
            return
        how = self._target.records[path]
        self._used.update(self._belonging(source, path, how))
        self._move_simple(join(path, "count"), state.count, source.count)
        for k, slot in enumerate(state.slots):
            codes, scales = state.codes(slot), state.scales(slot)
            for i, leaf in enumerate(codes.paths):
                goals = (join(path, slot, leaf),)
                if scales is not None:
                    goals = (*goals, join(path, scale_name(slot), leaf))
                like = codes.leaves[i], None if scales is None else scales.leaves[i]
                self._move_moment(source, goals, how[leaf], k, slot, leaf, like)
        for goals, move in self._remainders.of_state(path, state, how):
            for goal in goals:  # the parameter, too, if it is made of both
                self._moves.pop((goal,), None)
            self._take(goals, *move)
        for extra, leaf in flat(state.extra).items():
            goal, where = (join(x, "extra", extra) for x in (path, source.root))
            if extra.partition("/")[0] == "format":
                table = table_of(list(how.values()), len(state.slots))
                self._moves[(goal,)] = Move((), lambda t=table: (t,))
            elif extra == "clip_history" and (self._partial or self._convert):
                self._move_history(goal, where, source, how)
            else:
                self._move_simple(goal, leaf, where)

    def _belonging(
        self, source: Source, path: str, how: Mapping[str, Storage]
    ) -> list[str]:
        """What of the checkpoint has found its place once a state is restored."""
        if source.records is None:
            # Of optax, counters of schedules and the like are left over.
            root = path.partition("/")[0]
            return [p for p in self._arrays if below(p, root)]
        gone = {
            codes
            for leaf in source.records.keys() - how.keys()
            for slot in source.slots
            for codes in (source.codes(slot, leaf), source.scales(slot, leaf))
        }
        return [p for p in self._arrays if below(p, source.root) and p not in gone]

    def _move_history(
        self, goal: str, path: str, source: Source, how: Mapping[str, Storage]
    ) -> None:
        """Norms of past gradients, one row for each leaf; infinite: not known."""
        if path not in self._arrays:
            shape = (len(how), HISTORY)
            self._moves[(goal,)] = Move((), lambda: (jnp.full(shape, jnp.inf),))
            return
        rows = {leaf: k for k, leaf in enumerate(source.records or ())}
        of = np.array([rows.get(leaf, -1) for leaf in how])

        def make(x: jax.Array) -> tuple[jax.Array]:
            return (jnp.where(of[:, None] < 0, jnp.float32(jnp.inf), x[of]),)

        self._take((goal,), (path,), make)

    def _move_simple(self, goal: str, leaf: Any, path: str | None) -> None:
        """A counter or a history: as saved, or fresh where it does not fit."""
        if path in self._arrays and tuple(self._arrays[path].shape) == np.shape(leaf):
            self._take((goal,), (path,), lambda x: (x,))
        elif self._partial or self._convert:
            fresh = jnp.zeros(np.shape(leaf), jnp.result_type(leaf))
            self._moves[(goal,)] = Move((), lambda: (fresh,))
        else:
            raise self._misfit(
                goal,
                "does not fit: the optimizer has other options than the one saved",
                "use the same, or convert=True, which starts it anew",
            )

    def _move_moment(
        self,
        source: Source,
        goals: tuple[str, ...],
        how: Storage,
        k: int,
        slot: str,
        leaf: str,
        like: tuple[Any, Any],
    ) -> None:
        """One moment of one leaf, with its scales."""
        codes = like[0]
        path = source.codes(slot, leaf)
        if path not in self._arrays:
            if not self._partial:
                raise self._misfit(
                    path, "is not in the checkpoint", "partial=True starts it anew"
                )
            self._moves[goals] = Move((), lambda: fresh(how, k, like))
            return
        was = source.record(leaf, how, self._arrays[path].dtype)
        whole = how.slots[k].shape or how.shape
        if source.records is None:
            self._check_shape(path, whole, tuple(self._arrays[path].shape))
        else:
            self._check_shape(path, whole, was.slots[k].shape or was.shape)
        scale_path = source.scales(slot, leaf)
        reads = (path,) if scale_path not in self._arrays else (path, scale_path)
        dense = not was.formats[k].quantized
        of_optax = source.records is None
        same = (
            (how.slots[k].in_optax == "same" or not of_optax)
            and was.formats[k] == how.formats[k]
            and (dense or was.blocks == how.blocks)
            and self._arrays[path].dtype == codes.dtype
        )
        if same and len(reads) == len(goals) and was.blocks == how.blocks:
            self._take(goals, reads, lambda *x: x)
            return
        if same and dense:  # its scales, if any, are not used
            self._take(goals, (path,), lambda x: (x, *fresh(how, k, like)[1:]))
            return
        if not self._convert:
            raise self._misfit(
                path,
                f"is stored as {shown(was, k, self._arrays[path])}, but the optimizer "
                f"stores {shown(how, k, codes)}",
                "make the optimizer with the same options, or pass convert=True",
            )

        known = (r.slots[k].reference for r in (was, how))
        other = next((j for j in known if j is not None), None)
        convert = Conversion(was, how, k, like, of_optax, len(reads) > 1, other)
        if other is not None:
            name = source.slots[other]
            others = (source.codes(name, leaf), source.scales(name, leaf))
            reads += tuple(p for p in others if p in self._arrays)
        self._take(goals, reads, convert)

    def _source(self, path: str, state: State) -> Source | None:
        """Where the checkpoint has the moments of a state."""
        found = self._octavo
        slots = state.slots
        fitting = [s for s in found if s.slots == slots]
        exact = [s for s in found if s.root == path]
        if exact and exact[0].slots != slots:
            raise self._misfit(
                path,
                f"was saved by an optimizer with {', '.join(exact[0].slots)}, but this "
                f"one has {', '.join(slots)}",
                "use that optimizer, or only=['params'] and a fresh state",
            )
        if exact:
            return exact[0]
        other = fitting
        if slots and not fitting:
            leaves = state.codes(slots[0]).paths
            other = optax_sources(self._arrays, slots, leaves, found)
        if self._convert and len(other) == 1:
            return other[0]
        if self._partial and not other:
            return None
        has = " and ".join(repr(source.root) for source in other)
        what = f"has no moments {', '.join(slots)}"
        what += f", but {has} has" if has else ""
        remedy = {
            0: "only=['params'] and a fresh state do without",
            1: "convert=True takes them",
        }
        raise self._misfit(
            path, what, remedy.get(len(other), "restore into the tree that was saved")
        )
