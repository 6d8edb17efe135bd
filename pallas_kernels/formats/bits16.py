"""16 bits linear in a bit pattern: first moments that 8 bits lose in their noise."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from ..rounding import NOISE_BITS
from .base import Format, Numbers, bits_of, float_of, rounded_up

_SMALLEST = 2.0**-100  # of a scale; smaller moments become zero
_SHIFT = 12  # bits of float32 that are rounded: 2,048 codes for each of 16 octaves
_FIRST = np.int32(np.float32(1).view(np.int32))  # the bits of code 0
_TOP = np.int32(_FIRST + (32767 << _SHIFT)).view(np.float32)  # 65520
# The value of the highest code must not exceed the scale.
_STEP = np.nextafter(np.float32(1 / (_TOP - 1)), np.float32(0))


@dataclass(frozen=True)
class Bits16(Format):
    """m in steps of less than a 2048th of it; tiny ones in equal steps.

    What is stored is the sign of m, and the bit pattern of a float32,

        y = 1 + 65519 |m| / scale,                  scale >= the largest |m|
        |code| = (bits(y) - bits(1)) / 2**12 = 0 ... 32767

    so each of the 16 octaves of y has 2,048 equal steps. Where m is much more than
    2**-16 of the block's largest, a step is a 4096th to a 2048th of m; where it is much
    less, all steps are 2**-27 of the largest.

    Rounding is unbiased, in m itself: codes are linear in m from each to the next. So a
    moment decays as it should, to zero, and zero stays zero. A moment whose decay is b
    keeps 1 / sqrt(1 - b**2) of its rounding errors, which are .014 % of it each: .3 %
    at .999, 1 % at .9999, whatever its neighbours are. The scale is 2**-100 or more.
    2 bytes, and 2 / block_size for the scale.
    """

    name = "bits16"
    number = 11
    dtype = jnp.int16
    unbiased = True

    def scale(self, largest: jax.Array) -> jax.Array:
        return rounded_up(jnp.maximum(largest, _SMALLEST))

    def encoding(self, scale: jax.Array) -> Numbers:
        return (1.0 / (scale * _STEP),)

    def encoded(
        self, x: jax.Array, block: Numbers, noise: jax.Array | int
    ) -> jax.Array:
        y = jnp.minimum(jnp.abs(x) * block[0] + 1.0, _TOP)
        code = (bits_of(y) + ((noise >> (NOISE_BITS - _SHIFT)) - _FIRST)) >> _SHIFT
        return jnp.where(x < 0.0, -code, code)

    def decoding(self, scale: jax.Array) -> Numbers:
        return (scale * _STEP,)

    def decoded(self, codes: jax.Array, block: Numbers) -> jax.Array:
        size = float_of((jnp.abs(codes) << _SHIFT) + _FIRST) - 1.0
        return jnp.where(codes < 0, -size, size) * block[0]
