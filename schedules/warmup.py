"""Warmup, then a constant, a cosine, a plateau with a cooldown, or 1 / sqrt(t)."""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import jax
import jax.numpy as jnp

from .base import Schedule, require_shorter
from .domains import Choice, Count, Length, Maybe, PositiveRate, Rate, Whole
from .shapes import anneal, cosine, ratio, to_f32, warm

Cooldown = Literal["linear", "cosine", "1-sqrt"]

# Hugging Face's choice where there is no warmup to take the scale from.
_DEFAULT_TIMESCALE = 10_000


@dataclass(frozen=True, repr=False)
class WarmupLR(Schedule):
    """A straight line to ``base_lr``, then constant::

        warmup_init + (base_lr - warmup_init) min(t / warmup_steps, 1)

    Args:
        base_lr: rate from ``warmup_steps`` on, 0 or more.
        warmup_steps: steps of the line; 0 for none.
        warmup_init: rate at step 0, 0 or more.

    Raises:
        ValueError: a field out of its range.

    Example:
        >>> from octavo import schedules
        >>> lr = schedules.WarmupLR(0.1, warmup_steps=4)
        >>> [round(float(lr(step)), 4) for step in (0, 1, 4, 9)]
        [0.0, 0.025, 0.1, 0.1]
    """

    base_lr: Rate
    warmup_steps: Count
    warmup_init: Rate = 0.0

    def rate(self, count: jax.Array) -> jax.Array:
        peak = jnp.full_like(count, self.base_lr, dtype=jnp.float32)
        return warm(count, self.warmup_steps, self.warmup_init, self.base_lr, peak)


@dataclass(frozen=True, repr=False)
class WarmupCosineLR(Schedule):
    """Linear warmup, then cosines to ``end_lr``, then constant.

    With W = warmup_steps and T = total_steps, from step W on::

        end_lr + (base_lr - end_lr) (1 + cos(2 pi num_cycles p)) / 2
        p = min(t - W, T - W) / (T - W)

    Args:
        base_lr: rate at the end of the warmup, 0 or more.
        total_steps: steps in all, at least 1, the warmup included.
        warmup_steps: below ``total_steps``; 0 for none.
        warmup_init: rate at step 0 of a warmup, 0 or more.
        end_lr: rate at the bottom, 0 or more.
        num_cycles: whole waves after the warmup, above 0. The default of 0.5 is one
            descent, after which the rate is ``end_lr`` exactly.

    Raises:
        ValueError: a field out of its range, a warmup as long as the total.

    Example:
        >>> from octavo import schedules
        >>> lr = schedules.WarmupCosineLR(0.1, total_steps=30, warmup_steps=10)
        >>> [round(float(lr(step)), 4) for step in (0, 5, 10, 20, 30)]
        [0.0, 0.05, 0.1, 0.05, 0.0]
    """

    base_lr: Rate
    total_steps: Length
    warmup_steps: Count = 0
    warmup_init: Rate = 0.0
    end_lr: Rate = 0.0
    num_cycles: PositiveRate = 0.5

    def check(self) -> None:
        require_shorter(self, "warmup_steps", self.warmup_steps, self.total_steps)

    def rate(self, count: jax.Array) -> jax.Array:
        length = self.total_steps - self.warmup_steps
        done = jnp.clip(count - self.warmup_steps, 0, length)
        fall, rise = _waves(done, length, self.num_cycles)
        wave = self.base_lr * fall + self.end_lr * rise
        return warm(count, self.warmup_steps, self.warmup_init, self.base_lr, wave)


