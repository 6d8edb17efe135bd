"""8 bits linear in a shifted bit pattern: the default format of second moments."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ..rounding import NOISE_BITS
from .base import (
    LARGEST,
    Format,
    Numbers,
    bits_of,
    fixed_point,
    float_of,
    rounded_up,
)

_LEVELS = 256
_LOWEST = 9  # levels run from here to 264: those below would be far apart
_TOP = _LOWEST + _LEVELS - 1
_FIRST = _LOWEST + _LEVELS // 2  # the level of code 0
_UNIT = 1 << NOISE_BITS  # of a level, in fixed point
# The highest level times a step must not exceed the scale.
_STEP = np.nextafter(np.float32(1 / _TOP), np.float32(0))
_SHIFT = 3
_SCALE_BITS = 3  # of a mantissa
# Shifted to the left again, it is lost: nothing has to be subtracted.
_OFFSET = np.int32(1 << (32 - _SHIFT))


def _curved(x: float) -> np.float32:
    """y of a number."""
    bits = (np.float32(x).view(np.int32) >> _SHIFT) + _OFFSET
    return np.int32(bits).view(np.float32)


_OF_ZERO, _OF_SMALLEST, _OF_LARGEST = map(_curved, (0.0, 2.0**-126, LARGEST))


@dataclass(frozen=True)
class Bits8(Format):
    """y(v), a piecewise linear eighth root, in 264 equal steps up to the largest.

    y has the bit pattern of v as float32, shifted right by 3, plus 2**29. So it is
    2**(-47 - 1/8) v**(1/8) at v = 2, 2**9, 2**-7, ..., and linear from each of them to
    the next.

        y(v) = scale * level / 264,  level = code + 137 = 9 ... 264,  scale >= largest y

    so sqrt(v), which Adam divides by, moves by about 4 / level from one level to the
    next: 1.5 % at the top on average, and 2.7 % at most. Rounding is unbiased in y:
    with b2 = 0.999 a step moves v by 0.1 %, far less than a code, and the nearest code
    would be the old one for ever. There is no code for zero: sqrt(v) below about 1.6e-6
    of the block's largest is clamped **up** to it, which makes steps too small, never
    too large. Only a block of zeros (scale 0) decodes to zero. 1 byte, and
    2 / block_size for the scale.

    The scale is rounded up to an eighth of an octave, more coarsely than bf16 would. A
    new scale rounds all of a block anew, elements without a gradient, too, and so it
    should be rare: the largest v of a block moves a little in every step.

    Two integer operations each way, exact on every device, where an eighth root takes
    three roots. NaN and infinity have a finite y, larger than that of any number.
    """

    name = "bits8"
    number = 9
    unbiased = True

    def magnitude(self, x: jax.Array) -> jax.Array:
        return float_of(lax.shift_right_logical(bits_of(x), np.int32(_SHIFT)) + _OFFSET)

    def scale(self, largest: jax.Array) -> jax.Array:
        kept = jnp.where(largest < _OF_SMALLEST, 0.0, rounded_up(largest, _SCALE_BITS))
        return jnp.where(largest <= _OF_LARGEST, kept, jnp.inf)

    def encoding(self, scale: jax.Array) -> Numbers:
        # A little less than 264: rounding must not reach 265.
        to_level = (_TOP * _UNIT - 2) / jnp.maximum(scale, _OF_SMALLEST)
        # The lowest level, and of a block of tiny numbers the one above that of zero.
        above = to_level * _OF_ZERO + float(_UNIT + 8)
        return to_level, jnp.maximum(above, float(_LOWEST * _UNIT))

    def encoded(
        self, x: jax.Array, block: Numbers, noise: jax.Array | int
    ) -> jax.Array:
        to_level, lowest = block
        level = jnp.maximum(self.magnitude(x) * to_level, lowest)
        # One unit more, half of what is missing at the top: v comes back shorter by
        # less than a unit there, and longer by less than one at the bottom.
        return (fixed_point(level, 1 - _FIRST * _UNIT) + noise) >> NOISE_BITS

    def decoding(self, scale: jax.Array) -> Numbers:
        step = scale * _STEP
        lowest = float_of(bits_of(step * float(_LOWEST)) << _SHIFT)
        return step, jnp.where(scale > _OF_ZERO * (_TOP / _LOWEST), lowest, 0.0)

    def decoded(self, codes: jax.Array, block: Numbers) -> jax.Array:
        y = (codes.astype(jnp.float32) + float(_FIRST)) * block[0]
        return float_of(bits_of(y) << _SHIFT)

    def lowest(self, block: Numbers) -> jax.Array:
        return block[1]
