"""8 bits linear in the eighth root: the default format of second moments."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from .base import Format, reciprocal

_LEVELS = 256


@dataclass(frozen=True)
class Root8(Format):
    """The eighth root of v, in 256 equal steps up to the block's largest.

        v = (scale * (code + 129) / 256)**8,      scale >= largest v**(1/8) of the block

    so sqrt(v), which Adam divides by, moves by 4 / k from step k = code + 129 to the
    next: 1.6 % at the top. Rounding is unbiased in v**(1/8): with b2 = 0.999 a step
    moves v by 0.1 %, far less than a code, and the nearest code would be the old one
    for ever. There is no code for zero: values below 2**-64 (5.4e-20) of the block's
    largest are clamped **up** to it, which makes steps too small, never too large.
    Only a block of zeros (scale 0) decodes to zero. 1 byte, and 2 / block_size for the
    scale.
    """

    name = "root8"
    number = 4
    unbiased = True

    def magnitude(self, x: jax.Array) -> jax.Array:
        return super().magnitude(_eighth_root(x))

    def encode(
        self, x: jax.Array, scale: jax.Array, noise: jax.Array | float = 0.5
    ) -> jax.Array:
        level = _eighth_root(x) * (reciprocal(scale) * _LEVELS) + (noise - 1.0)
        level = jnp.clip(level, 0.0, _LEVELS - 1.0)  # the cast below truncates
        return level.astype(jnp.int32) - _LEVELS // 2

    def decode(self, codes: jax.Array, scale: jax.Array) -> jax.Array:
        step = scale * (1.0 / _LEVELS)
        root = (codes + (_LEVELS // 2 + 1)).astype(jnp.float32) * step
        square = root * root
        fourth = square * square
        return fourth * fourth


def _eighth_root(x: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.sqrt(jnp.sqrt(x)))
