"""Mu-law of two octaves: the default format of momentum that is made orthogonal."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from ..rounding import NEAREST
from .base import Numbers
from .mulaw import MuLaw

_NEAR_ZERO = 1.0  # of twice y - 1: code 32, at .17 of the scale


@dataclass(frozen=True)
class Even8(MuLaw):
    """m in steps that are nearly even, and rounded at random where m is small alone.

        y = 1 + 2.97 |m| / scale,                   scale >= the largest |m|
        |code| = (bits(y) - bits(1)) >> 17

    as in mulaw8, but with 64 steps in each of two octaves: 1/190 of the largest at
    zero, 1/95 at it. Newton-Schulz brings all singular values to 1, those of rounding
    errors as well, which are alike in all directions. So their sum counts, and that
    they are proportional to m does not. The sum is least in even steps that are rounded
    to the nearest.

    But a moment of small codes would stall so: of less than .5 / (1 - b) of them, where
    its decay is b and its block's largest stands still. Up to code 32 rounding is
    unbiased, which suffices for decays of up to .984. Beyond it, a code loses half a
    step and more.

    The scale is 2**-100 or more. 1 byte, and 2 / block_size for the scale, by default
    in blocks of 128: steps are so fine that the largest of 128 values serves as well.
    """

    name = "even8"  # pyright: ignore[reportIncompatibleVariableOverride]
    number = 13  # pyright: ignore[reportIncompatibleVariableOverride]
    block_size = 128

    @property
    def _shift(self) -> int:
        return 17

    def encoded(
        self, x: jax.Array, block: Numbers, noise: jax.Array | int
    ) -> jax.Array:
        small = jnp.abs(x) * block[0] < _NEAR_ZERO
        return super().encoded(x, block, jnp.where(small, noise, NEAREST))
