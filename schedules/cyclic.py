"""Rates that rise before they fall: triangles without end, and one big cycle."""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Literal

import jax
import jax.numpy as jnp

from .base import Schedule
from .domains import (
    LAST_STEP,
    Choice,
    Fraction,
    Length,
    Maybe,
    PositiveRate,
    Rate,
    Switch,
    Whole,
)
from .shapes import cosine, power, ratio, to_f32

CycleMode = Literal["triangular", "triangular2", "exp_range"]
AnnealStrategy = Literal["cos", "linear"]
Strategy = Annotated[AnnealStrategy, Choice(("cos", "linear"))]


@dataclass(frozen=True, repr=False)
class CyclicLR(Schedule):
    """Triangles between two rates, as in torch::

        base_lr + (max_lr - base_lr) h s

    where h is p / up for the first ``up`` steps of a cycle and (up + down - p) / down
    for the others, p = t mod (up + down), and s is 1 in mode "triangular",
    2^-floor(t / (up + down)) in "triangular2" and gamma^t in "exp_range".
    From https://arxiv.org/abs/1506.01186.

    Args:
        base_lr: rate at the foot, 0 or more.
        max_lr: rate at the first peak, 0 or more.
        step_size_up: steps from foot to peak, at least 1.
        step_size_down: steps from peak to foot; None for as many.
        mode: what becomes of later peaks.
        gamma: factor per step in mode "exp_range", 0 or more.

    Raises:
        ValueError: a field out of its range, an unknown mode.

    Example:
        >>> from octavo import schedules
        >>> lr = schedules.CyclicLR(0.1, 0.5, step_size_up=10, step_size_down=20)
        >>> [round(float(lr(step)), 4) for step in (0, 10, 20, 30, 40)]
        [0.1, 0.5, 0.3, 0.1, 0.5]
    """

    base_lr: Rate
    max_lr: Rate
    step_size_up: Length = 2000
    step_size_down: Annotated[int | None, Maybe(Whole(1))] = None
    mode: Annotated[CycleMode, Choice(("triangular", "triangular2", "exp_range"))] = (
        "triangular"
    )
    gamma: Rate = 1.0

    @property
    def _down(self) -> int:
        return self.step_size_down or self.step_size_up

    def check(self) -> None:
        if self.step_size_up + self._down > LAST_STEP:
            self.refuse("step_size_up", f"makes a cycle of over {LAST_STEP} steps")

    def rate(self, count: jax.Array) -> jax.Array:
        up, down = self.step_size_up, self._down
        place, cycle = count % (up + down), count // (up + down)
        falling = ratio(up + down - place, down)
        height = jnp.where(place <= up, ratio(place, up), falling)
        if self.mode == "triangular2":
            height *= power(0.5, cycle)
        elif self.mode == "exp_range":
            height *= power(self.gamma, count)
        return self.base_lr * (1.0 - height) + self.max_lr * height


@dataclass(frozen=True, repr=False)
class OneCycleLR(Schedule):
    """Up to ``max_lr`` and down to almost nothing, as in torch. Two phases::

        max_lr / div_factor -> max_lr           at step pct_start total_steps - 1
        -> max_lr / div_factor / final_div_factor        at step total_steps - 1

    and three with ``three_phase``: from the peak back to the start in as many steps
    as the rise took, then the rest. A step between two ends takes the part p of the
    way, (1 - cos(pi p)) / 2 of it for "cos". From https://arxiv.org/abs/1708.07120.

    Args:
        max_lr: rate at the peak, 0 or more.
        total_steps: steps in all, at least 1: epochs times steps per epoch.
        pct_start: the rise's share of the steps, 0 to 1, to 0.5 for three phases.
        anneal_strategy: "cos" or "linear".
        div_factor: the peak over the rate at step 0, above 0.
        final_div_factor: the rate at step 0 over the last one, above 0.
        three_phase: see above.

    Raises:
        ValueError: a field out of its range, an unknown strategy.

    Example:
        >>> from octavo import schedules
        >>> lr = schedules.OneCycleLR(0.1, total_steps=100, div_factor=10.0)
        >>> [round(float(lr(step)), 4) for step in (0, 29, 64, 99, 1000)]
        [0.01, 0.1, 0.05, 0.0, 0.0]
    """

    max_lr: Rate
    total_steps: Length
    pct_start: Fraction = 0.3
    anneal_strategy: Strategy = "cos"
    div_factor: PositiveRate = 25.0
    final_div_factor: PositiveRate = 1e4
    three_phase: Switch = False

    def check(self) -> None:
        if self.three_phase and self.pct_start > 0.5:
            self.refuse("pct_start", "must be at most 0.5 with three_phase=True")

    def rate(self, count: jax.Array) -> jax.Array:
        count = jnp.minimum(count, self.total_steps - 1)
        *early, last = self._phases()
        result = self._part(count, *last)
        for phase in reversed(early):
            end = phase[1]
            result = jnp.where(
                count <= math.floor(end), self._part(count, *phase), result
            )
        return result

    def _phases(self) -> list[tuple[float, float, float, float]]:
        """(first step, last step, first rate, last rate); steps may be fractions."""
        start = self.max_lr / self.div_factor
        peak = self.pct_start * self.total_steps - 1
        knots = [(0.0, start), (peak, self.max_lr)]
        if self.three_phase:
            knots.append((2 * peak, start))
        knots.append((self.total_steps - 1.0, start / self.final_div_factor))
        phases = [(*times, *rates) for times, rates in map(_columns, pairwise(knots))]
        # A peak at step 0, or at the last one, leaves a phase without length.
        long = [phase for phase in phases if phase[1] > phase[0]]
        return long or [(-1.0, 0.0, self.max_lr, self.max_lr)]

    def _part(
        self, count: jax.Array, begin: float, end: float, start: float, stop: float
    ) -> jax.Array:
        done, left, length = _since(count, begin), -_since(count, end), end - begin
        rise = cosine if self.anneal_strategy == "cos" else ratio
        return start * rise(left, length) + stop * rise(done, length)


def _columns(
    knots: tuple[tuple[float, float], tuple[float, float]],
) -> tuple[tuple[float, float], tuple[float, float]]:
    (begin, start), (end, stop) = knots
    return (begin, end), (start, stop)


def _since(count: jax.Array, time: float) -> jax.Array:
    """``count - time``, whole numbers first so that only the fraction rounds."""
    whole = math.floor(time)
    return to_f32(count - whole) - (time - whole)
