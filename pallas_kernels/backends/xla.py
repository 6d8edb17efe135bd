"""Plain `jax.numpy`, compiled by XLA: the reference, the CPU's, and the fallback.

The only backend that takes every leaf, and that XLA can partition by itself.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from ..layout import Blocks, merge, positions, split
from ..norms import Sum, read, tile_terms
from ..rounding import Noise
from ..step import Leaf, Program, Scalars, tile_step


def leaf_step(
    program: Program, blocks: Blocks, leaf: Leaf, scalars: Scalars, noise: Noise
) -> Leaf:
    """One step of one leaf of any shape and floating or complex type."""
    if _is_complex(leaf):
        blocks, leaf = _paired(blocks, leaf)
        out = leaf_step(program, blocks, leaf, scalars, noise)
        return jax.tree.map(lambda x: jax.lax.complex(x[..., 0], x[..., 1]), out)
    ratio = scalars.ratio
    if ratio is not None:
        scalars = scalars._replace(ratio=ratio.reshape(blocks.layer_shape))
    scalars = _computed_in(leaf, scalars)
    if not program.quantized:
        return tile_step(
            program,
            leaf,
            scalars,
            axis=0,
            key=noise.key,
            position=lambda: positions(blocks.shape, blocks.strides, noise.origin),
        )
    assert blocks.axis is not None
    within = blocks.axis + 1
    split_strides = list(blocks.strides)
    split_strides.insert(blocks.axis, blocks.size * blocks.strides[blocks.axis])
    parts = _split(blocks, leaf)
    assert parts.g is not None
    shape = parts.g.shape
    if scalars.ratio is not None:
        stacked = blocks.axis in blocks.layers
        widen = split if stacked else lambda x, _: jnp.expand_dims(x, within)
        scalars = scalars._replace(ratio=widen(scalars.ratio, blocks))
    out = tile_step(
        program,
        parts,
        scalars,
        axis=within,
        key=noise.key,
        position=lambda: positions(shape, tuple(split_strides), noise.origin),
    )
    return Leaf(
        g=None if out.g is None else merge(out.g, blocks),
        p=None if out.p is None else merge(out.p, blocks),
        codes=tuple(merge(c, blocks) for c in out.codes),
        scales=jax.tree.map(lambda s: jnp.squeeze(s, within), out.scales),
    )


def leaf_sums(
    program: Program,
    blocks: Blocks,
    leaf: Leaf,
    scalars: Scalars,
    sums: Sequence[Sum],
) -> jax.Array:
    """Sums over each layer of one leaf, float32 of shape (sums, layers)."""
    if _is_complex(leaf):
        blocks, leaf = _paired(blocks, leaf)
    leaf = read(program, leaf, sums)
    scalars = _computed_in(leaf, scalars)
    stored = program.quantized and bool(leaf.codes)
    parts = _split(blocks, leaf) if stored else leaf
    terms = tile_terms(program, parts, scalars, sums)
    if stored:
        terms = [merge(x, blocks) for x in terms]
    rest = tuple(k for k in range(len(blocks.shape)) if k not in blocks.layers)
    totals = [jnp.sum(x, axis=rest).reshape(-1) for x in terms]
    return jnp.stack(totals).astype(jnp.float32)


def _split(blocks: Blocks, leaf: Leaf) -> Leaf:
    """The leaf with each block on an axis of its own."""
    assert blocks.axis is not None
    whole = jax.tree.map(lambda x: split(x, blocks), leaf._replace(scales=()))
    within = blocks.axis + 1
    scales = jax.tree.map(lambda s: jnp.expand_dims(s, within), leaf.scales)
    return whole._replace(scales=scales)


def _computed_in(leaf: Leaf, scalars: Scalars) -> Scalars:
    """Scalars of float32, or of float64 for leaves that are."""
    wide = any(x is not None and x.dtype == jnp.float64 for x in (leaf.g, leaf.p))
    dtype = jnp.float64 if wide else jnp.float32
    return jax.tree.map(lambda s: s.astype(dtype), scalars)


def _is_complex(leaf: Leaf) -> bool:
    assert leaf.g is not None
    return jnp.issubdtype(leaf.g.dtype, jnp.complexfloating)


def _paired(blocks: Blocks, leaf: Leaf) -> tuple[Blocks, Leaf]:
    """Real and imaginary parts as a last axis of real arrays."""
    whole = None if blocks.whole is None else (*blocks.whole, 2)
    pairs = Blocks((*blocks.shape, 2), None, 1, blocks.layers, whole)
    return pairs, jax.tree.map(lambda x: jnp.stack([x.real, x.imag], axis=-1), leaf)
