"""From a rule and options to an optax transformation with a fused step."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax

from octavo import pallas_kernels as kernels
from octavo.pallas_kernels import Leaf, Program, Rule, Scalars

from .options import LeafPlan, Options, Storage
from .state import State, scale_name
from .tree import (
    Leaves,
    StateLeaves,
    check_gradients,
    check_leaf,
    flatten_state,
    path_name,
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
      step: `step(grads, state, params) -> (params, state)`: the same state, and the
        parameters written by the kernel itself. Inside `jax.jit` with the state and
        parameters donated, nothing of a leaf's size is allocated. Let the jitted
        function take params before state, the order in which they return: XLA pairs
        donated arrays of equal type by order (it matters for 32-bit state).
    """

    step: Step


def fused(
    rule: Rule,
    learning_rate: optax.ScalarOrSchedule,
    options: Options,
    *,
    decay: Callable[[Rule], Rule] | None = None,
    mask: Any = None,
) -> Transformation:
    """An optimizer from its rule.

    Args:
      rule: the algorithm.
      learning_rate: number or schedule, called with the number of steps taken before.
      options: see `Options`.
      decay: adds weight decay to the rule.
      mask: tree of bools, or function of the parameters that returns one: which leaves
        take the rule with decay, and which without. None: all with.
    """
    storage = Storage.of(options, tuple(rule.slots))
    decayed = rule if decay is None else decay(rule)
    optimizer = _Optimizer(rule, decayed, learning_rate, storage, mask)
    transformation = Transformation(
        optimizer.init,
        optimizer.update,  # pyright: ignore[reportArgumentType]
    )
    transformation.step = optimizer.step
    return transformation


@dataclass(frozen=True, eq=False)
class _Optimizer:
    """What the functions of a transformation share."""

    rule: Rule
    decayed: Rule
    learning_rate: optax.ScalarOrSchedule
    storage: Storage
    mask: Any

    def init(self, params: Any) -> State:
        return _init(self.storage, self.rule, params)

    def update(
        self, updates: Any, state: State, params: Any = None, **extra_args: Any
    ) -> tuple[Any, State]:
        del extra_args
        if params is None and self.decayed.needs_params:
            raise ValueError(_NO_PARAMS)
        return self._run(updates, state, params, in_place=False)

    def step(
        self, grads: Any, state: State, params: Any, **extra_args: Any
    ) -> tuple[Any, State]:
        del extra_args
        if params is None:
            raise ValueError(_NO_PARAMS)
        return self._run(grads, state, params, in_place=True)

    def _run(
        self, grads: Any, state: State, params: Any, in_place: bool
    ) -> tuple[Any, State]:
        slots = tuple(self.rule.slots)
        g = Leaves.of(grads)
        p = None if params is None else Leaves.of(params)
        old = flatten_state(state, slots, self.init({}))
        check_gradients(g, p, old.codes[0])
        typed = (p or g).leaves
        plans = [
            self.storage.plan(path, leaf, slots)
            for path, leaf in zip(g.paths, typed, strict=True)
        ]
        leaves = [_leaf(plan, i, g, p, old) for i, plan in enumerate(plans)]
        scalars = self._scalars(state.count)
        results = []
        for plan, leaf, decays in zip(
            plans, leaves, _mask_leaves(self.mask, params, g), strict=True
        ):
            rule = self.decayed if decays else self.rule
            program = Program(rule, plan.formats, in_place)
            key = kernels.key(self.storage.seed, state.count, plan.path)
            results.append(self._step_leaf(program, plan, leaf, scalars[decays], key))
        shown = p if in_place and p is not None else g
        out = shown.replaced([r.p if in_place else r.g for r in results])
        return out, _replaced(state, slots, old, results)

    def _scalars(self, count: jax.Array) -> dict[bool, Scalars]:
        """What a leaf with decay (True) and one without take as operands."""
        rate = self.learning_rate
        rate = jnp.asarray(rate(count) if callable(rate) else rate, jnp.float32)
        t = (count + 1).astype(jnp.float32)
        rules = {True: self.decayed, False: self.rule}
        return {
            decays: Scalars(rate, rule.scalars(t)) for decays, rule in rules.items()
        }

    def _step_leaf(
        self,
        program: Program,
        plan: LeafPlan,
        leaf: Leaf,
        scalars: Scalars,
        key: jax.Array,
    ) -> Leaf:
        if not plan.updated or 0 in plan.blocks.shape:
            return leaf._replace(g=_zeros_like(leaf.g))  # integers and empty leaves
        backend = self.storage.backend
        return kernels.leaf_step(backend, program, plan.blocks, leaf, scalars, key)


_NO_PARAMS = (
    "this optimizer needs the current parameters: call "
    "tx.update(grads, state, params) or tx.step(grads, state, params)"
)


def _init(storage: Storage, rule: Rule, params: Any) -> State:
    slots = tuple(rule.slots)
    plans = jax.tree_util.tree_map_with_path(
        lambda path, p: storage.plan(path_name(path), p, slots), params
    )

    def codes(k: int) -> Any:
        return jax.tree.map(
            lambda plan, p: jnp.zeros_like(p, dtype=plan.moment_dtype(k)),
            plans,
            params,
        )

    def scales() -> Any:
        return jax.tree.map(
            lambda plan: jnp.zeros(plan.blocks.scale_shape, jnp.bfloat16), plans
        )

    quantizes = zip(slots, storage.quantizes(slots), strict=True)
    return State(
        count=jnp.zeros((), jnp.int32),
        moments={slot.name: codes(k) for k, slot in enumerate(slots)},
        scales={scale_name(slot.name): scales() for slot, yes in quantizes if yes},
        extra={"format": {storage.tag(slots): jnp.zeros((), jnp.int32)}},
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


def _zeros_like(g: Any) -> Any:
    return g if g.dtype == jax.dtypes.float0 else jnp.zeros_like(g)


def _replaced(
    state: State, slots: tuple[Any, ...], old: StateLeaves, results: list[Leaf]
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
    count = jnp.asarray(optax.safe_increment(state.count))
    return State(count, moments, scales, state.extra)


def _mask_leaves(mask: Any, params: Any, g: Leaves) -> list[bool]:
    """For each leaf, whether it decays."""
    if mask is None:
        return [True] * len(g.leaves)
    tree = mask(params) if callable(mask) else mask
    whole = g.treedef.unflatten(g.leaves)
    try:
        full = jax.tree.map(lambda m, sub: jax.tree.map(lambda _: m, sub), tree, whole)
    except (ValueError, TypeError) as error:
        raise ValueError(
            "mask is not a tree of bools like the parameters, or a prefix of them: "
            f"{error}"
        ) from error
    return [bool(m) for m in jax.tree.leaves(full)]