@dataclass(frozen=True, repr=False)
class WarmupStableDecayLR(Schedule):
    """Linear warmup, a long constant, and a cooldown over the last steps (WSD).

    With p the part of the cooldown done, from 0 to 1::

        end_lr + (base_lr - end_lr) f(p)
        f = 1 - p  |  (1 + cos(pi p)) / 2  |  1 - sqrt(p)

    From https://arxiv.org/abs/2404.06395; "1-sqrt" from
    https://arxiv.org/abs/2405.18392, where it beat the others.

    Args:
        base_lr: the constant, 0 or more.
        total_steps: steps in all, at least 1, warmup and cooldown included.
        decay_steps: steps of the cooldown, at least 1; a tenth or a fifth of all.
        warmup_steps: 0 for none.
        warmup_init: rate at step 0 of a warmup, 0 or more.
        end_lr: rate at ``total_steps`` and after, 0 or more.
        decay: "linear", "cosine" or "1-sqrt".

    Raises:
        ValueError: a field out of its range, more warmup and cooldown than steps.

    Example:
        >>> from octavo import schedules
        >>> lr = schedules.WarmupStableDecayLR(0.1, 100, 20, warmup_steps=10)
        >>> [round(float(lr(step)), 4) for step in (5, 10, 80, 90, 100)]
        [0.05, 0.1, 0.1, 0.05, 0.0]
    """

    base_lr: Rate
    total_steps: Length
    decay_steps: Length
    warmup_steps: Count = 0
    warmup_init: Rate = 0.0
    end_lr: Rate = 0.0
    decay: Annotated[Cooldown, Choice(("linear", "cosine", "1-sqrt"))] = "linear"

    def check(self) -> None:
        require_shorter(self, "warmup_steps", self.warmup_steps, self.total_steps)
        room = self.total_steps - self.warmup_steps
        if self.decay_steps > room:
            self.refuse(
                "decay_steps",
                f"must be at most {room}, what total_steps={self.total_steps} "
                f"leaves after warmup_steps={self.warmup_steps}",
            )

    def rate(self, count: jax.Array) -> jax.Array:
        length = self.decay_steps
        done = jnp.clip(count - (self.total_steps - length), 0, length)
        if self.decay == "1-sqrt":
            root = jnp.sqrt(ratio(done, length))
            # 1 - sqrt(p) without the cancellation near the end.
            fall = ratio(length - done, length) / (1.0 + root)
            cooled = self.base_lr * fall + self.end_lr * root
        else:
            rise = cosine if self.decay == "cosine" else ratio
            cooled = anneal(self.base_lr, self.end_lr, done, length, rise)
        return warm(count, self.warmup_steps, self.warmup_init, self.base_lr, cooled)


@dataclass(frozen=True, repr=False)
class InverseSqrtLR(Schedule):
    """Linear warmup, then 1 / sqrt(t), without an end.

    With W = warmup_steps and S = timescale, from step W on::

        base_lr sqrt(S / (t - W + S))

    which for S = W is the schedule of https://arxiv.org/abs/1706.03762, section 5.3.

    Args:
        base_lr: rate at the end of the warmup, 0 or more.
        warmup_steps: 0 for none.
        timescale: steps after which the rate has fallen to 0.71 of ``base_lr``;
            None for ``warmup_steps``, or 10,000 without a warmup.
        warmup_init: rate at step 0 of a warmup, 0 or more.

    Raises:
        ValueError: a field out of its range.

    Example:
        >>> from octavo import schedules
        >>> lr = schedules.InverseSqrtLR(0.1, warmup_steps=100)
        >>> [round(float(lr(step)), 4) for step in (0, 50, 100, 400, 10_000)]
        [0.0, 0.05, 0.1, 0.05, 0.01]
    """

    base_lr: Rate
    warmup_steps: Count
    timescale: Annotated[int | None, Maybe(Whole(1))] = None
    warmup_init: Rate = 0.0

    def rate(self, count: jax.Array) -> jax.Array:
        scale = float(self.timescale or self.warmup_steps or _DEFAULT_TIMESCALE)
        since = to_f32(jnp.maximum(count - self.warmup_steps, 0))
        decay = self.base_lr * jnp.sqrt(ratio(scale, since + scale))
        return warm(count, self.warmup_steps, self.warmup_init, self.base_lr, decay)


def _waves(done: jax.Array, length: int, cycles: float) -> tuple[jax.Array, jax.Array]:
    """cos^2 and sin^2 of ``pi cycles done / length``, measured from the nearer end.

    From the far end the angle is ``turn - angle``; the sum formulas keep the small
    angle whole, and for half cycles they are exact.
    """
    turn = math.pi * (cycles % 1.0)
    far = (0.0, 1.0) if cycles % 1.0 == 0.5 else (math.cos(turn), math.sin(turn))
    late = done > length - done
    angle = (math.pi * cycles) * ratio(jnp.where(late, length - done, done), length)
    cos, sin = jnp.where(late, far[0], 1.0), jnp.where(late, far[1], 0.0)
    fall = (cos * jnp.cos(angle) + sin * jnp.sin(angle)) ** 2
    rise = (sin * jnp.cos(angle) - cos * jnp.sin(angle)) ** 2
    return fall, rise
