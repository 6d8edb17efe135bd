"""The scale that the values of one block share: their largest magnitude, as bf16."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_LARGEST = 2.0**126  # beyond it, the reciprocal of a scale is not a normal number
_SMALLEST = np.finfo(np.float32).tiny


def block_scale(magnitude: jax.Array, axis: int, nearest: bool = False) -> jax.Array:
    """Largest of each block, rounded up to bf16: no value exceeds its scale.

    Or to the `nearest`, for formats that round to nearest codes: their code of a
    largest value is 1, and a scale that is always too large would lengthen it by 0.4 %
    in every step.

    Infinite where a value of the block is not finite or above 2**126, so that the
    caller can see it (a plain maximum ignores NaN on some backends). Zero for blocks
    whose largest is below the smallest normal number: some devices flush those.
    """
    finite = jnp.where(magnitude <= _LARGEST, magnitude, jnp.inf)
    largest = jnp.max(finite, axis=axis, keepdims=True)
    bits = lax.bitcast_convert_type(largest, jnp.int32)
    bits = (bits + np.int32(0x8000 if nearest else 0xFFFF)) & np.int32(-0x10000)
    rounded = lax.bitcast_convert_type(bits, jnp.float32)
    return jnp.where(largest < _SMALLEST, 0.0, rounded)


def reciprocal(scale: jax.Array) -> jax.Array:
    """1 / scale, and 0 where the whole block is zero."""
    return jnp.where(scale > 0.0, 1.0 / jnp.maximum(scale, _SMALLEST), 0.0)
