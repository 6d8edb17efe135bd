"""Unquantized formats: each value on its own, no scale."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from ..rounding import NOISE_BITS
from .base import Format, Numbers, bits_of, float_of

_LARGEST = float(jnp.finfo(jnp.bfloat16).max)


@dataclass(frozen=True)
class Float32(Format):
    """Full precision: 4 bytes. Wider values (float64, complex) keep their own type."""

    name = "32bit"
    number = 1
    dtype = jnp.float32
    quantized = False

    def encoded(
        self, x: jax.Array, block: Numbers, noise: jax.Array | int
    ) -> jax.Array:
        del block, noise
        return x

    def decoded(self, codes: jax.Array, block: Numbers) -> jax.Array:
        del block
        return codes


@dataclass(frozen=True)
class BFloat16(Format):
    """bfloat16: 2 bytes, 8 significant bits, the range of float32.

    Values are rounded up or down at random in proportion: with b2 = 0.999 a step
    changes v by 0.1 %, and one without a gradient takes as much of a slow m. That is
    less than half a unit in the last place: the nearest value would be the old one for
    ever.
    """

    name = "bf16"
    number = 7
    dtype = jnp.bfloat16
    quantized = False
    unbiased = True

    def encoded(
        self, x: jax.Array, block: Numbers, noise: jax.Array | int
    ) -> jax.Array:
        del block
        dither = noise << (16 - NOISE_BITS)
        bits = bits_of(jnp.clip(x, -_LARGEST, _LARGEST)) + dither
        rounded = float_of(bits & np.int32(-0x10000))
        # A non-zero value never becomes zero (only denormal numbers could).
        return jnp.where(rounded == 0.0, x, rounded)

    def decoded(self, codes: jax.Array, block: Numbers) -> jax.Array:
        del block
        return codes
