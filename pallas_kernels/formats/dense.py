"""Unquantized formats: each value on its own, no scale."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


@dataclass(frozen=True)
class Float32:
    """Full precision: 4 bytes. Wider values (float64, complex) keep their own type."""

    name: str = "32bit"
    dtype: jax.typing.DTypeLike = jnp.float32
    quantized: bool = False
    unbiased: bool = False

    def encode(
        self, x: jax.Array, axis: int, noise: jax.Array | float = 0.5
    ) -> tuple[jax.Array, None]:
        del axis, noise
        return x, None

    def decode(self, codes: jax.Array, scale: jax.Array | None) -> jax.Array:
        del scale
        return codes


@dataclass(frozen=True)
class BFloat16:
    """bfloat16: 2 bytes, 8 significant bits, the range of float32.

    Second moments (`unbiased`) are rounded up or down at random in proportion: with
    b2 = 0.999 a step changes v by 0.1 %, less than half a unit in the last place, and
    the nearest value would be the old one for ever.
    """

    unbiased: bool
    name: str = "bf16"
    dtype: jax.typing.DTypeLike = jnp.bfloat16
    quantized: bool = False

    def encode(
        self, x: jax.Array, axis: int, noise: jax.Array | float = 0.5
    ) -> tuple[jax.Array, None]:
        del axis
        if not self.unbiased:
            return x.astype(jnp.bfloat16).astype(jnp.float32), None
        largest = float(jnp.finfo(jnp.bfloat16).max)
        bits = lax.bitcast_convert_type(jnp.minimum(x, largest), jnp.int32)
        dither = jnp.asarray(noise * 65536.0).astype(jnp.int32)
        kept = (bits + dither) & np.int32(-0x10000)
        rounded = lax.bitcast_convert_type(kept, jnp.float32)
        # A non-zero value never becomes zero (only denormal numbers could).
        return jnp.where(rounded == 0.0, x, rounded), None

    def decode(self, codes: jax.Array, scale: jax.Array | None) -> jax.Array:
        del scale
        return codes
