"""Half cosines: one, a wave of them, and ever longer ones."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from .base import Schedule
from .domains import LAST_STEP, Length, Rate, Switch
from .shapes import Span, anneal, cosine, lookup, passed, to_f32


@dataclass(frozen=True, repr=False)
class CosineAnnealingLR(Schedule):
    """Half a cosine down to ``eta_min``, and back up, as in torch::

        eta_min + (base_lr - eta_min) (1 + cos(pi t / T_max)) / 2

    Args:
        base_lr: rate at step 0, 0 or more.
        T_max: steps from top to bottom, at least 1.
        eta_min: rate at the bottom, 0 or more.
        clamped: True to stay at the bottom from ``T_max`` on, as optax does and as
            training usually wants; False for torch's wave of period 2 T_max.

    Raises:
        ValueError: a field out of its range.

    Example:
        >>> from octavo import schedules
        >>> lr = schedules.CosineAnnealingLR(0.1, T_max=10)
        >>> [round(float(lr(step)), 4) for step in (0, 5, 10, 20)]
        [0.1, 0.05, 0.0, 0.1]
    """

    base_lr: Rate
    T_max: Length
    eta_min: Rate = 0.0
    clamped: Switch = False

    def rate(self, count: jax.Array) -> jax.Array:
        if not self.clamped:
            # count % (2 T_max) would overflow int32 for the longest waves.
            odd, place = (count // self.T_max) % 2, count % self.T_max
            count = jnp.where(odd == 1, self.T_max - place, place)
        return anneal(self.base_lr, self.eta_min, count, self.T_max, cosine)


@dataclass(frozen=True, repr=False)
class CosineAnnealingWarmRestarts(Schedule):
    """Half a cosine down, started afresh for ever, as in torch::

        eta_min + (base_lr - eta_min) (1 + cos(pi t_i / T_i)) / 2

    with T_i = T_0 T_mult^i the length of cycle i and t_i the steps since it began.
    From https://arxiv.org/abs/1608.03983, equation 5.

    Args:
        base_lr: rate at each restart, 0 or more.
        T_0: steps of the first cycle, at least 1.
        T_mult: how many times longer each cycle is than the last, at least 1.
        eta_min: rate that each cycle ends at, 0 or more.

    Raises:
        ValueError: a field out of its range.

    Example:
        >>> from octavo import schedules
        >>> lr = schedules.CosineAnnealingWarmRestarts(0.1, T_0=10, T_mult=2)
        >>> [round(float(lr(step)), 4) for step in (0, 5, 10, 20, 30)]
        [0.1, 0.05, 0.1, 0.05, 0.1]
    """

    base_lr: Rate
    T_0: Length
    T_mult: Length = 1
    eta_min: Rate = 0.0

    def rate(self, count: jax.Array) -> jax.Array:
        if self.T_mult == 1:
            return self._fall(count % self.T_0, self.T_0 - count % self.T_0, self.T_0)
        starts, lengths = self._cycles()
        cycle = passed(starts, count) - 1
        done = count - _int_table(starts)[cycle]
        # The last cycle may be longer than int32: what is over joins in f32.
        capped = [min(length, LAST_STEP) for length in lengths]
        over = [long - short for long, short in zip(lengths, capped, strict=True)]
        left = to_f32(_int_table(capped)[cycle] - done) + lookup(over, cycle)
        return self._fall(done, left, lookup(lengths, cycle))

    def _fall(self, done: jax.Array, left: jax.Array, length: Span) -> jax.Array:
        top, bottom = cosine(left, length), cosine(done, length)
        return self.base_lr * top + self.eta_min * bottom

    def _cycles(self) -> tuple[list[int], list[int]]:
        """First step and length of each cycle that an int32 count can reach."""
        starts, lengths = [0], [self.T_0]
        while starts[-1] + lengths[-1] <= LAST_STEP:
            starts.append(starts[-1] + lengths[-1])
            lengths.append(lengths[-1] * self.T_mult)
        return starts, lengths


def _int_table(values: list[int]) -> jax.Array:
    return jnp.asarray(np.asarray(values, np.int32))
