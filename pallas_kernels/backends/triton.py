"""NVIDIA GPUs: Pallas kernels, one per leaf and pass, lowered by Triton, in place.

An array is row-major here, so a leaf of any rank is (outer, blocked axis, inner) for
free, and tiles are addressed by their offsets in it. Pallas' Triton backend is
deprecated from JAX 0.11 on; this is the only file that knows it.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from ..formats import widened
from ..layout import Blocks, wrap
from ..norms import tile_terms
from ..program import Leaf, Noise, Program, Scalars
from ..step import tile_step
from ._call import Call

# 8 values a thread: 116 registers on sm_90, so that two programs share a
# multiprocessor and one loads while the other computes (16 values: 197 registers).
_TILE_VALUES = 2048
_TILE_INNER = 64
_WARPS = 8


class _Tiles(NamedTuple):
    """A leaf as (outer, length, inner), in tiles of (blocks, block, columns)."""

    outer: int
    length: int
    inner: int
    block: int
    blocks: int
    columns: int

    @property
    def grid(self) -> tuple[int, int, int]:
        count = -(-self.length // self.block)
        return self.outer, -(-count // self.blocks), -(-self.inner // self.columns)


def refuses(program: Program) -> str | None:
    """Why the kernel cannot take a leaf."""
    storage, blocks = program.storage, program.storage.blocks
    if math.prod(blocks.shape) >= 2**31:
        return "the Triton kernel counts in 32 bits"
    if not storage.quantized or blocks.axis is None:
        return "layers without blocks are left to XLA" if blocks.layers else None
    if any(k >= blocks.axis for k in blocks.layers):
        return "layers inside the blocked axis are left to XLA"
    if blocks.size & (blocks.size - 1):
        return f"the Triton kernel takes blocks of a power of two, not of {blocks.size}"
    return None


def run(
    program: Program,
    leaf: Leaf,
    scalars: Scalars,
    noise: Noise,
    *,
    interpret: Any = False,
) -> Any:
    """One pass over one leaf. The arguments are those of `backends.tpu.run`."""
    tiles = _tiles(program.storage.blocks, program.storage.quantized)
    call = Call(program, leaf, scalars, noise)
    if program.sums:
        return _sums(program, tiles, call, interpret)
    return _step(program, tiles, call, interpret)


def _step(program: Program, tiles: _Tiles, call: Call, interpret: Any) -> Leaf:
    blocks = program.storage.blocks

    def kernel(*refs: Any) -> None:
        layer = _layer(tiles, blocks)
        numbers, noise, inputs, outputs = call.unpack(refs, layer)
        places = _places(tiles, call)
        at, valid = _offsets(tiles, within=True)
        out = tile_step(
            program,
            call.leaf([_load(r, *p) for r, p in zip(inputs, places, strict=True)]),
            numbers,
            largest=lambda x: jnp.max(x, axis=1, keepdims=True),
            noise=noise,
            position=lambda: _position(tiles, blocks, at, noise.origin),
            valid=valid if tiles.length % tiles.block else None,
        )
        results = zip(outputs, jax.tree.leaves(out), call.written, strict=True)
        for ref, x, i in results:
            index, mask = places[i]
            plgpu.store(ref.at[index], x.astype(ref.dtype), mask=mask)

    stored = [call.arrays[i] for i in call.written]
    results = pl.pallas_call(
        kernel,
        grid=(math.prod(tiles.grid),),
        out_shape=[jax.ShapeDtypeStruct((x.size,), x.dtype) for x in stored],
        input_output_aliases=call.aliases,
        compiler_params=_PARAMS,
        interpret=interpret,
        name=program.name,
    )(*call.operands, *(x.reshape(-1) for x in call.arrays))
    shaped = zip(results, stored, strict=True)
    return call.results([x.reshape(like.shape) for x, like in shaped])


def _sums(program: Program, tiles: _Tiles, call: Call, interpret: Any) -> jax.Array:
    """Sums over each layer, float32 of shape (sums, layers).

    Each program writes one number for each sum, without atomics, so that they are
    added up in one order; that is done outside.
    """
    blocks, count = program.storage.blocks, len(program.sums)
    programs = math.prod(tiles.grid)

    def kernel(*refs: Any) -> None:
        numbers, _, inputs, (out,) = call.unpack(refs, _layer(tiles, blocks))
        places = _places(tiles, call)
        loaded = [_load(r, *p) for r, p in zip(inputs, places, strict=True)]
        _, valid = _offsets(tiles, within=True)
        terms = tile_terms(program, call.leaf(loaded), numbers, valid)
        for k, x in enumerate(terms):
            plgpu.store(out.at[k * programs + pl.program_id(0)], jnp.sum(x))

    partial = pl.pallas_call(
        kernel,
        grid=(programs,),
        out_shape=jax.ShapeDtypeStruct((count * programs,), jnp.float32),
        compiler_params=_PARAMS,
        interpret=interpret,
        name=program.name,
    )(*call.operands, *(x.reshape(-1) for x in call.arrays))
    outer = blocks.shape[: blocks.axis] if blocks.layers else ()
    rest = tuple(1 + k for k in range(len(outer)) if k not in blocks.layers)
    totals = jnp.sum(partial.reshape(count, *outer, -1), axis=(*rest, -1))
    return totals.reshape(count, -1)


_PARAMS = plgpu.CompilerParams(num_warps=_WARPS, num_stages=1)


def _tiles(blocks: Blocks, quantized: bool) -> _Tiles:
    size = math.prod(blocks.shape)
    if not quantized or blocks.axis is None:
        return _Tiles(1, 1, size, 1, 1, 1024)
    length = blocks.shape[blocks.axis]
    inner = math.prod(blocks.shape[blocks.axis + 1 :])
    columns = min(_TILE_INNER, pl.next_power_of_2(inner))
    fitting = max(_TILE_VALUES // (columns * blocks.size), 1)
    rows = min(fitting, pl.next_power_of_2(blocks.count))
    return _Tiles(size // (length * inner), length, inner, blocks.size, rows, columns)


def _layer(tiles: _Tiles, blocks: Blocks) -> Any:
    """Index of the layer that this tile is a part of."""
    _, down, across = tiles.grid
    outer, index, inside = pl.program_id(0) // (down * across), 0, tiles.outer
    for k, n in enumerate(blocks.shape[: blocks.axis]):
        inside //= n
        if k in blocks.layers:
            index = index * n + (outer // inside) % n
    return index


def _places(tiles: _Tiles, call: Call) -> list[tuple[jax.Array, jax.Array | None]]:
    """For each array, where this tile's values are in it, and which of them exist."""
    values, scales = (_offsets(tiles, within=yes) for yes in (True, False))
    return [scales if scaled else values for scaled in call.scaled]


