"""NVIDIA GPUs: one Pallas kernel per leaf, lowered by Triton, in place.

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

from ..layout import Blocks
from ..step import Leaf, Program, Scalars, tile_step
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


def leaf_step(
    program: Program,
    blocks: Blocks,
    leaf: Leaf,
    scalars: Scalars,
    key: jax.Array,
    *,
    interpret: Any = False,
) -> Leaf:
    """One step of one leaf. The arguments are those of `backends.tpu.leaf_step`.

    Raises:
      NotImplementedError: for leaves that this kernel cannot take.
    """
    tiles = _tiles(blocks, program.quantized)
    call = Call(program, leaf, scalars, key)
    shapes = [x.shape for x in call.arrays]

    def kernel(*refs: Any) -> None:
        numbers, key, inputs, outputs = call.unpack(refs)
        at, valid = _offsets(tiles, within=True)
        scale_at, scale_valid = _offsets(tiles, within=False)

        def where(shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array | None]:
            return (at, valid) if shape == blocks.shape else (scale_at, scale_valid)

        loaded = [
            _load(ref, *where(shape)) for ref, shape in zip(inputs, shapes, strict=True)
        ]
        out = tile_step(
            program,
            call.leaf(loaded),
            numbers,
            axis=1,
            key=key,
            position=lambda: at,
            valid=valid if tiles.length % tiles.block else None,
        )
        results = zip(outputs, jax.tree.leaves(out), call.written, strict=True)
        for ref, x, i in results:
            index, mask = where(shapes[i])
            plgpu.store(ref.at[index], x.astype(ref.dtype), mask=mask)

    results = pl.pallas_call(
        kernel,
        grid=(math.prod(tiles.grid),),
        out_shape=[
            jax.ShapeDtypeStruct((math.prod(shapes[i]),), call.arrays[i].dtype)
            for i in call.written
        ],
        input_output_aliases=call.aliases,
        compiler_params=plgpu.CompilerParams(num_warps=_WARPS, num_stages=1),
        interpret=interpret,
        name=call.name,
    )(*call.operands, *(x.reshape(-1) for x in call.arrays))
    return call.results(
        [x.reshape(shapes[i]) for x, i in zip(results, call.written, strict=True)]
    )


def _tiles(blocks: Blocks, quantized: bool) -> _Tiles:
    size = math.prod(blocks.shape)
    if size >= 2**31:
        raise NotImplementedError("the Triton kernel counts in 32 bits")
    if not quantized or blocks.axis is None:
        return _Tiles(1, 1, size, 1, 1, 1024)
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


def _load(ref: Any, index: jax.Array, mask: jax.Array | None) -> jax.Array:
    other = None if mask is None else jnp.zeros((), ref.dtype)
    x = plgpu.load(ref.at[index], mask=mask, other=other)
    wide = jnp.int32 if jnp.issubdtype(ref.dtype, jnp.integer) else jnp.float32
    return x.astype(wide)
