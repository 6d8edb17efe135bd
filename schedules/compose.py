"""Schedules made of schedules, and the last stretch before averaging weights."""

import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import jax
import jax.numpy as jnp
import optax

from .base import Schedule
from .cyclic import Strategy
from .domains import Count, Milestones, Rate, Row
from .shapes import anneal, cosine, ratio


def _as_schedule(value: object) -> Schedule:
    if isinstance(value, Schedule):
        return value
    raise ValueError(
        f"is {value!r}, which is not a schedule of octavo.schedules; other "
        "functions of the step combine in optax.join_schedules"
    )


@dataclass(frozen=True, repr=False)
class SequentialLR(Schedule):
    """One schedule after another, each from its own step 0, as in torch::

        schedules[n](t - m_n),   m_n = the last milestone <= t, 0 before the first

    Args:
        schedules: at least two.
        milestones: the step at which each but the first starts, from 1, increasing.

    Raises:
        ValueError: something that is not a schedule, milestones that do not
            increase, a number of milestones that does not fit.

    Example:
        >>> from octavo import schedules
        >>> lr = schedules.SequentialLR(
        ...     [schedules.WarmupLR(0.1, 10), schedules.StepLR(0.1, 5)], milestones=[10]
        ... )
        >>> [round(float(lr(step)), 4) for step in (5, 10, 14, 15)]
        [0.05, 0.1, 0.1, 0.01]
    """

    schedules: Annotated[tuple[Schedule, ...], Row(_as_schedule, least=2)]
    milestones: Milestones

    def check(self) -> None:
        if len(self.milestones) != len(self.schedules) - 1:
            self.refuse(
                "milestones",
                f"must have one item less than the {len(self.schedules)} schedules",
            )

    def rate(self, count: jax.Array) -> jax.Array:
        parts = [_from_zero(schedule) for schedule in self.schedules]
        return jnp.asarray(optax.join_schedules(parts, self.milestones)(count))


@dataclass(frozen=True, repr=False)
class ChainedLR(Schedule):
    """The product of schedules, as torch's ChainedScheduler multiplies factors::

        schedules[0](t) schedules[1](t) ...

    torch's schedulers share one base rate; here each has its own, so give it to one
    of them and ``base_lr=1.0`` to the others.

    Args:
        schedules: at least one.

    Raises:
        ValueError: something that is not a schedule.

    Example:
        >>> from octavo import schedules
        >>> lr = schedules.ChainedLR(
        ...     [schedules.ExponentialLR(0.1, gamma=0.5), schedules.WarmupLR(1.0, 2)]
        ... )
        >>> [round(float(lr(step)), 4) for step in (0, 1, 2, 3)]
        [0.0, 0.025, 0.025, 0.0125]
    """

    schedules: Annotated[tuple[Schedule, ...], Row(_as_schedule)]

    def rate(self, count: jax.Array) -> jax.Array:
        rates = [schedule.rate(count) for schedule in self.schedules]
        return functools.reduce(operator.mul, rates)


@dataclass(frozen=True, repr=False)
class SWALR(Schedule):
    """From ``base_lr`` to the constant rate under which weights are averaged::

        base_lr (1 - f(p)) + swa_lr f(p),   p = min(t / anneal_epochs, 1)
        f(p) = (1 - cos(pi p)) / 2 for "cos", p for "linear"

    as in torch. Put it last in a ``SequentialLR``. From
    https://arxiv.org/abs/1803.05407.

    Args:
        base_lr: rate that training had reached, 0 or more.
        swa_lr: rate while averaging, 0 or more.
        anneal_epochs: steps from one to the other, called as in torch; 0 for a jump.
        anneal_strategy: "cos" or "linear".

    Raises:
        ValueError: a field out of its range, an unknown strategy.

    Example:
        >>> from octavo import schedules
        >>> lr = schedules.SWALR(0.1, swa_lr=0.5, anneal_epochs=4)
        >>> [round(float(lr(step)), 4) for step in (0, 2, 4, 9)]
        [0.1, 0.3, 0.5, 0.5]
    """

    base_lr: Rate
    swa_lr: Rate
    anneal_epochs: Count = 10
    anneal_strategy: Strategy = "cos"

    def rate(self, count: jax.Array) -> jax.Array:
        if self.anneal_epochs == 0:
            return jnp.full_like(count, self.swa_lr, dtype=jnp.float32)
        rise = cosine if self.anneal_strategy == "cos" else ratio
        return anneal(self.base_lr, self.swa_lr, count, self.anneal_epochs, rise)


def _from_zero(schedule: Schedule) -> Callable[[jax.typing.ArrayLike], jax.Array]:
    # join_schedules evaluates every part at every step, before its start as well.
    return lambda count: schedule.rate(jnp.maximum(count, 0))
