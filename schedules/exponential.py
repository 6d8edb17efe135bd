"""Rates that lose a constant share per step."""

from dataclasses import dataclass
from typing import Annotated

import jax
import jax.numpy as jnp

from .base import Schedule
from .domains import Count, Length, Maybe, PositiveRate, Rate, Real, Switch
from .shapes import power


@dataclass(frozen=True, repr=False)
class ExponentialLR(Schedule):
    """Multiplied by ``gamma`` at every step, as in torch::

        base_lr gamma^t

    Args:
        base_lr: rate at step 0, 0 or more.
        gamma: factor of each step, 0 or more; usually just below 1.

    Raises:
        ValueError: a field out of its range.

    Example:
        >>> from octavo import schedules
        >>> lr = schedules.ExponentialLR(0.1, gamma=0.5)
        >>> [round(float(lr(step)), 4) for step in (0, 1, 2)]
        [0.1, 0.05, 0.025]
    """

    base_lr: Rate
    gamma: Rate

    def rate(self, count: jax.Array) -> jax.Array:
        return self.base_lr * power(self.gamma, count)


@dataclass(frozen=True, repr=False)
class ExponentialDecayLR(Schedule):
    """Multiplied by ``decay_rate`` over every ``decay_steps`` steps::

        base_lr decay_rate^((t - transition_begin) / decay_steps)

    constant before ``transition_begin``, and not past ``end_value``.

    Args:
        base_lr: rate at the start, 0 or more.
        decay_steps: steps that ``decay_rate`` stands for, at least 1.
        decay_rate: factor of that many steps, above 0.
        transition_begin: steps before the decay starts.
        staircase: True to jump once per ``decay_steps`` rather than slide.
        end_value: lowest rate, or the highest for a ``decay_rate`` above 1; None
            for no limit.

    Raises:
        ValueError: a field out of its range.

    Example:
        >>> from octavo import schedules
        >>> lr = schedules.ExponentialDecayLR(0.1, 10, 0.25, end_value=0.01)
        >>> [round(float(lr(step)), 4) for step in (0, 5, 10, 100)]
        [0.1, 0.05, 0.025, 0.01]
    """

    base_lr: Rate
    decay_steps: Length = 1000
    decay_rate: PositiveRate = 0.96
    transition_begin: Count = 0
    staircase: Switch = False
    end_value: Annotated[float | None, Maybe(Real())] = None

    def rate(self, count: jax.Array) -> jax.Array:
        done = jnp.maximum(count - self.transition_begin, 0)
        if self.staircase:
            factor = power(self.decay_rate, done // self.decay_steps)
        else:
            factor = power(self.decay_rate, done, per=self.decay_steps)
        rate = self.base_lr * factor
        if self.end_value is None:
            return rate
        limit = jnp.maximum if self.decay_rate < 1.0 else jnp.minimum
        return limit(rate, self.end_value)