def _offsets(tiles: _Tiles, within: bool) -> tuple[jax.Array, jax.Array | None]:
    """Offsets of this tile's values (`within`) or scales, and which of them exist."""
    _, down, across = tiles.grid
    program = pl.program_id(0)
    outer = program // (down * across)
    rest = program - outer * (down * across)
    row, column = rest // across, rest % across

    block = tiles.block if within else 1
    shape = (tiles.blocks, block, tiles.columns)
    length = tiles.length if within else -(-tiles.length // tiles.block)
    i = row * (tiles.blocks * block) + (
        lax.broadcasted_iota(jnp.int32, shape, 0) * block
        + lax.broadcasted_iota(jnp.int32, shape, 1)
    )
    j = column * tiles.columns + lax.broadcasted_iota(jnp.int32, shape, 2)
    offsets = outer * (length * tiles.inner) + i * tiles.inner + j
    exists = None
    if length % (tiles.blocks * block):
        exists = i < length
    if tiles.inner % tiles.columns:
        inside = j < tiles.inner
        exists = inside if exists is None else exists & inside
    return offsets, exists


def _position(
    tiles: _Tiles, blocks: Blocks, at: jax.Array, start: jax.Array
) -> jax.Array:
    """Position in the whole leaf of the values at these offsets in this shard of it."""
    position, rest, inside = start, at, math.prod(blocks.shape)
    for length, stride in _merged(blocks):
        inside //= length
        index = rest if inside == 1 else lax.div(rest, jnp.full_like(rest, inside))
        position = position + index * wrap(stride)
        rest = rest - index * inside
    return position


def _merged(blocks: Blocks) -> list[tuple[int, int]]:
    """Length and stride of each axis, where axes that need no division are one."""
    merged: list[tuple[int, int]] = []
    for length, stride in zip(blocks.shape, blocks.strides, strict=True):
        if merged and merged[-1][1] == length * stride:
            length *= merged.pop()[0]
        merged.append((length, stride))
    return merged


def _load(ref: Any, index: jax.Array, mask: jax.Array | None) -> jax.Array:
    other = None if mask is None else jnp.zeros((), ref.dtype)
    return widened(plgpu.load(ref.at[index], mask=mask, other=other))
