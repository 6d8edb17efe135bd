"""Plain `jax.numpy`, compiled by XLA: the reference, the CPU's, and the fallback.

The only backend that takes every leaf, and that XLA can partition by itself.
"""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from ..layout import Blocks, merge, positions, split
from ..norms import tile_terms
from ..program import Leaf, Noise, Program, Scalars
from ..step import tile_step


def run(program: Program, leaf: Leaf, scalars: Scalars, noise: Noise) -> Any:
    """One pass over one leaf of any shape and floating or complex type."""
    if jnp.issubdtype(leaf.g.dtype, jnp.complexfloating):
        program, leaf = _paired(program, leaf)
        found = run(program, leaf, scalars, noise)
        return found if program.sums else jax.tree.map(_complex, found)
    scalars = _computed_in(leaf, scalars)
    if program.sums:
        return _sums(program, leaf, scalars)
    return _step(program, leaf, scalars, noise)


def _step(program: Program, leaf: Leaf, scalars: Scalars, noise: Noise) -> Leaf:
    storage, blocks = program.storage, program.storage.blocks
    if scalars.ratio is not None:
        layered = scalars.ratio.reshape(blocks.layer_shape)
        scalars = scalars._replace(ratio=layered)
    if not storage.quantized:
        return tile_step(
            program,
            leaf,
            scalars,
            largest=lambda x: x,
            noise=noise,
            position=lambda: positions(blocks.shape, blocks.strides, noise.origin),
        )
    within = blocks.within
    strides = list(blocks.strides)
    strides.insert(within - 1, blocks.size * strides[within - 1])
    if scalars.ratio is not None:
        stacked = blocks.axis in blocks.layers
        ratio = scalars.ratio
        wide = split(ratio, blocks) if stacked else jnp.expand_dims(ratio, within)
        scalars = scalars._replace(ratio=wide)
    parts = _split(program, leaf)
    out = tile_step(
        program,
        parts,
        scalars,
        largest=lambda x: jnp.max(x, axis=within, keepdims=True),
        noise=noise,
        position=lambda: positions(parts.g.shape, tuple(strides), noise.origin),
    )
    g, p = jax.tree.map(lambda x: merge(x, blocks), (out.g, out.p))
    codes = tuple(storage.merge_codes(k, c) for k, c in enumerate(out.codes))
    scales = jax.tree.map(lambda s: jnp.squeeze(s, within), out.scales)
    return Leaf(g, p, codes, scales)


def _sums(program: Program, leaf: Leaf, scalars: Scalars) -> jax.Array:
    """Sums over each layer of one leaf, float32 of shape (sums, layers)."""
    blocks = program.storage.blocks
    in_blocks = program.storage.quantized and program.reads_state
    terms = tile_terms(program, _split(program, leaf) if in_blocks else leaf, scalars)
    if in_blocks:
        terms = [merge(x, blocks) for x in terms]
    rest = tuple(k for k in range(len(blocks.shape)) if k not in blocks.layers)
    totals = [jnp.sum(x, axis=rest).reshape(-1) for x in terms]
    return jnp.stack(totals).astype(jnp.float32)


def _split(program: Program, leaf: Leaf) -> Leaf:
    """The leaf with each block on an axis of its own."""
    storage, blocks = program.storage, program.storage.blocks
    g, p = jax.tree.map(lambda x: split(x, blocks), (leaf.g, leaf.p))
    codes = [
        storage.split_codes(k, c) if storage.formats[k].quantized else split(c, blocks)
        for k, c in enumerate(leaf.codes)
    ]
    scales = jax.tree.map(lambda s: jnp.expand_dims(s, blocks.within), leaf.scales)
    return Leaf(g, p, tuple(codes), scales)


def _computed_in(leaf: Leaf, scalars: Scalars) -> Scalars:
    """Scalars of float32, or of float64 for leaves that are."""
    wide = any(x is not None and x.dtype == jnp.float64 for x in (leaf.g, leaf.p))
    dtype = jnp.float64 if wide else jnp.float32
    return jax.tree.map(lambda s: s.astype(dtype), scalars)


def _paired(program: Program, leaf: Leaf) -> tuple[Program, Leaf]:
    """Real and imaginary parts as a last axis of real arrays."""
    blocks = program.storage.blocks
    whole = None if blocks.whole is None else (*blocks.whole, 2)
    pairs = Blocks((*blocks.shape, 2), None, 1, blocks.layers, whole)
    storage = replace(program.storage, blocks=pairs)
    return replace(program, storage=storage), jax.tree.map(
        lambda x: jnp.stack([x.real, x.imag], axis=-1), leaf
    )


def _complex(x: jax.Array) -> jax.Array:
    return jax.lax.complex(x[..., 0], x[..., 1])
