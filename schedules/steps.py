"""Rates that change in jumps."""

import itertools
import operator
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from .base import Schedule
from .domains import Count, Length, Milestones, Rate, Rates
from .shapes import lookup, passed, power


@dataclass(frozen=True, repr=False)
class ConstantLR(Schedule):
    """A constant, after ``total_iters`` steps at a fraction of it, as in torch::

        base_lr factor   for t < total_iters
        base_lr          after

    Args:
        base_lr: the constant, 0 or more.
        factor: 0 or more; torch's default of 1/3.
        total_iters: steps at the fraction; 0 for a plain constant.

    Raises:
        ValueError: a field out of its range.

    Example:
        >>> from octavo import schedules
        >>> lr = schedules.ConstantLR(0.1, factor=0.5, total_iters=2)
        >>> [round(float(lr(step)), 4) for step in (0, 1, 2)]
        [0.05, 0.05, 0.1]
    """

    base_lr: Rate
    factor: Rate = 1.0 / 3.0
    total_iters: Count = 5

    def rate(self, count: jax.Array) -> jax.Array:
        reduced = self.base_lr * self.factor
        return jnp.where(count < self.total_iters, reduced, self.base_lr)


@dataclass(frozen=True, repr=False)
class StepLR(Schedule):
    """Multiplied by ``gamma`` every ``step_size`` steps, as in torch::

        base_lr gamma^floor(t / step_size)

    Args:
        base_lr: rate before the first jump, 0 or more.
        step_size: steps between jumps, at least 1.
        gamma: factor of each jump, 0 or more; torch's default of 0.1.

    Raises:
        ValueError: a field out of its range.

    Example:
        >>> from octavo import schedules
        >>> lr = schedules.StepLR(0.1, step_size=30)
        >>> [round(float(lr(step)), 4) for step in (29, 30, 60)]
        [0.1, 0.01, 0.001]
    """

    base_lr: Rate
    step_size: Length
    gamma: Rate = 0.1

    def rate(self, count: jax.Array) -> jax.Array:
        return self.base_lr * power(self.gamma, count // self.step_size)


@dataclass(frozen=True, repr=False)
class MultiStepLR(Schedule):
    """Multiplied by ``gamma`` at each milestone, as in torch::

        base_lr gamma^n,   n = how many milestones are <= t

    Args:
        base_lr: rate before the first milestone, 0 or more.
        milestones: steps at which to jump, from 1, increasing.
        gamma: factor of each jump, 0 or more; torch's default of 0.1.

    Raises:
        ValueError: a field out of its range, milestones that do not increase.

    Example:
        >>> from octavo import schedules
        >>> lr = schedules.MultiStepLR(0.1, milestones=[30, 80])
        >>> [round(float(lr(step)), 4) for step in (29, 30, 80)]
        [0.1, 0.01, 0.001]
    """

    base_lr: Rate
    milestones: Milestones
    gamma: Rate = 0.1

    def rate(self, count: jax.Array) -> jax.Array:
        levels = [self.base_lr * self.gamma**n for n in range(len(self.milestones) + 1)]
        return lookup(levels, passed(self.milestones, count))


@dataclass(frozen=True, repr=False)
class PiecewiseConstantLR(Schedule):
    """The rates themselves, one for each stretch between boundaries::

        values[n],   n = how many boundaries are <= t

    Args:
        boundaries: steps at which the next value starts, from 1, increasing.
        values: rates, 0 or more, one more than there are boundaries.

    Raises:
        ValueError: a field out of its range, boundaries that do not increase, a
            number of values that does not fit.

    Example:
        >>> from octavo import schedules
        >>> lr = schedules.PiecewiseConstantLR([10, 20], values=[0.1, 0.5, 0.02])
        >>> [round(float(lr(step)), 4) for step in (9, 10, 20)]
        [0.1, 0.5, 0.02]
    """

    boundaries: Milestones
    values: Rates

    def check(self) -> None:
        if len(self.values) != len(self.boundaries) + 1:
            self.refuse(
                "values",
                f"must have one item more than boundaries={self.boundaries!r}",
            )

    def rate(self, count: jax.Array) -> jax.Array:
        return lookup(self.values, passed(self.boundaries, count))


@dataclass(frozen=True, repr=False)
class MultiplicativeLR(Schedule):
    """Multiplied at each step by a factor of its own, as in torch::

        base_lr factors[0] factors[1] ... factors[t - 1]

    and constant once the factors are used up. torch takes a function instead;
    ``from_function`` tabulates one, which keeps the schedule without state.

    Args:
        base_lr: rate at step 0, 0 or more.
        factors: the factor of step 1, of step 2 and so on, 0 or more. They become
            a table of as many f32 numbers in the compiled step.

    Raises:
        ValueError: a field out of its range, no factors.

    Example:
        >>> from octavo import schedules
        >>> lr = schedules.MultiplicativeLR(0.1, factors=[0.5, 0.5, 2.0])
        >>> [round(float(lr(step)), 4) for step in (0, 1, 2, 3, 9)]
        [0.1, 0.05, 0.025, 0.05, 0.05]
    """

    base_lr: Rate
    factors: Rates

    @classmethod
    def from_function(
        cls, base_lr: float, lr_lambda: Callable[[int], float], total_steps: int
    ) -> "MultiplicativeLR":
        """The schedule of torch's ``lr_lambda``, called for 1 to ``total_steps``.

        Example:
            >>> from octavo import schedules
            >>> schedules.MultiplicativeLR.from_function(0.1, lambda step: 0.95, 3)
            MultiplicativeLR(base_lr=0.1, factors=[0.95, 0.95, 0.95])
        """
        return cls(base_lr, tuple(lr_lambda(t) for t in range(1, total_steps + 1)))

    def rate(self, count: jax.Array) -> jax.Array:
        # Multiplied in f64 here, so that thousands of factors round only once.
        levels = itertools.accumulate(self.factors, operator.mul, initial=self.base_lr)
        return lookup(tuple(levels), jnp.minimum(count, len(self.factors)))
