"""From a rule and options to an optax transformation with a fused step."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding

from octavo import pallas_kernels as kernels
from octavo.pallas_kernels import Leaf, Program, Rule, Scalars, Slot

from .job import Job, tell_straddling
from .limits import HISTORY, limited
from .norms import no_norms
from .options import Options
from .passes import Operands, operands, tree_step
from .placement import everywhere, placements, zeros
from .settings import LeafPlan, Settings
from .state import State, scale_name
from .stored import format_table
from .tree import (
    AXES,
    BOOLS,
    Leaves,
    StateLeaves,
    check_gradients,
    check_leaf,
    flatten_state,
    spread,
)


class Step(Protocol):
    """`step(grads, state, params) -> (params, state)`."""

    def __call__(
        self, grads: Any, state: State, params: Any, **extra_args: Any
    ) -> tuple[Any, State]: ...


class Transformation(optax.GradientTransformationExtraArgs):
    """An `optax.GradientTransformationExtraArgs` that can also step in place.

    Attributes:
      init: `init(params) -> state`.
      update: `update(grads, state, params) -> (updates, state)`, as in optax.
      jobs: `jobs(params, shardings)`: how the state of each leaf is stored and what a
        step does with it, for `octavo.optim.check_sharding`.
      backend, seed: the options.
      step: `step(grads, state, params) -> (params, state)`: the same state, and the
        parameters written by the kernel itself. Inside `jax.jit` with the state and
        parameters donated, nothing of a leaf's size is allocated. Let the jitted
        function take params before state, the order in which they return: XLA pairs
        donated arrays of equal type by order (it matters for 32-bit state).
    """

    step: Step
    jobs: Callable[[Any, Sequence[NamedSharding]], list[Job]]
    backend: str | None
    seed: int


def fused(
    rule: Rule,
    learning_rate: optax.ScalarOrSchedule,
    options: Options,
    *,
    mask: Any = None,
    adapt_mask: Any = None,
) -> Transformation:
    """An optimizer from its rule.

    Args:
      rule: the algorithm.
      learning_rate: number or schedule, called with the number of steps taken before.
      options: see `Options`.
      mask: tree of bools, or function of the parameters that returns one: which leaves
        decay. None: all.
      adapt_mask: likewise, which leaves take the rule's ratio. None: those whose layers
        have rank 2 and up.
    """
    settings = Settings.of(options, tuple(rule.slots))
    optimizer = _Optimizer(rule, learning_rate, settings, mask, adapt_mask)
    transformation = Transformation(
        optimizer.init,
        optimizer.update,  # pyright: ignore[reportArgumentType]
    )
    transformation.step = optimizer.step
    transformation.jobs = optimizer.jobs
    transformation.backend = settings.backend
    transformation.seed = settings.seed
    return transformation


@dataclass(frozen=True, eq=False)
class _Optimizer:
    """What the functions of a transformation share."""

    rule: Rule
    learning_rate: optax.ScalarOrSchedule
    settings: Settings
    mask: Any
    adapt_mask: Any

    @property
    def slots(self) -> tuple[Slot, ...]:
        return tuple(self.rule.slots)

    def init(self, params: Any) -> State:
        leaves = Leaves.of(params)
        plans = self._plans(leaves)
        where = placements(self.settings.sharding, leaves)
        each = list(zip(plans, leaves.leaves, where, strict=True))
        moments, scales = {}, {}
        quantizes = self.settings.quantizes(self.slots)
        for k, (slot, quantized) in enumerate(zip(self.slots, quantizes, strict=True)):
            codes = [
                zeros(plan.blocks.shape, plan.moment_dtype(k), p, sharding)
                for plan, p, sharding in each
            ]
            moments[slot.name] = leaves.replaced(codes)
            if quantized:
                empty = [
                    zeros(plan.blocks.scale_shape, jnp.bfloat16, p, sharding)
                    for plan, p, sharding in each
                ]
                scales[scale_name(slot.name)] = leaves.replaced(empty)
        small = (jnp.zeros((), jnp.int32), self._extra(plans))
        count, extra = jax.tree.map(
            lambda x: everywhere(x, leaves.leaves, where), small
        )
        return State(count, moments, scales, extra)

    def _extra(self, plans: list[LeafPlan]) -> dict[str, Any]:
        settings = self.settings
        extra: dict[str, Any] = {
            "format": {settings.tag(self.slots): format_table(plans, len(self.slots))}
        }
        if settings.skip_nonfinite:
            extra["skipped"] = jnp.zeros((), jnp.int32)
        if settings.percentile_clipping is not None:
            extra["clip_history"] = jnp.zeros((len(plans), HISTORY))
        if settings.record_norms:
            extra["norms"] = no_norms([plan.blocks.layer_count for plan in plans])
        return extra

    def update(
        self, updates: Any, state: State, params: Any = None, **extra_args: Any
    ) -> tuple[Any, State]:
        del extra_args
        if params is None and self._needs_params():
            raise ValueError(_NO_PARAMS)
        return self._run(updates, state, params, in_place=False)

    def step(
        self, grads: Any, state: State, params: Any, **extra_args: Any
    ) -> tuple[Any, State]:
        del extra_args
        if params is None:
            raise ValueError(_NO_PARAMS)
        return self._run(grads, state, params, in_place=True)

    def _needs_params(self) -> bool:
        rule, settings = self.rule, self.settings
        measures = rule.ratio or settings.max_unorm is not None or settings.record_norms
        return bool(rule.needs_params or rule.decay or measures)

    def _run(
        self, grads: Any, state: State, params: Any, in_place: bool
    ) -> tuple[Any, State]:
        g = Leaves.of(grads)
        p = None if params is None else Leaves.of(params)
        old = flatten_state(state, self.slots, self.init({}))
        check_gradients(g, p, old.codes[0])
        plans = self._plans(p or g)
        rules = self._rules(plans, params, p or g)
        settings, where = self.settings, placements(self.settings.sharding, p or g)
        jobs = [
            Job(
                plan,
                Program(rule, plan.formats, in_place),
                _leaf(plan, i, g, p, old),
                sharding,
            )
            for i, (plan, rule, sharding) in enumerate(
                zip(plans, rules, where, strict=True)
            )
        ]
        tell_straddling(jobs)
        scalars = self._scalars(rules, state.count)
        passed = operands(settings, jobs, scalars, state.extra, state.count)
        keys = [kernels.key(settings.seed, state.count, plan.path) for plan in plans]
        results = tree_step(settings, jobs, passed.scalars, keys)
        shown = p if in_place and p is not None else g
        out = shown.replaced([r.p if in_place else r.g for r in results])
        return out, _replaced(state, self.slots, old, results, passed)

    def jobs(self, params: Any, shardings: Sequence[NamedSharding]) -> list[Job]:
        """The work of a step in place, without arrays."""
        tree = Leaves.of(params)
        plans = self._plans(tree)
        rules = self._rules(plans, params, tree)
        nothing = Leaf(None, None, (), ())
        return [
            Job(plan, Program(rule, plan.formats, in_place=True), nothing, sharding)
            for plan, rule, sharding in zip(plans, rules, shardings, strict=True)
        ]

    def _plans(self, tree: Leaves) -> list[LeafPlan]:
        """How each leaf is stored."""
        axes = self.settings.layer_axes
        if not tree.leaves:
            return []
        if callable(axes):
            layers = [axes(path) for path in tree.paths]
        else:
            layers = spread("layer_axes", axes, tree, AXES)
        return [
            self.settings.plan(path, leaf, self.slots, axis)
            for path, leaf, axis in zip(tree.paths, tree.leaves, layers, strict=True)
        ]

    def _rules(self, plans: list[LeafPlan], params: Any, tree: Leaves) -> list[Rule]:
        """The rule of each leaf: with decay and ratio, or without."""
        decays = _mask("mask", self.mask, params, tree)
        adapts = _mask("adapt_mask", self.adapt_mask, params, tree)
        if adapts is None:
            ranks = (len(x.blocks.shape) - len(x.blocks.layers) for x in plans)
            adapts = [rank >= 2 for rank in ranks]
        rules = []
        for decay, adapt in zip(decays or [True] * len(plans), adapts, strict=True):
            rule = self.rule if decay else replace(self.rule, decay=None)
            rule = rule if adapt else replace(rule, ratio=None)
            limit = self.settings.max_unorm
            rules.append(rule if limit is None else limited(rule, limit))
        return rules

    def _scalars(self, rules: list[Rule], count: jax.Array) -> list[Scalars]:
        """What each leaf takes as operands, as far as the step's number tells."""
        rate = self.learning_rate
        rate = jnp.asarray(rate(count) if callable(rate) else rate, jnp.float32)
        own = self.rule.scalars((count + 1).astype(jnp.float32), rate)
        factor = jnp.ones_like(rate) if self.rule.rate_first else rate
        decay = self.rule.decay
        value = None if decay is None else jnp.asarray(decay.value, jnp.float32)
        return [
            Scalars(factor, own, decay=None if rule.decay is None else value)
            for rule in rules
        ]


