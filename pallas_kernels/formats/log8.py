"""8-bit logarithmic floats: the default format of first moments."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .base import Format, as_bf16, reciprocal

_MANTISSA_BITS = 3
_SHIFT = 23 - _MANTISSA_BITS  # a code is the head of a float32's bit pattern
_TOP = 127
_BIAS = (127 << _MANTISSA_BITS) - _TOP  # code 127 is 1.0


@dataclass(frozen=True)
class Log8(Format):
    """Sign, octave and 3 bits of mantissa, relative to the block's largest.

    With c = |code| in 1..127 and c + 889 = 8 e + f (0 <= f < 8),

        x = sign(code) * scale * 2**(e - 127) * (1 + f / 8);      code 0 is 0.

    127 magnitudes, 8 per octave, from scale down to 1.25 * 2**-16 (1.9e-5) of it.
    Rounded to the nearest code: worst relative error 1/17 (5.9 %). Below the range
    values flush to zero: a first moment that is too small makes steps too small,
    never too large. 1 byte, and 2 / block_size for the scale.
    """

    name = "log8"
    number = 3

    def scale(self, largest: jax.Array) -> jax.Array:
        return as_bf16(largest, nearest=True)

    def encode(
        self, x: jax.Array, scale: jax.Array, noise: jax.Array | float = 0.5
    ) -> jax.Array:
        del noise
        bits = lax.bitcast_convert_type(jnp.abs(x) * reciprocal(scale), jnp.int32)
        code = ((bits + np.int32(1 << (_SHIFT - 1))) >> _SHIFT) - _BIAS
        code = jnp.clip(code, 0, _TOP)
        return jnp.where(x < 0.0, -code, code)

    def decode(self, codes: jax.Array, scale: jax.Array) -> jax.Array:
        bits = (jnp.abs(codes) + _BIAS) << _SHIFT
        sign = codes & np.int32(-0x80000000)
        x = lax.bitcast_convert_type(bits | sign, jnp.float32)
        return jnp.where(codes == 0, 0.0, x) * scale
