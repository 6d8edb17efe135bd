"""8 bits as telephones have them: the default format of momentum without squares."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from ..rounding import NOISE_BITS
from .base import Format, Numbers, bits_of, float_of, rounded_up

_MANTISSA = 4  # bits: 16 levels in each octave
_SHIFT = 23 - _MANTISSA
_TOP = 127
_ONE = int(np.float32(1.0).view(np.int32))
# 1 + _RANGE is the number whose level is _TOP.
_RANGE = float(np.int32(_ONE + (_TOP << _SHIFT)).view(np.float32)) - 1.0
# A little less: rounding must not reach the level above.
_REACHED = float(np.nextafter(np.float32(_RANGE), np.float32(0)))
# Levels from 0; and half of what is missing in the noise, which has fewer bits.
_START = np.int32(-_ONE + (1 << (_SHIFT - NOISE_BITS - 1)))
_SMALLEST = 2.0**-100  # of a scale; smaller moments become zero


@dataclass(frozen=True)
class MuLaw8(Format):
    """A sign and 127 levels, equal within an octave of 1 + 247 |m| / scale.

        level(m) = 16 octaves(1 + 247 |m| / scale),   scale >= largest |m|

    where `octaves` is the piecewise linear logarithm: e + f of 2**e (1 + f). That is
    mu-law (ITU-T G.711). Near zero, steps are 1/3952 of the largest, at the top 1/31:
    an element of a hundredth of its block's largest is stored as precisely as those
    around it, where equal steps would leave it one code. Lion steps by a sign, and
    serves all elements alike.

    Rounding is unbiased, and exactly so: every octave ends at a level. So a moment that
    gets no more gradients decays as it should, and becomes zero; zero stays zero. The
    scale is 2**-100 or more. 1 byte, and 2 / block_size for the scale.
    """

    name = "mulaw8"
    number = 13
    unbiased = True

    def scale(self, largest: jax.Array) -> jax.Array:
        return rounded_up(jnp.maximum(largest, _SMALLEST))

    def encoding(self, scale: jax.Array) -> Numbers:
        return (_REACHED / scale,)

    def encoded(
        self, x: jax.Array, block: Numbers, noise: jax.Array | int
    ) -> jax.Array:
        bits = bits_of(jnp.abs(x) * block[0] + 1.0)
        level = (bits + (noise << (_SHIFT - NOISE_BITS)) + _START) >> _SHIFT
        return jnp.where(x < 0.0, -level, level)

    def decoding(self, scale: jax.Array) -> Numbers:
        return (scale * (1.0 / _RANGE),)

    def decoded(self, codes: jax.Array, block: Numbers) -> jax.Array:
        size = float_of((jnp.abs(codes) << _SHIFT) + np.int32(_ONE)) - 1.0
        return jnp.where(codes < 0, -size, size) * block[0]
