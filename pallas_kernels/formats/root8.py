"""8 bits linear in the eighth root: the default format of second moments."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from ._scale import block_scale, reciprocal

_LEVELS = 256


@dataclass(frozen=True)
class Root8:
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

    name: str = "root8"
    dtype: jax.typing.DTypeLike = jnp.int8
    quantized: bool = True
    unbiased: bool = True

    def encode(
        self, x: jax.Array, axis: int, noise: jax.Array | float = 0.5
    ) -> tuple[jax.Array, jax.Array]:
        root = jnp.sqrt(jnp.sqrt(jnp.sqrt(x)))
        scale = block_scale(root, axis)
        level = root * (reciprocal(scale) * _LEVELS) + (noise - 1.0)
        level = jnp.clip(level, 0.0, _LEVELS - 1.0)  # the cast below truncates
        return level.astype(jnp.int32) - _LEVELS // 2, scale

    def decode(self, codes: jax.Array, scale: jax.Array | None) -> jax.Array:
        assert scale is not None
        step = scale * (1.0 / _LEVELS)
        root = (codes + (_LEVELS // 2 + 1)).astype(jnp.float32) * step
        square = root * root
        fourth = square * square
        return fourth * fourth
