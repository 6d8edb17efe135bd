"""A step of matrices in two passes, and of all other leaves beside it.

The first pass advances the momentum and writes the direction of each matrix, which is
then made orthogonal, whole; the second decays, scales and writes the parameter. Leaves
that are no matrices are stepped in the first. Both passes are those of every other
optimizer.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from octavo.pallas_kernels import Leaf, Rule, Storage

from ..options import Settings, is_by_leaf, is_state
from ..sgd import DESCENT
from ..sharding.finer import Places
from ..stepping.operands import Operands, Step, operands
from ..stepping.optimizer import NO_PARAMS, Begun, Optimizer
from ..stepping.tasks import Work
from ..storage.muon import MuonState
from ..storage.shards import mesh_axes
from ..storage.tree import (
    AXES,
    AXIS,
    BOOLS,
    NAMES,
    NUMBERS,
    SHARDINGS,
    SIZES,
    Kind,
    Leaves,
    per_leaf,
    spread,
)
from .choice import Axes, matrices_in
from .exchange import Stack, whole_matrices
from .newton_schulz import Iterations, orthogonalized

_PER_LEAF: dict[str, Kind] = {
    "state": Kind(
        lambda x: isinstance(x, str) or _names_slots(x), "formats, or one for each slot"
    ),
    "weights": NAMES,
    "block_size": SIZES,
    "block_axis": AXIS,
    "layer_axes": AXES,
    "lr_scale": NUMBERS,
    "backend": NAMES,
    "sharding": SHARDINGS,
}


@dataclass(frozen=True)
class Orthogonal:
    """How the direction of a matrix is made orthogonal, and its length.

    Attributes:
      iterations: of Newton-Schulz.
      eps: in them.
      consistent_rms: factor of sqrt(max(rows, columns)); None: the length is
        sqrt(max(1, columns / rows)).
      largest: values in a matrix that one device may have.
    """

    iterations: Iterations
    eps: Any
    consistent_rms: Any
    largest: int


class Arguments(NamedTuple):
    """Which leaves are matrices, as the user says it."""

    dimension_numbers: Any
    mask: Any


class Parts(NamedTuple):
    """A tree's two optimizers.

    Attributes:
      axes: of each leaf; None where it is no matrix.
      muon: of the matrices.
      adam: of the rest.
    """

    axes: list[Axes | None]
    muon: Optimizer
    adam: Optimizer

    def split(self, tree: Leaves) -> tuple[Any, Any]:
        """The matrices, and the rest."""
        return tuple(
            tree.replaced(
                [
                    x if (axes is None) == rest else optax.MaskedNode()
                    for x, axes in zip(tree.leaves, self.axes, strict=True)
                ]
            )
            for rest in (False, True)
        )  # type: ignore[return-value]

    def merged(self, muon: Sequence[Any], adam: Sequence[Any]) -> list[Any]:
        """What belongs to each leaf, in the order of the tree."""
        one, other = iter(muon), iter(adam)
        return [next(other if axes is None else one) for axes in self.axes]


@dataclass(frozen=True, eq=False)
class MatrixOptimizer:
    """What `init` and steps do, as `Optimizer`'s are called.

    Attributes:
      muon: of the matrices; its settings do not matter.
      adam: of the rest, likewise.
      settings: of both.
      orthogonal: how.
      arguments: which leaves are matrices.
    """

    muon: Optimizer
    adam: Optimizer
    settings: Settings
    orthogonal: Orthogonal
    arguments: Arguments
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
        settings = _by_path(self.settings, tree)
        own = replace(settings, state=_of_mu(settings.state, self.adam.rule))
        parts = Parts(axes, self.muon, self.adam)
        masks = {}
        for name, mask in self.muon.masks.items():
            masks[name] = mask
            if tree.leaves and mask is not None and not callable(mask):
                flat = spread(f"weight_decay_{name}", mask, tree, BOOLS)
                masks[name], _ = parts.split(tree._replace(leaves=flat))
        decay = self.muon.weight_decay
        if tree.leaves and is_by_leaf(decay) and not callable(decay):
            decay = _function("weight_decay", decay, tree, NUMBERS)
        return Parts(
            axes,
            replace(self.muon, settings=own, masks=masks, weight_decay=decay),
            replace(self.adam, settings=settings),
        )

    # ------------------------------------------------------- as `Optimizer` has them

    def init(self, params: Any) -> MuonState:
        """A fresh state, sharded like the parameters."""
        tree = Leaves.of(params)
        parts = self.parts(params, tree)
        muon, adam = parts.split(tree)
        return MuonState(parts.muon.init(muon), parts.adam.init(adam))

    def update(
        self, updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, Any]:
        """As in optax."""
        del extra_args
        if params is None:
            raise ValueError(NO_PARAMS)
        return self._run(updates, state, params, in_place=False)

    def step(
        self, grads: Any, state: Any, params: Any, **extra_args: Any
    ) -> tuple[Any, Any]:
        """See `Transformation.step`."""
        del extra_args
        if params is None:
            raise ValueError(NO_PARAMS)
        return self._run(grads, state, params, in_place=True)

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
        parts = self.parts(params, tree)
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
        return parts.merged(*found)

    # ---------------------------------------------------------------------- steps

    def _run(
        self, grads: Any, state: Any, params: Any, in_place: bool
    ) -> tuple[Any, Any]:
        if not isinstance(state, MuonState):
            raise ValueError(
                f"the state is a {type(state).__name__}, not optim.muon's: pass what "
                "tx.init or the last step returned"
            )
        g, p = Leaves.of(grads), Leaves.of(params)
        parts = self.parts(params, p)
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
        joint = _joined(muon.step, adam.step)
        passed = operands(self.settings, None, joint, {}, muon.state.count)
        n = len(muon.step.work)
        scalars = [passed.scalars[:n], passed.scalars[n:]]
        steps = [
            begun.step._replace(scalars=own)
            for begun, own in zip((muon, adam), scalars, strict=True)
        ]
        first = _joined(_directions(steps[0]), steps[1]).run()
        whole = self._orthogonal(axes, steps[0], [leaf.g for leaf in first[:n]])
        second = _writing(steps[0], whole).run()
        written = [
            a._replace(g=b.g, p=b.p, remainder=b.remainder)
            for a, b in zip(first[:n], second, strict=True)
        ]
        return [
            begun.end(own, Operands([], passed.take, dict(begun.state.extra)))
            for begun, own in ((muon, written), (adam, first[n:]))
        ]

    def _orthogonal(
        self, axes: Sequence[Axes], step: Step, directions: Sequence[jax.Array]
    ) -> list[jax.Array]:
        how = self.orthogonal
        rms = how.consistent_rms
        given = (how.eps,) if rms is None else (how.eps, rms)
        rows = zip(axes, step.work, strict=True)
        stacks = [Stack(own, w.program.storage.shape, w.sharding) for own, w in rows]
        return whole_matrices(
            _Direction(how.iterations),
            stacks,
            [w.path for w in step.work],
            directions,
            tuple(jnp.asarray(x, jnp.float32) for x in given),
            how.largest,
        )


@dataclass(frozen=True)
class _Direction:
    """From momentum to the direction that the learning rate multiplies; static."""

    iterations: Iterations

    def __call__(
        self, x: jax.Array, eps: jax.Array, rms: jax.Array | None = None
    ) -> jax.Array:
        rows, columns = x.shape[-2:]
        if rms is None:
            scale = jnp.float32(max(1.0, columns / rows) ** 0.5)
        else:
            scale = rms * max(rows, columns) ** 0.5
        found = orthogonalized(x, self.iterations, eps)
        return (scale * found.astype(jnp.float32)).astype(x.dtype)


def _joined(one: Step, other: Step) -> Step:
    """The leaves of both, so that one pass runs all."""
    return one._replace(
        work=[*one.work, *other.work],
        leaves=[*one.leaves, *other.leaves],
        scalars=[*one.scalars, *other.scalars],
        ids=[*one.ids, *other.ids],
    )


def _directions(step: Step) -> Step:
    """The pass that advances momentum, and writes where it points to."""
    work, leaves, scalars = [], [], []
    for w, leaf, s in zip(step.work, step.leaves, step.scalars, strict=True):
        program = replace(
            w.program,
            rule=replace(w.program.rule, decay=None),
            storage=replace(w.program.storage, weights=None),
            in_place=False,
        )
        work.append(w._replace(program=program, home=None, dtypes=w.dtypes[:1]))
        leaves.append(leaf._replace(p=None, remainder=None))
        scalars.append(s._replace(learning_rate=jnp.float32(-1.0), decay=None))
    return step._replace(work=work, leaves=leaves, scalars=scalars)


def _writing(step: Step, directions: Sequence[jax.Array]) -> Step:
    """The pass that writes parameters: gradient descent along the directions."""
    work, leaves, scalars = [], [], []
    rows = zip(step.work, step.leaves, step.scalars, directions, strict=True)
    for w, leaf, s, direction in rows:
        program = replace(
            w.program,
            rule=replace(DESCENT, decay=w.program.rule.decay),
            storage=replace(w.program.storage, slots=()),
        )
        work.append(w._replace(program=program, backend=None))
        leaves.append(Leaf(direction, leaf.p, (), (), leaf.remainder))
        scalars.append(s._replace(rule=(), clip=None, clip_value=None))
    return step._replace(work=work, leaves=leaves, scalars=scalars)


# ---------------------------------------------------------------------- options


def _by_path(settings: Settings, tree: Leaves) -> Settings:
    """Settings whose trees, which are like all parameters, are functions of paths."""
    made: dict[str, Any] = {}
    if not tree.leaves:  # a placeholder of optax, which no tree fits
        return settings
    for name, kind in _PER_LEAF.items():
        value = getattr(settings, name)
        whole = name == "state" and _names_slots(value)
        if is_by_leaf(value) and not callable(value) and not whole:
            made[name] = _function(name, value, tree, kind)
    value = settings.state_sharding
    if value is not None and not callable(value) and not mesh_axes(value):
        made["state_sharding"] = _function("state_sharding", value, tree, SHARDINGS)
    return replace(settings, **made) if made else settings


def _function(name: str, value: Any, tree: Leaves, kind: Kind) -> Callable[[str], Any]:
    given = per_leaf(name, value, tree, kind)
    return dict(zip(tree.names, given, strict=True)).__getitem__


def _names_slots(value: Any) -> bool:
    return isinstance(value, Mapping) and bool({"mu", "nu"} & set(value))


def _of_mu(state: Any, rule: Rule) -> Any:
    """The option `state` for matrices, which have one slot."""
    if callable(state):
        return lambda path: _of_mu(state(path), rule)
    if isinstance(state, Mapping) and is_state(state, rule.slots) and "mu" in state:
        return {"mu": state["mu"]}
    return state
