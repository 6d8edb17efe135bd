"""Plain `jax.numpy`, compiled by XLA: the reference, the CPU's, and the fallback.

The only backend that takes every leaf, and that XLA can partition by itself.
"""

import jax
import jax.numpy as jnp

from ..layout import Blocks, merge, positions, split
from ..step import Leaf, Program, Scalars, tile_step


def leaf_step(
    program: Program, blocks: Blocks, leaf: Leaf, scalars: Scalars, key: jax.Array
) -> Leaf:
    """One step of one leaf of any shape and floating or complex type."""
    assert leaf.g is not None
    if jnp.issubdtype(leaf.g.dtype, jnp.complexfloating):
        pairs = Blocks((*blocks.shape, 2), None, 1)
        out = leaf_step(program, pairs, jax.tree.map(_pair, leaf), scalars, key)
        return jax.tree.map(_complex, out)
    scalars = jax.tree.map(lambda s: s.astype(_computed_in(leaf)), scalars)
    if not program.quantized:
        return tile_step(
            program,
            leaf,
            scalars,
            axis=0,
            key=key,
            position=lambda: positions(blocks.shape, blocks.strides, 0),
        )
    assert blocks.axis is not None
    within = blocks.axis + 1
    split_strides = list(blocks.strides)
    split_strides.insert(blocks.axis, blocks.size * blocks.strides[blocks.axis])
    parts = Leaf(
        g=split(leaf.g, blocks),
        p=None if leaf.p is None else split(leaf.p, blocks),
        codes=tuple(split(c, blocks) for c in leaf.codes),
        scales=jax.tree.map(lambda s: jnp.expand_dims(s, within), leaf.scales),
    )
    assert parts.g is not None
    shape = parts.g.shape
    out = tile_step(
        program,
        parts,
        scalars,
        axis=within,
        key=key,
        position=lambda: positions(shape, tuple(split_strides), 0),
    )
    return Leaf(
        g=None if out.g is None else merge(out.g, blocks),
        p=None if out.p is None else merge(out.p, blocks),
        codes=tuple(merge(c, blocks) for c in out.codes),
        scales=jax.tree.map(lambda s: jnp.squeeze(s, within), out.scales),
    )


def _computed_in(leaf: Leaf) -> jax.typing.DTypeLike:
    """float32, or float64 for leaves that are."""
    wide = any(x is not None and x.dtype == jnp.float64 for x in (leaf.g, leaf.p))
    return jnp.float64 if wide else jnp.float32


def _pair(x: jax.Array) -> jax.Array:
    return jnp.stack([x.real, x.imag], axis=-1)


def _complex(x: jax.Array) -> jax.Array:
    return jax.lax.complex(x[..., 0], x[..., 1])
