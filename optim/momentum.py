"""Momentum, the part that SGD, LARS and RMSprop share."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from octavo.pallas_kernels import Rule, Slot, Tiles

from .checks import check_fraction, is_traced


@dataclass(frozen=True)
class MomentumNumbers:
    """Hyperparameters."""

    momentum: Any
    dampening: Any = 0.0

    def __post_init__(self) -> None:
        check_fraction(momentum=self.momentum, dampening=self.dampening)


class MomentumScalars(NamedTuple):
    """What `heavy_ball` and `nesterov_ball` take."""

    momentum: jax.Array
    rate: jax.Array
    weight: jax.Array


def momentum_scalars(
    t: jax.Array, learning_rate: jax.Array, h: MomentumNumbers
) -> MomentumScalars:
    """Of a step, where the learning rate multiplies the momentum."""
    # The first gradient enters undampened, as in torch.
    weight = jnp.where(t > 1.0, 1.0 - jnp.asarray(h.dampening, jnp.float32), 1.0)
    momentum = jnp.asarray(h.momentum, jnp.float32)
    return MomentumScalars(momentum, jnp.ones_like(learning_rate), weight)


def scalars_rate_first(
    t: jax.Array, learning_rate: jax.Array, h: MomentumNumbers
) -> MomentumScalars:
    """Of a step, where it multiplies the gradients on their way into the momentum."""
    return momentum_scalars(t, learning_rate, h)._replace(rate=learning_rate)


def heavy_ball(
    g: jax.Array, slots: Tiles, s: MomentumScalars
) -> tuple[jax.Array, Tiles]:
    """Polyak's momentum."""
    (m,) = slots
    m = s.momentum * m + s.weight * (s.rate * g)
    return m, (m,)


def nesterov_ball(
    g: jax.Array, slots: Tiles, s: MomentumScalars
) -> tuple[jax.Array, Tiles]:
    """Nesterov's, as Sutskever et al. write it."""
    m, _ = heavy_ball(g, slots, s)
    return s.rate * g + s.momentum * m, (m,)


def is_absent(momentum: Any) -> bool:
    """Whether there is no momentum to keep: None or 0, and no array that may change."""
    return momentum is None or (isinstance(momentum, int | float) and momentum == 0)


def check_nesterov(nesterov: bool, momentum: Any, dampening: Any = 0.0) -> None:
    """Raise ValueError for numbers with which Nesterov's momentum is not defined."""
    dampened = not is_traced(dampening) and dampening != 0
    for name, value, wrong in (
        ("momentum", momentum, is_absent(momentum)),
        ("dampening", dampening, dampened),
    ):
        if nesterov and wrong:
            raise ValueError(
                f"nesterov=True with {name}={value}: it needs momentum above 0 and "
                "dampening 0"
            )


def trace_slot(rate_first: bool) -> Slot:
    """The momentum's. Optax multiplies by minus the rate on the way into it."""
    return Slot("trace", signed=True, in_optax="negated" if rate_first else "same")


def momentum_rule(nesterov: bool, rate_first: bool = False) -> Rule:
    """Gradient descent with momentum; `rate_first`: of gradients times their rate."""
    return Rule(
        slots=(trace_slot(rate_first),),
        scalars=scalars_rate_first if rate_first else momentum_scalars,
        direction=nesterov_ball if nesterov else heavy_ball,
        rate_first=rate_first,
    )