_NO_PARAMS = (
    "this optimizer needs the current parameters: call "
    "tx.update(grads, state, params) or tx.step(grads, state, params)"
)


def _leaf(
    plan: LeafPlan, i: int, g: Leaves, p: Leaves | None, old: StateLeaves
) -> Leaf:
    """The arrays of leaf i, checked."""
    codes = tuple(c.leaves[i] for c in old.codes)
    scales = tuple(
        s.leaves[i] if f.quantized and s is not None else None
        for f, s in zip(plan.formats, old.scales, strict=True)
    )
    check_leaf(plan, codes, scales)
    gradient = jnp.asarray(g.leaves[i]) if plan.updated else g.leaves[i]
    return Leaf(
        gradient, None if p is None else jnp.asarray(p.leaves[i]), codes, scales
    )


def _replaced(
    state: State,
    slots: tuple[Slot, ...],
    old: StateLeaves,
    results: list[Leaf],
    passed: Operands,
) -> State:
    """The state after a step."""
    moments, scales = {}, {}
    for k, slot in enumerate(slots):
        moments[slot.name] = old.codes[k].replaced([r.codes[k] for r in results])
        before = old.scales[k]
        if before is not None:
            pairs = zip((r.scales[k] for r in results), before.leaves, strict=True)
            after = [kept if new is None else new for new, kept in pairs]
            scales[scale_name(slot.name)] = before.replaced(after)
    count, extra = jnp.asarray(optax.safe_increment(state.count)), passed.extra
    if passed.take is not None:
        taken = passed.take > 0.0
        count, extra = jax.tree.map(
            lambda new, old: jnp.where(taken, new, old),
            (count, extra),
            (state.count, state.extra),
        )
        skipped = optax.safe_increment(state.extra["skipped"])
        extra["skipped"] = jnp.where(taken, state.extra["skipped"], skipped)
    return State(count, moments, scales, extra)


def _mask(name: str, mask: Any, params: Any, tree: Leaves) -> list[bool] | None:
    """For each leaf, what the mask says; None if there is no mask."""
    if mask is None:
        return None
    return spread(name, mask(params) if callable(mask) else mask, tree, BOOLS)
