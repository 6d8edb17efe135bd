"""Formats on whole leaves, outside of a step: for conversions."""

import jax
import jax.numpy as jnp

from .formats import Format
from .layout import Blocks, merge, split


def decode_leaf(
    form: Format, blocks: Blocks, codes: jax.Array, scales: jax.Array | None
) -> jax.Array:
    """Codes and scales as stored to the moment, float32 (or wider, if stored so)."""
    if not form.quantized:
        return codes.astype(jnp.promote_types(codes.dtype, jnp.float32))
    assert blocks.axis is not None and scales is not None
    within = blocks.axis + 1
    wide = jnp.expand_dims(scales.astype(jnp.float32), within)
    return merge(form.decode(split(codes, blocks).astype(jnp.int32), wide), blocks)


def encode_leaf(
    form: Format, blocks: Blocks, moment: jax.Array, dtype: jax.typing.DTypeLike
) -> tuple[jax.Array, jax.Array | None]:
    """A moment to codes of a type and scales as stored, rounded to the nearest."""
    if not form.quantized:
        return moment.astype(dtype), None
    assert blocks.axis is not None
    within = blocks.axis + 1
    codes, scales = form.encode(split(moment.astype(jnp.float32), blocks), within)
    assert scales is not None
    stored = jnp.squeeze(scales, within).astype(jnp.bfloat16)
    return merge(codes, blocks).astype(dtype), stored
