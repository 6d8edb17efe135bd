"""TPU: Pallas kernels, one per leaf and pass, lowered by Mosaic, in place.

The kernel works on the leaf as it lies in memory, in any number of dimensions: a
reshape or transpose that is free in the row-major picture of an array would copy the
leaf if it changed the tiled layout.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..layout import Blocks, positions, wrap
from ..norms import Sum, read, tile_terms
from ..rounding import Noise
from ..step import Leaf, Program, Scalars, tile_step
from ._call import Call, StepCall
from ._memory import Tiling, tiling


def leaf_step(
    program: Program,
    blocks: Blocks,
    leaf: Leaf,
    scalars: Scalars,
    noise: Noise,
    *,
    interpret: Any = False,
) -> Leaf:
    """One step of one leaf of rank 2 or more.

    Args:
      program: what to compute.
      blocks: how the leaf is cut.
      leaf: its arrays.
      scalars: operands of the step.
      noise: for unbiased rounding.
      interpret: as in `pl.pallas_call`; `pltpu.InterpretParams()` simulates a TPU.

    Raises:
      NotImplementedError: for leaves that this kernel cannot take.
    """
    tiles = _tiles(blocks, program.quantized)
    call = StepCall(program, leaf, scalars, noise)
    strides = tuple(blocks.strides[k] for k in tiles.order)

    def kernel(*refs: Any) -> None:
        numbers, inputs, (start, *outputs) = call.unpack(refs, _layer(tiles, blocks))
        data = _dimensions(tiles, tiles.tile)
        loaded = [_canonical(tiles, ref[...]) for ref in inputs]
        out = tile_step(
            program,
            call.leaf(loaded),
            numbers,
            axis=1,
            key=start[0],
            position=lambda: _positions(tiles, data, strides, start[1]),
            valid=_valid(tiles, data, blocks, everywhere=False),
        )
        for ref, x in zip(outputs, jax.tree.leaves(out), strict=True):
            ref[...] = _stored(tiles, x, ref.shape).astype(ref.dtype)

    specs, physical = _specs(tiles, blocks, call), _physical(tiles, call)
    results = pl.pallas_call(
        kernel,
        grid=tiles.grid,
        in_specs=[_SMEM, _SMEM, *specs],
        out_specs=[specs[i] for i in call.written],
        out_shape=[
            jax.ShapeDtypeStruct(physical[i].shape, physical[i].dtype)
            for i in call.written
        ],
        input_output_aliases=call.aliases,
        compiler_params=_parallel(tiles),
        interpret=interpret,
        name=call.name,
    )(*call.operands, *physical)
    back = tuple(tiles.order.index(k) for k in range(len(tiles.order)))
    return call.results([x.transpose(back) for x in results])


def leaf_sums(
    program: Program,
    blocks: Blocks,
    leaf: Leaf,
    scalars: Scalars,
    sums: Sequence[Sum],
    *,
    interpret: Any = False,
) -> jax.Array:
    """Sums over each layer of one leaf of rank 2 or more, float32 (sums, layers).

    Each tile writes what it adds up, one number for each lane and sum, so that tiles
    may run in any order and on any core; those are added up outside.

    Raises:
      NotImplementedError: for leaves that this kernel cannot take.
    """
    leaf = read(program, leaf, sums)
    tiles = _tiles(blocks, program.quantized and bool(leaf.codes))
    call = Call(leaf, scalars)

    def kernel(*refs: Any) -> None:
        numbers, inputs, (out,) = call.unpack(refs, _layer(tiles, blocks))
        data = _dimensions(tiles, tiles.tile)
        loaded = [_canonical(tiles, ref[...]) for ref in inputs]
        valid = _valid(tiles, data, blocks, everywhere=True)
        terms = tile_terms(program, call.leaf(loaded), numbers, sums, valid)
        within = tuple(range(len(data) - 1))
        rows = [jnp.sum(x, axis=within).reshape(1, -1) for x in terms]
        for k, row in enumerate(rows):
            out[k : k + 1, :] = row

    lanes = _dimensions(tiles, tiles.tile)[-1]
    none = (None,) * len(tiles.grid)
    partial = pl.pallas_call(
        kernel,
        grid=tiles.grid,
        in_specs=[_SMEM, *_specs(tiles, blocks, call)],
        out_specs=pl.BlockSpec(
            (*none, len(sums), lanes), lambda *program_id: (*program_id, 0, 0)
        ),
        out_shape=jax.ShapeDtypeStruct((*tiles.grid, len(sums), lanes), jnp.float32),
        compiler_params=_parallel(tiles),
        interpret=interpret,
        name="octavo_sums_" + "_".join(sums),
    )(*call.operands, *_physical(tiles, call))
    rest = [k for k, axis in enumerate(tiles.order) if axis not in blocks.layers]
    totals = jnp.sum(partial, axis=(*rest, partial.ndim - 1))
    return totals.reshape(-1, len(sums)).T


_SMEM = pl.BlockSpec(memory_space=pltpu.SMEM)


def _tiles(blocks: Blocks, quantized: bool) -> Tiling:
    """The tiling of a leaf; each tile lies in one layer."""
    if len(blocks.shape) < 2:
        raise NotImplementedError("the TPU kernel takes leaves of rank 2 or more")
    tiles = tiling(blocks, quantized)
    if any(tiles.tile[tiles.order.index(k)] > 1 for k in blocks.layers):
        raise NotImplementedError("layers on sublanes or lanes are left to XLA")
    return tiles


def _layer(tiles: Tiling, blocks: Blocks) -> Any:
    """Index of the layer that this tile lies in."""
    index = jnp.int32(0)
    for axis in blocks.layers:
        k = tiles.order.index(axis)
        index = index * tiles.grid[k] + pl.program_id(k)
    return index


def _specs(tiles: Tiling, blocks: Blocks, call: Call) -> list[pl.BlockSpec]:
    shapes = [
        tiles.tile if x.shape == blocks.shape else tiles.scale_tile for x in call.arrays
    ]
    return [pl.BlockSpec(shape, lambda *program_id: program_id) for shape in shapes]


def _physical(tiles: Tiling, call: Call) -> list[jax.Array]:
    return [x.transpose(tiles.order) for x in call.arrays]


def _parallel(tiles: Tiling) -> pltpu.CompilerParams:
    # Blocks along lanes are transposed, which takes the tile's memory again: 20 of the
    # 16 MiB that v5e and v5p give a kernel unless told (they have 64 and more).
    on_lanes = tiles.axis == len(tiles.order) - 1
    return pltpu.CompilerParams(
        dimension_semantics=("parallel",) * len(tiles.grid),
        vmem_limit_bytes=32 * 2**20 if on_lanes else None,
    )


def _dimensions(tiles: Tiling, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape in the kernel: (blocks, values of a block, the rest), or the tile's own."""
    axis, sublane, lane = tiles.axis, len(shape) - 2, len(shape) - 1
    if axis is None:
        return shape
    within = tiles.block if shape[axis] == tiles.tile[axis] else 1
    split = (shape[axis] // within, within)
    return (*split, *(shape[k] for k in (sublane, lane) if k != axis))


def _canonical(tiles: Tiling, x: jax.Array) -> jax.Array:
    """Move the blocked axis to the front and cut it. In 32 bits, where it is cheap."""
    shape = _dimensions(tiles, x.shape)
    x = _widen(x)
    if tiles.axis == x.ndim - 1:
        x = x.reshape(x.shape[-2:]).T
    return x.reshape(shape)


def _stored(tiles: Tiling, x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The inverse of `_canonical`."""
    if tiles.axis == len(shape) - 1:
        x = x.reshape(shape[-1], shape[-2]).T
    return x.reshape(shape)


def _widen(x: jax.Array) -> jax.Array:
    wide = jnp.int32 if jnp.issubdtype(x.dtype, jnp.integer) else jnp.float32
    return x.astype(wide)


def _positions(
    tiles: Tiling, shape: tuple[int, ...], strides: tuple[int, ...], start: jax.Array
) -> jax.Array:
    """Global position of each value of this tile, the leaf's first being `start`."""
    for k, (n, stride) in enumerate(zip(tiles.tile, strides, strict=True)):
        start = start + pl.program_id(k) * wrap(n * stride)
    if tiles.axis is None:
        return positions(shape, strides, start)
    step, last = strides[tiles.axis], len(strides) - 1
    rest = [strides[k] for k in (last - 1, last) if k != tiles.axis]
    return positions(shape, (tiles.block * step, step, *rest), start)


def _valid(
    tiles: Tiling, shape: tuple[int, ...], blocks: Blocks, everywhere: bool
) -> jax.Array | None:
    """Which values exist: in the last block, or `everywhere`; None if all do."""
    valid = None
    for k, axis in enumerate(tiles.order):
        unit = tiles.block if k == tiles.axis else 1
        if blocks.shape[axis] % (tiles.tile[k] if everywhere else unit) == 0:
            continue
        index = pl.program_id(k) * tiles.tile[k] + _index(tiles, shape, k)
        exists = index < blocks.shape[axis]
        valid = exists if valid is None else valid & exists
    return valid


def _index(tiles: Tiling, shape: tuple[int, ...], k: int) -> jax.Array:
    """Index of each value of a tile along axis k of the memory order."""
    if tiles.axis is None:
        return lax.broadcasted_iota(jnp.int32, shape, k)
    if k == tiles.axis:
        block = lax.broadcasted_iota(jnp.int32, shape, 0)
        return block * tiles.block + lax.broadcasted_iota(jnp.int32, shape, 1)
    last = len(tiles.order) - 1
    rest = [n for n in (last - 1, last) if n != tiles.axis]
    return lax.broadcasted_iota(jnp.int32, shape, 2 + rest.index(k))
