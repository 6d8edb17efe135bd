"""Gradients of several micro-batches, averaged, and stepped once."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import NamedSharding

from octavo.pallas_kernels import leaf_number, step_key, unbiased

from .checks import check_int
from .sharding.finer import Places, places
from .sharding.geometry import resharded
from .sharding.placement import constrained, everywhere, filled
from .stepping.transformation import step
from .storage.tree import Leaves

_DTYPES = ("float32", "bfloat16")


def in_place_if(yes: jax.Array, function: Callable[..., Any], *x: Any) -> Any:
    """`function(*x)`, or else x, which stays where it is.

    A loop of one turn or none: on GPUs, `lax.cond` copies what it leaves alone.
    """
    return lax.fori_loop(0, yes.astype(jnp.int32), lambda _, x: function(*x), x)


class AccumulateState(NamedTuple):
    """The state of `octavo.optim.accumulate`, with names as in `optax.MultiSteps`.

    Attributes:
      mini_step: i32, gradients since the last step.
      gradient_step: i32, steps taken.
      inner_opt_state: of the optimizer.
      acc_grads: tree like the parameters, the mean of the gradients since the last
        step. After a step it is that step's, until the next gradient takes its place.
    """

    mini_step: jax.Array
    gradient_step: jax.Array
    inner_opt_state: Any
    acc_grads: Any


@dataclass(frozen=True, eq=False)
class Accumulator:
    """Another optimizer, and how gradients are averaged for it."""

    inner: optax.GradientTransformationExtraArgs
    steps: int
    dtype: Any
    seed: int

    def init(self, params: Any) -> AccumulateState:
        """The optimizer's state, and gradients of zero that are sharded like it."""
        tree = Leaves.of(params)
        where = self._places(tree).state
        empty = [
            filled(jax.ShapeDtypeStruct(jnp.shape(p), self._dtype(p)), 0, p, sharding)
            for p, sharding in zip(tree.leaves, where, strict=True)
        ]
        mini, steps = (  # two arrays: one could not be donated twice
            everywhere(jnp.zeros((), jnp.int32), tree.leaves, where) for _ in range(2)
        )
        inner = self.inner.init(params)
        return AccumulateState(mini, steps, inner, tree.replaced(empty))

    def update(
        self, updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, AccumulateState]:
        """As in optax: updates of zero, but after the last gradient of a step."""
        mean, acc = self._averaged(updates, state)

        def last(_: Any, inner: Any) -> tuple[Any, Any]:
            return self.inner.update(mean, inner, params, **extra_args)

        made, _ = jax.eval_shape(last, None, state.inner_opt_state)
        like = updates if params is None else params
        zeros = jax.tree.map(lambda u, x: jnp.zeros_like(x, u.dtype), made, like)
        return self._in_turn(state, acc, last, zeros)

    def step(
        self, grads: Any, state: Any, params: Any, **extra_args: Any
    ) -> tuple[Any, AccumulateState]:
        """See `Accumulated.step`."""
        mean, acc = self._averaged(grads, state)

        def last(params: Any, inner: Any) -> tuple[Any, Any]:
            return step(self.inner, mean, inner, params, **extra_args)

        tree = Leaves.of(params)
        where = self._places(tree).params

        def home(params: Any) -> Any:
            """XLA would leave them as the state is, which may be in smaller shards."""
            rows = zip(jax.tree.leaves(params), where, strict=True)
            return tree.replaced([constrained(*row) for row in rows])

        out, state = self._in_turn(state, acc, last, home(params))
        return home(out), state

    def _in_turn(
        self, state: AccumulateState, acc: Any, last: Callable[..., Any], kept: Any
    ) -> tuple[Any, AccumulateState]:
        """A step after the last of its gradients; else what is kept."""
        count = state.mini_step + 1
        ends = count == self.steps
        inner = state.inner_opt_state
        out, inner = in_place_if(ends, last, kept, inner)
        steps = jnp.asarray(optax.safe_increment(state.gradient_step))
        return out, AccumulateState(
            jnp.where(ends, 0, count),
            jnp.where(ends, steps, state.gradient_step),
            inner,
            acc,
        )

    def _averaged(self, grads: Any, state: AccumulateState) -> tuple[Any, Any]:
        """The mean of the gradients so far: as the optimizer takes it, and as kept."""
        tree = Leaves.of(grads)
        try:
            acc = tree.treedef.flatten_up_to(state.acc_grads)
        except ValueError as error:
            raise ValueError(
                "accumulate: the gradients are not a tree like the parameters that "
                f"init was given: {error}"
            ) from None
        key = step_key(self.seed, state.gradient_step * self.steps + state.mini_step)
        rows = zip(tree.names, tree.leaves, acc, self._places(tree).state, strict=True)
        kept = [self._mean(state.mini_step, key, *row) for row in rows]
        as_they_are = hasattr(self.inner, "step")  # Octavo's take any type of gradient
        means = [
            g if not _adds(a) else m if as_they_are else m.astype(g.dtype)
            for g, m, a in zip(tree.leaves, kept, acc, strict=True)
        ]
        return tree.replaced(means), tree.replaced(kept)

    def _mean(
        self,
        count: jax.Array,
        key: jax.Array,
        path: str,
        g: Any,
        acc: jax.Array,
        sharding: NamedSharding | None,
    ) -> jax.Array:
        """Of one leaf, with one gradient more."""
        if not _adds(acc):
            return acc
        wide = jnp.float32 if acc.dtype == jnp.bfloat16 else acc.dtype
        if sharding is not None:
            g = resharded(jnp.asarray(g), sharding)
        # What is left of the last step counts for nothing, an infinity neither.
        old = jnp.where(count == 0, jnp.zeros((), wide), acc.astype(wide))
        mean = old + (g.astype(wide) - old) / (count + 1).astype(wide)
        if acc.dtype == jnp.bfloat16:
            mean = unbiased(mean, acc.dtype, key, int(leaf_number(path)))
        return constrained(mean, sharding)

    def _dtype(self, p: Any) -> Any:
        """Of the gradients of a parameter."""
        own = jnp.result_type(p)
        short = jnp.issubdtype(own, jnp.floating) and own.itemsize <= 4
        return self.dtype if short else own

    def _places(self, tree: Leaves) -> Places:
        """Where the optimizer has parameters and states, as far as it is known."""
        settings = getattr(getattr(self.inner, "optimizer", None), "settings", None)
        sharding = getattr(settings, "sharding", None)
        return places(sharding, getattr(settings, "state_sharding", None), tree)


