"""mulaw8, rounded at random where values are small alone: for orthogonal steps."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from ..rounding import NEAREST
from .base import Numbers
from .mulaw import MuLaw

_NEAR_ZERO = 2.0  # of twice y - 1: code 32, at 1/14.75 of the scale


@dataclass(frozen=True)
class Mixed8(MuLaw):
    """The codes of mulaw8, and nearer to m.

    Newton-Schulz brings all singular values to 1. Those of rounding errors, which are
    alike in all directions, are made as large where the momentum has small ones. So
    errors cost more here than in other steps, and those to the nearest are smaller.

    But to the nearest, what loses less than half a code in a step stalls beside a
    largest that stands still. Up to code 32 rounding is unbiased. Beyond it a code
    loses 16 (1 - b) of a code and more in a step, where the decay is b: enough up to
    .969. Codes and scales are read as mulaw8.
    """

    block_size = 128

    def encoded(
        self, x: jax.Array, block: Numbers, noise: jax.Array | int
    ) -> jax.Array:
        small = jnp.abs(x) * block[0] < _NEAR_ZERO
        return super().encoded(x, block, jnp.where(small, noise, NEAREST))
