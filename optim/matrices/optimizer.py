"""A step of matrices in two passes, and of all other leaves beside it.

The first pass advances the momentum and writes the direction of each matrix, which is
then made orthogonal, whole; the second decays, scales and writes the parameter. Leaves
that are no matrices are stepped in the first. Both passes are those of every other
optimizer.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from octavo.pallas_kernels import Storage

from ..options import Settings
from ..sharding.finer import Places
from ..sharding.hosting import Paging, pagings
from ..stepping.begun import Begun
from ..stepping.operands import Operands, Step, operands
from ..stepping.optimizer import Optimizer
from ..stepping.stepper import Stepper
from ..stepping.tasks import Work
from ..storage.muon import MuonState
from ..storage.plan import check_remainders
from ..storage.tree import BOOLS, NUMBERS, PAGED, Leaves, per_leaf, spread
from ..values import is_by_leaf
from .choice import Axes, matrices_in
from .newton_schulz import Direction, Orthogonal
from .options import by_path, function_of, of_mu
from .parts import Parts
from .passes import directions, joined, writing
from .stack import Stack
from .whole import check_memory, whole_matrices


class Arguments(NamedTuple):
    """Which leaves are matrices, as the user says it."""

    dimension_numbers: Any
    mask: Any


@dataclass(frozen=True, eq=False)
class MatrixOptimizer(Stepper):
    """What `init` and steps do, as `Optimizer`'s are called.

    Attributes:
      muon: of the matrices; its settings do not matter.
      adam: of the rest, likewise.
      settings: of both.
      orthogonal: how.
      arguments: which leaves are matrices.
      one_rate: whether both have the same learning rate.
    """

    muon: Optimizer
    adam: Optimizer
    settings: Settings
    orthogonal: Orthogonal
    arguments: Arguments
    one_rate: bool
    _parts: dict[Any, Parts] = field(default_factory=dict, init=False)

    def parts(self, params: Any, tree: Leaves) -> Parts:
        """The optimizers of a tree: what trees say of leaves, functions of paths say.

        So that both may have it.
        """
        forms = tuple((jnp.shape(x), jnp.result_type(x)) for x in tree.leaves)
        key = tree.treedef, tree.names, forms
        if key not in self._parts:
            self._parts[key] = self._made(params, tree)
        return self._parts[key]

    def _made(self, params: Any, tree: Leaves) -> Parts:
        axes = matrices_in(*self.arguments, self.settings.layer_axes, params, tree)
        check_remainders(self.settings, tree)
        settings = by_path(self.settings, tree)
        own = replace(settings, state=of_mu(settings.state, self.adam.rule))
        parts = Parts(axes, self.muon, self.adam)
        masks = [self._masks(parts, k, tree) for k in (0, 1)]
        decay = self.muon.weight_decay
        if tree.leaves and is_by_leaf(decay) and not callable(decay):
            decay = function_of("weight_decay", decay, tree, NUMBERS)
        muon = replace(self.muon, settings=own, masks=masks[0], weight_decay=decay)
        adam = replace(self.adam, settings=settings, masks=masks[1])
        return Parts(axes, replace(muon, whole=False), replace(adam, whole=False))

    def _masks(self, parts: Parts, k: int, tree: Leaves) -> dict[str, Any]:
        """Those of one part, where trees are like all parameters."""
        masks = dict((self.muon, self.adam)[k].masks)
        mask = masks["mask"]
        if tree.leaves and mask is not None and not callable(mask):
            flat = spread("weight_decay_mask", mask, tree, BOOLS)
            masks["mask"] = parts.split(tree._replace(leaves=flat))[k]
        return masks

    # ------------------------------------------------------------- for integrations

    @property
    def rate(self) -> Any:
        """Of the matrices."""
        return self.muon.learning_rate

    def with_rate(self, rate: Any) -> "MatrixOptimizer":
        """For both parts, unless AdamW has a rate of its own."""
        muon = replace(self.muon, learning_rate=rate)
        adam = replace(self.adam, learning_rate=rate) if self.one_rate else self.adam
        return replace(self, muon=muon, adam=adam)

    def each(self, change: Callable[[Optimizer], Optimizer]) -> "MatrixOptimizer":
        """With both parts changed."""
        return replace(self, muon=change(self.muon), adam=change(self.adam))

    # ------------------------------------------------------- as `Optimizer` has them

    def init(self, params: Any) -> MuonState:
        """A fresh state, sharded like the parameters."""
        tree = Leaves.of(params)
        pages = self._pages(tree, self.places(tree))
        parts = self.parts(params, tree).paged(tree, pages)
        self._check_memory(parts.axes, tree)
        muon, adam = parts.split(tree)
        return MuonState(parts.muon.init(muon), parts.adam.init(adam))

    def _pages(
        self, tree: Leaves, where: Places, platform: str | None = None
    ) -> list[Paging]:
        """Where states are, if `paged="auto"` leaves it open: that depends on all."""
        if "auto" not in per_leaf("paged", self.settings.paged, tree, PAGED):
            return []
        return pagings(self.settings, tree, self.records(tree), where, platform)

    def _check_memory(self, axes: Sequence[Axes | None], tree: Leaves) -> None:
        how = self.orthogonal
        rows = zip(axes, tree.leaves, self.places(tree).state, tree.names, strict=True)
        chosen = [
            (Stack(own, jnp.shape(x), where), name, how.iterations.dtype or x.dtype)
            for own, x, where, name in rows
            if own is not None
        ]
        if chosen:
            stacks, paths, dtypes = zip(*chosen, strict=True)
            sizes = [jnp.dtype(dtype).itemsize for dtype in dtypes]
            check_memory(stacks, paths, sizes, how.largest)

    @property
    def needs_params(self) -> bool:
        """They are decayed."""
        return True

    def places(self, tree: Leaves) -> Places:
        """Where each leaf is, and its state."""
        return self.adam_of_all(tree).places(tree)

    def adam_of_all(self, tree: Leaves) -> Optimizer:
        """The rest's, whose settings are those of all leaves."""
        return self.parts(tree.replaced(tree.leaves), tree).adam

    def records(self, tree: Leaves) -> list[Storage]:
        """How each leaf is stored."""
        parts = self.parts(tree.replaced(tree.leaves), tree)
        both = map(Leaves.of, parts.split(tree))
        one, other = (
            part.records(own) for part, own in zip(parts[1:], both, strict=True)
        )
        return parts.merged(one, other)

    def work(
        self,
        tree: Leaves,
        params: Any,
        records: Sequence[Storage],
        where: Places,
        dtypes: Sequence[tuple[Any, ...]],
        in_place: bool,
        platform: str | None = None,
    ) -> list[Work]:
        """What a step has to do for each leaf."""
        pages = self._pages(tree, where, platform)
        parts = self.parts(params, tree).paged(tree, pages)
        columns: tuple[Any, ...] = (tree.leaves, records, *where, dtypes)
        split = parts.split(tree._replace(leaves=[*range(len(records))]))
        found = []
        for part, own in zip(parts[1:], split, strict=True):
            at = jax.tree.leaves(own)
            _, kept, home, stepped, types = ([c[k] for k in at] for c in columns)
            shapes = [tree.leaves[k] for k in at]
            masked = jax.tree.map(lambda k: tree.leaves[k], own)
            some = Leaves.of(masked)._replace(leaves=shapes)
            places = Places(home, stepped)
            given = (some, masked, kept, places, types, in_place, platform)
            found.append(part.work(*given))
        both = parts.merged(*found)
        pairs = zip(both, pages or [w.paging for w in both], strict=True)
        return [w._replace(paging=paging) for w, paging in pairs]

    # ---------------------------------------------------------------------- steps

    def run(
        self, grads: Any, state: Any, params: Any, in_place: bool
    ) -> tuple[Any, Any]:
        """Both parts, from beginning to end."""
        if not isinstance(state, MuonState):
            raise ValueError(
                f"the state is a {type(state).__name__}, not optim.muon's: pass what "
                "tx.init or the last step returned"
            )
        g, p = Leaves.of(grads), Leaves.of(params)
        parts = self.parts(params, p).paged(p, self._pages(p, self.places(p)))
        if len(g.leaves) != len(p.leaves):
            raise ValueError(
                f"{len(g.leaves)} gradients for {len(p.leaves)} parameters: give trees "
                "of the same structure"
            )
        trees = zip(parts.split(g), state, parts.split(p), strict=True)
        begun = [
            part.begin(*own, in_place)
            for part, own in zip(parts[1:], trees, strict=True)
        ]
        axes = [x for x in parts.axes if x is not None]
        ended = self._stepped(axes, *begun)
        outs = [Leaves.of(out).leaves for out, _ in ended]
        tree = p if in_place else g
        return tree.replaced(parts.merged(*outs)), MuonState(*(s for _, s in ended))

    def _stepped(
        self, axes: Sequence[Axes], muon: Begun, adam: Begun
    ) -> list[tuple[Any, Any]]:
        """Both parts, with limits on gradients that see all leaves."""
        joint = joined(muon.step, adam.step)
        n = len(muon.step.work)
        past = _histories(muon, adam)
        passed = operands(self.settings, None, joint, past, muon.state.count)
        scalars = [passed.scalars[:n], passed.scalars[n:]]
        steps = [
            begun.step._replace(scalars=own)
            for begun, own in zip((muon, adam), scalars, strict=True)
        ]
        first = joined(directions(steps[0]), steps[1]).run()
        whole = self._orthogonal(axes, steps[0], [leaf.g for leaf in first[:n]])
        second = writing(steps[0], whole).run()
        written = [
            a._replace(g=b.g, p=b.p, remainder=b.remainder)
            for a, b in zip(first[:n], second, strict=True)
        ]
        return [
            begun.end(own, Operands([], passed.take, {**begun.state.extra, **known}))
            for begun, own, known in (
                (muon, written, {name: x[:n] for name, x in passed.extra.items()}),
                (adam, first[n:], {name: x[n:] for name, x in passed.extra.items()}),
            )
        ]

    def _orthogonal(
        self, axes: Sequence[Axes], step: Step, directions: Sequence[jax.Array]
    ) -> list[jax.Array]:
        how = self.orthogonal
        rms = how.consistent_rms
        given = (how.eps,) if rms is None else (how.eps, rms)
        rows = zip(axes, step.work, strict=True)
        stacks = [Stack(own, w.program.storage.shape, w.sharding) for own, w in rows]
        if how.iterations.dtype is not None:  # before they travel
            directions = [x.astype(how.iterations.dtype) for x in directions]
        return whole_matrices(
            Direction(how.iterations),
            stacks,
            [w.path for w in step.work],
            directions,
            tuple(jnp.asarray(x, jnp.float32) for x in given),
            how.largest,
        )


def _histories(muon: Begun, adam: Begun) -> dict[str, jax.Array]:
    """What `percentile_clipping` knows of each leaf, of both parts."""
    name = "clip_history"
    both = [x.state.extra[name] for x in (muon, adam) if name in x.state.extra]
    return {name: jnp.concatenate(both)} if both else {}
