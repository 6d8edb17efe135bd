"""Polynomial and linear decay, and the warmup that goes before."""

from dataclasses import InitVar, dataclass
from typing import cast

import jax
import jax.numpy as jnp

from .base import Schedule, require_shorter
from .domains import Count, Length, PositiveRate, Rate
from .shapes import anneal, ratio, warm

# None only until __post_init__, so that `total_iters` can stand in.
_NOT_GIVEN = cast(int, None)


@dataclass(frozen=True, repr=False)
class PolynomialLR(Schedule):
    """Linear warmup, then polynomial decay to ``end_lr``, then constant.

    With W = warmup_steps and T = total_steps::

        t < W:  warmup_init + (base_lr - warmup_init) t / W
        t >= W: end_lr + (base_lr - end_lr) (1 - min(t - W, T - W) / (T - W))^power

    so that lr(W) is base_lr and lr(T) is end_lr, exactly.

    Args:
        base_lr: rate at the end of the warmup, 0 or more.
        total_steps: steps to ``end_lr``, at least 1, the warmup included.
        power: above 0. 1 is a straight line, the usual choice; 0.5 stays high for
            longer, 2 falls sooner.
        end_lr: rate at ``total_steps`` and after; 0 or more.
        warmup_steps: below ``total_steps``; 0 for none.
        warmup_init: rate at step 0 of a warmup, 0 or more.
        total_iters: another name for ``total_steps``, as torch has it.

    Raises:
        ValueError: a field out of its range, neither of the two names for the
            length or both with different values, a warmup as long as the total.

    Example:
        >>> from octavo import schedules
        >>> lr = schedules.PolynomialLR(2e-3, total_steps=10_000, warmup_steps=1_000)
        >>> [round(float(lr(step)), 6) for step in (0, 500, 1_000, 5_500, 10_000)]
        [0.0, 0.001, 0.002, 0.001, 0.0]
    """

    base_lr: Rate
    total_steps: Length = _NOT_GIVEN
    power: PositiveRate = 1.0
    end_lr: Rate = 0.0
    warmup_steps: Count = 0
    warmup_init: Rate = 0.0
    total_iters: InitVar[int | None] = None

    def __post_init__(self, total_iters: int | None) -> None:
        if total_iters is not None and self.total_steps not in (None, total_iters):
            self.refuse("total_steps", f"and total_iters={total_iters!r}; write one")
        if total_iters is not None:
            object.__setattr__(self, "total_steps", total_iters)
        super().__post_init__()
        # An InitVar reads as its default otherwise: a silent None.
        object.__setattr__(self, "total_iters", self.total_steps)

    def check(self) -> None:
        require_shorter(self, "warmup_steps", self.warmup_steps, self.total_steps)

    def rate(self, count: jax.Array) -> jax.Array:
        length = self.total_steps - self.warmup_steps
        left = length - jnp.clip(count - self.warmup_steps, 0, length)
        fall = _power(ratio(left, length), self.power)
        decay = self.base_lr * fall + self.end_lr * (1.0 - fall)
        return warm(count, self.warmup_steps, self.warmup_init, self.base_lr, decay)


@dataclass(frozen=True, repr=False)
class LinearLR(Schedule):
    """A factor that moves in a straight line, as in torch::

        base_lr (start_factor + (end_factor - start_factor) min(t, T) / T)

    with T = total_iters.

    Args:
        base_lr: the rate that the factors multiply, 0 or more.
        start_factor: factor at step 0, 0 or more; torch's default of 1/3.
        end_factor: factor at ``total_iters`` and after, 0 or more.
        total_iters: steps from one to the other, at least 1.

    Raises:
        ValueError: a field out of its range.

    Example:
        >>> from octavo import schedules
        >>> lr = schedules.LinearLR(0.1, start_factor=0.5, total_iters=4)
        >>> [round(float(lr(step)), 4) for step in (0, 2, 4, 9)]
        [0.05, 0.075, 0.1, 0.1]
    """

    base_lr: Rate
    start_factor: Rate = 1.0 / 3.0
    end_factor: Rate = 1.0
    total_iters: Length = 5

    def rate(self, count: jax.Array) -> jax.Array:
        start, end = self.base_lr * self.start_factor, self.base_lr * self.end_factor
        return anneal(start, end, count, self.total_iters)


def _power(base: jax.Array, exponent: float) -> jax.Array:
    # Whole powers become products, which round less than exp(p log(x)).
    whole = exponent.is_integer() and exponent <= 8
    return jnp.power(base, int(exponent) if whole else exponent)
