"""Unquantized formats: each value on its own, no scale."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from ..rounding import NOISE_BITS
from .base import Format, Numbers, bits_of, float_of


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

    Second moments (`unbiased`) are rounded up or down at random in proportion: with
    b2 = 0.999 a step changes v by 0.1 %, less than half a unit in the last place, and
    the nearest value would be the old one for ever.
    """

    unbiased: bool  # pyright: ignore[reportGeneralTypeIssues]
    name = "bf16"
    dtype = jnp.bfloat16
    quantized = False

    @property
    def number(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return 7 if self.unbiased else 2

    def encoded(
        self, x: jax.Array, block: Numbers, noise: jax.Array | int
    ) -> jax.Array:
        del block
        if not self.unbiased:
            return x.astype(jnp.bfloat16).astype(jnp.float32)
        largest = float(jnp.finfo(jnp.bfloat16).max)
        dither = noise << (16 - NOISE_BITS)
        bits = bits_of(jnp.minimum(x, largest)) + dither
        rounded = float_of(bits & np.int32(-0x10000))
        # A non-zero value never becomes zero (only denormal numbers could).
        return jnp.where(rounded == 0.0, x, rounded)

    def decoded(self, codes: jax.Array, block: Numbers) -> jax.Array:
        del block
        return codes
