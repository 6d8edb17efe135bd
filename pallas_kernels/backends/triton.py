"""NVIDIA GPUs: Pallas kernels, one per leaf and pass, lowered by Triton, in place.

An array is row-major here, so a leaf of any rank is (outer, blocked axis, inner) for
free, and tiles are addressed by their offsets in it. Pallas' Triton backend is
deprecated from JAX 0.11 on; this is the only file that knows it.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from ..layout import Blocks, wrap
from ..norms import Sum, read, tile_terms
from ..rounding import Noise
from ..step import Leaf, Program, Scalars, tile_step
from ._call import Call, StepCall

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


def leaf_step(
    program: Program,
    blocks: Blocks,
    leaf: Leaf,
    scalars: Scalars,
    noise: Noise,
    *,
    interpret: Any = False,
) -> Leaf:
    """One step of one leaf. The arguments are those of `backends.tpu.leaf_step`.

    Raises:
      NotImplementedError: for leaves that this kernel cannot take.
    """
    tiles = _tiles(blocks, program.quantized)
    call = StepCall(program, leaf, scalars, noise)
    shapes = [x.shape for x in call.arrays]

    def kernel(*refs: Any) -> None:
        numbers, inputs, (start, *outputs) = call.unpack(refs, _layer(tiles, blocks))
        places = _places(tiles, blocks, shapes)
        at, valid = _offsets(tiles, within=True)
        out = tile_step(
            program,
            call.leaf([_load(r, *p) for r, p in zip(inputs, places, strict=True)]),
            numbers,
            axis=1,
            key=start[0],
            position=lambda: _position(tiles, blocks, at, start[1]),
            valid=valid if tiles.length % tiles.block else None,
        )
        results = zip(outputs, jax.tree.leaves(out), call.written, strict=True)
        for ref, x, i in results:
            index, mask = places[i]
            plgpu.store(ref.at[index], x.astype(ref.dtype), mask=mask)

    results = pl.pallas_call(
        kernel,
        grid=(math.prod(tiles.grid),),
        out_shape=[
            jax.ShapeDtypeStruct((math.prod(shapes[i]),), call.arrays[i].dtype)
            for i in call.written
        ],
        input_output_aliases=call.aliases,
        compiler_params=_PARAMS,
        interpret=interpret,
        name=call.name,
    )(*call.operands, *(x.reshape(-1) for x in call.arrays))
    return call.results(
        [x.reshape(shapes[i]) for x, i in zip(results, call.written, strict=True)]
    )


def leaf_sums(
    program: Program,
    blocks: Blocks,
    leaf: Leaf,
    scalars: Scalars,
    sums: Sequence[Sum],
    *,
    interpret: Any = False,
) -> jax.Array:
    """Sums over each layer of one leaf, float32 of shape (sums, layers).

    Each program writes one number for each sum, without atomics, so that they are
    added up in one order; that is done outside.

    Raises:
      NotImplementedError: for leaves that this kernel cannot take.
    """
    leaf = read(program, leaf, sums)
    tiles = _tiles(blocks, program.quantized)
    call = Call(leaf, scalars)
    shapes = [x.shape for x in call.arrays]
    programs = math.prod(tiles.grid)

    def kernel(*refs: Any) -> None:
        numbers, inputs, (out,) = call.unpack(refs, _layer(tiles, blocks))
        places = _places(tiles, blocks, shapes)
        loaded = [_load(r, *p) for r, p in zip(inputs, places, strict=True)]
        _, valid = _offsets(tiles, within=True)
        terms = tile_terms(program, call.leaf(loaded), numbers, sums, valid)
        for k, x in enumerate(terms):
            plgpu.store(out.at[k * programs + pl.program_id(0)], jnp.sum(x))

    partial = pl.pallas_call(
        kernel,
        grid=(programs,),
        out_shape=jax.ShapeDtypeStruct((len(sums) * programs,), jnp.float32),
        compiler_params=_PARAMS,
        interpret=interpret,
        name="octavo_sums_" + "_".join(sums),
    )(*call.operands, *(x.reshape(-1) for x in call.arrays))
    outer = blocks.shape[: blocks.axis] if blocks.layers else ()
    rest = tuple(1 + k for k in range(len(outer)) if k not in blocks.layers)
    totals = jnp.sum(partial.reshape(len(sums), *outer, -1), axis=(*rest, -1))
    return totals.reshape(len(sums), -1)


_PARAMS = plgpu.CompilerParams(num_warps=_WARPS, num_stages=1)


def _tiles(blocks: Blocks, quantized: bool) -> _Tiles:
    size = math.prod(blocks.shape)
    if size >= 2**31:
        raise NotImplementedError("the Triton kernel counts in 32 bits")
    if not quantized or blocks.axis is None:
        if blocks.layers:
            raise NotImplementedError("layers without blocks are left to XLA")
        return _Tiles(1, 1, size, 1, 1, 1024)
    if any(k >= blocks.axis for k in blocks.layers):
        raise NotImplementedError("layers inside the blocked axis are left to XLA")
    if blocks.size & (blocks.size - 1):
        raise NotImplementedError(
            f"the Triton kernel needs a power of two as block_size, not {blocks.size}"
        )
    length = blocks.shape[blocks.axis]
    inner = math.prod(blocks.shape[blocks.axis + 1 :])
    columns = min(_TILE_INNER, pl.next_power_of_2(inner))
    fitting = max(_TILE_VALUES // (columns * blocks.size), 1)
    rows = min(fitting, pl.next_power_of_2(blocks.count))
    return _Tiles(size // (length * inner), length, inner, blocks.size, rows, columns)


def _layer(tiles: _Tiles, blocks: Blocks) -> Any:
    """Index of the layer that this tile lies in."""
    _, down, across = tiles.grid
    outer, index, inside = pl.program_id(0) // (down * across), 0, tiles.outer
    for k, n in enumerate(blocks.shape[: blocks.axis]):
        inside //= n
        if k in blocks.layers:
            index = index * n + (outer // inside) % n
    return index


def _places(
    tiles: _Tiles, blocks: Blocks, shapes: list[tuple[int, ...]]
) -> list[tuple[jax.Array, jax.Array | None]]:
    """For each array, where this tile's values lie in it, and which of them exist."""
    values, scales = (_offsets(tiles, within=yes) for yes in (True, False))
    return [values if shape == blocks.shape else scales for shape in shapes]


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
    x = plgpu.load(ref.at[index], mask=mask, other=other)
    wide = jnp.int32 if jnp.issubdtype(ref.dtype, jnp.integer) else jnp.float32
    return x.astype(wide)
