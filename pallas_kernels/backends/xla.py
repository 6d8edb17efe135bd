"""Plain `jax.numpy`, compiled by XLA: the reference, the CPU's, and the fallback.

The only backend that takes every leaf, and that XLA can partition by itself.
"""

import functools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .. import rounding
from ..arithmetic import EXACT, QUICK, using
from ..layout import Blocks, merge, positions, split
from ..norms import tile_terms
from ..program import Leaf, Noise, Program, Scalars
from ..step import Random, tile_step
from ._by_rows import by_rows, stepped, terms_by_rows


def run(program: Program, leaf: Leaf, scalars: Scalars, noise: Noise) -> Any:
    """One pass over one leaf of any shape and floating or complex type."""
    if jnp.issubdtype(leaf.g.dtype, jnp.complexfloating):
        program, leaf = _paired(program, leaf)
        found = run(program, leaf, scalars, noise)
        return found if program.sums else jax.tree.map(_complex, found)
    scalars = _computed_in(leaf, scalars)
    with using(QUICK if program.storage.quantized else EXACT):
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
            random=random_of(noise, blocks.shape, blocks.strides),
        )
    if scalars.ratio is not None:
        stacked = blocks.axis in blocks.layers
        ratio, within = scalars.ratio, blocks.within
        broad = split(ratio, blocks) if stacked else jnp.expand_dims(ratio, within)
        scalars = scalars._replace(ratio=broad)
    at_once = functools.partial(_at_once, program)
    if not by_rows(program):
        return at_once(leaf, scalars, noise)
    rows = functools.partial(stepped, program, random_of_blocks)
    return lax.platform_dependent(
        leaf,
        scalars,
        noise,
        cpu=functools.partial(rows, in_turn=True),
        cuda=functools.partial(rows, in_turn=False) if _strided(blocks) else at_once,
        default=at_once,
    )


def _strided(blocks: Blocks) -> bool:
    """Whether a block's values are apart: a GPU reduces contiguous ones well."""
    return blocks.axis != len(blocks.shape) - 1


def _at_once(program: Program, leaf: Leaf, scalars: Scalars, noise: Noise) -> Leaf:
    """A step of a quantized leaf, whose loops XLA chooses."""
    storage, blocks = program.storage, program.storage.blocks
    within = blocks.within
    out = tile_step(
        program,
        _split(program, leaf),
        scalars,
        largest=lambda x: jnp.max(x, axis=within, keepdims=True),
        random=random_of_blocks(noise, blocks),
    )
    values = (out.g, out.p, out.remainder)
    g, p, remainder = jax.tree.map(lambda x: merge(x, blocks), values)
    codes = tuple(storage.merge_codes(k, c) for k, c in enumerate(out.codes))
    scales = jax.tree.map(lambda s: jnp.squeeze(s, within), out.scales)
    return Leaf(g, p, codes, scales, remainder)


def random_of_blocks(noise: Noise, blocks: Blocks) -> Random:
    """Noise for the values of a leaf that is split."""
    within = blocks.within
    shape, strides = list(blocks.scale_shape), list(blocks.strides)
    shape.insert(within, blocks.size)
    strides.insert(within - 1, blocks.size * strides[within - 1])
    return random_of(noise, tuple(shape), tuple(strides), within)


def random_of(
    noise: Noise,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    within: int | None = None,
) -> Random:
    """Noise for values of this shape, those of a block on one axis."""

    def random(draw: rounding.Draw) -> jax.Array:
        key = rounding.leaf_key(noise.step, noise.leaf)
        if within is None:
            bits = rounding.hashed(key, positions(shape, strides, noise.origin))
            return rounding.noise(bits, 0, draw)
        block = shape[within]
        period = rounding.period(block)
        at = positions(shape, strides, noise.origin, (within, period))
        bits = rounding.hashed(key, at)
        if period == block:
            return rounding.noise(bits, 0, draw)
        along = (block, *(1,) * (len(shape) - within - 1))
        row = lax.broadcasted_iota(jnp.int32, along, 0)
        return rounding.noise(bits, lax.div(row, jnp.int32(period)), draw)

    return random


def _sums(program: Program, leaf: Leaf, scalars: Scalars) -> jax.Array:
    """Sums over each layer of one leaf, float32 of shape (sums, layers)."""
    blocks = program.storage.blocks

    def at_once(leaf: Leaf, scalars: Scalars) -> list[jax.Array]:
        if not (program.storage.quantized and program.reads_state):
            return tile_terms(program, leaf, scalars)
        terms = tile_terms(program, _split(program, leaf), scalars)
        return [merge(x, blocks) for x in terms]

    def summed(terms: list[jax.Array]) -> jax.Array:
        rest = tuple(k for k in range(len(blocks.shape)) if k not in blocks.layers)
        totals = [jnp.sum(x, axis=rest).reshape(-1) for x in terms]
        return jnp.stack(totals).astype(jnp.float32)

    if not by_rows(program):
        return summed(at_once(leaf, scalars))

    def whole(leaf: Leaf, scalars: Scalars) -> jax.Array:
        return summed(at_once(leaf, scalars))

    def rows(leaf: Leaf, scalars: Scalars) -> jax.Array:
        return summed(terms_by_rows(program, leaf, scalars))

    return lax.platform_dependent(
        leaf,
        scalars,
        cpu=rows,
        cuda=rows if _strided(blocks) else whole,
        default=whole,
    )


def _split(program: Program, leaf: Leaf) -> Leaf:
    """The leaf with each block on an axis of its own."""
    storage, blocks = program.storage, program.storage.blocks
    values = (leaf.g, leaf.p, leaf.remainder)
    g, p, remainder = jax.tree.map(lambda x: split(x, blocks), values)
    codes = [
        storage.split_codes(k, c) if storage.formats[k].quantized else split(c, blocks)
        for k, c in enumerate(leaf.codes)
    ]
    scales = jax.tree.map(lambda s: jnp.expand_dims(s, blocks.within), leaf.scales)
    return Leaf(g, p, tuple(codes), scales, remainder)


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