def _adds(acc: jax.Array) -> bool:
    """Whether gradients are numbers that add up: those of integers are not."""
    return jnp.issubdtype(acc.dtype, jnp.inexact)


class Accumulated(optax.GradientTransformationExtraArgs):
    """An optimizer that steps once in so many calls; `accumulate` makes it.

    Attributes:
      init: `init(params) -> state`.
      update: `update(grads, state, params) -> (updates, state)`, as in optax.
      accumulator: the optimizer, and how gradients are averaged for it.
    """

    accumulator: Accumulator

    def __new__(cls, accumulator: Accumulator) -> "Accumulated":
        made = super().__new__(cls, accumulator.init, accumulator.update)  # type: ignore
        made.accumulator = accumulator
        return made

    @property
    def inner(self) -> optax.GradientTransformationExtraArgs:
        """The optimizer that steps."""
        return self.accumulator.inner

    def step(
        self, grads: Any, state: Any, params: Any, **extra_args: Any
    ) -> tuple[Any, Any]:
        """One more gradient; after the last of a step, the optimizer's own `step`.

        Otherwise parameters and the optimizer's state stay as they are, in place.

        Args:
          grads: tree like params, of one micro-batch.
          state: what `init` or the last call returned.
          params: the parameters.
          **extra_args: passed on to the optimizer.

        Returns:
          The parameters and the new state.
        """
        return self.accumulator.step(grads, state, params, **extra_args)

    def bind(self, params: Any) -> "Accumulated":
        """With the optimizer bound to parameters: see `Transformation.bind`."""
        inner: Any = self.inner
        return Accumulated(replace(self.accumulator, inner=inner.bind(params)))


def accumulate(
    tx: optax.GradientTransformation,
    steps: int,
    *,
    dtype: Any = jnp.float32,
    seed: int = 0,
) -> Accumulated:
    """Average the gradients of micro-batches, and step once with their mean.

        mean = mean + (g - mean) / (n + 1)    for the gradients n = 0 .. steps - 1

    In float32 that is what `optax.MultiSteps` does, bit for bit; but that computes a
    step with each gradient and throws it away, and holds the old state beside the new.
    In bfloat16 the mean is rounded up or down at random in proportion, so that what it
    loses with one gradient it gains with another.

    4 bytes per parameter, 2 in bfloat16, beside the optimizer's state and sharded like
    it.

    Args:
      tx: an Octavo optimizer, or any optax transformation.
      steps: gradients in a step, at least 1.
      dtype: of the mean: float32 (default) or bfloat16.
      seed: of the rounding in bfloat16. Default 0.

    Returns:
      The transformation, with a `step` as Octavo's optimizers have; where `tx` has
      none, it is its `update` and `optax.apply_updates`.

    Raises:
      ValueError: for another number of steps or another type.

    >>> import jax.numpy as jnp
    >>> from octavo import optim
    >>> tx = optim.accumulate(optim.sgd(1.0), steps=2)
    >>> params = jnp.zeros(2)
    >>> state = tx.init(params)
    >>> for g in (jnp.array([1.0, 2.0]), jnp.array([3.0, 2.0])):
    ...     params, state = tx.step(g, state, params)
    ...     print(params)
    [0. 0.]
    [-2. -2.]
    """
    check_int("steps", steps)
    if steps < 1:
        raise ValueError(f"steps={steps} must be 1 or more")
    if jnp.dtype(dtype).name not in _DTYPES:
        raise ValueError(f"dtype={dtype} must be {' or '.join(_DTYPES)}")
    check_int("seed", seed)
    inner = optax.with_extra_args_support(tx)
    return Accumulated(Accumulator(inner, steps, jnp.dtype(dtype), seed))
