"""Unquantized formats: each value on its own, no scale."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .base import Format


@dataclass(frozen=True)
class Float32(Format):
    """Full precision: 4 bytes. Wider values (float64, complex) keep their own type."""

    name = "32bit"
    number = 1
    dtype = jnp.float32
    quantized = False

    def encode(
        self, x: jax.Array, scale: jax.Array, noise: jax.Array | float = 0.5
    ) -> jax.Array:
        del scale, noise
        return x

    def decode(self, codes: jax.Array, scale: jax.Array) -> jax.Array:
        del scale
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

    def encode(
        self, x: jax.Array, scale: jax.Array, noise: jax.Array | float = 0.5
    ) -> jax.Array:
        del scale
        if not self.unbiased:
            return x.astype(jnp.bfloat16).astype(jnp.float32)
        largest = float(jnp.finfo(jnp.bfloat16).max)
        bits = lax.bitcast_convert_type(jnp.minimum(x, largest), jnp.int32)
        dither = jnp.asarray(noise * 65536.0).astype(jnp.int32)
        kept = (bits + dither) & np.int32(-0x10000)
        rounded = lax.bitcast_convert_type(kept, jnp.float32)
        # A non-zero value never becomes zero (only denormal numbers could).
        return jnp.where(rounded == 0.0, x, rounded)

    def decode(self, codes: jax.Array, scale: jax.Array) -> jax.Array:
        del scale
        return codes
