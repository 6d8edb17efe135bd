"""TPU: one Pallas kernel per leaf, lowered by Mosaic, in place.

The kernel works on the leaf as it lies in memory, in any number of dimensions: a
reshape or transpose that is free in the row-major picture of an array would copy the
leaf if it changed the tiled layout.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..layout import Blocks, positions, wrap
from ..step import Leaf, Program, Scalars, tile_step
from ._call import Call
from ._memory import Tiling, tiling


def leaf_step(
    program: Program,
    blocks: Blocks,
    leaf: Leaf,
    scalars: Scalars,
    key: jax.Array,
    *,
    interpret: Any = False,
) -> Leaf:
    """One step of one leaf of rank 2 or more.

    Args:
      program: what to compute.
      blocks: how the leaf is cut.
      leaf: its arrays.
      scalars: operands of the step.
      key: int32, for unbiased rounding.
      interpret: as in `pl.pallas_call`; `pltpu.InterpretParams()` simulates a TPU.

    Raises:
      NotImplementedError: for leaves that this kernel cannot take.
    """
    if len(blocks.shape) < 2:
        raise NotImplementedError("the TPU kernel takes leaves of rank 2 or more")
    call = Call(program, leaf, scalars, key)
    tiles = tiling(blocks, program.quantized)
    strides = tuple(blocks.strides[k] for k in tiles.order)
    length = None if blocks.axis is None else blocks.shape[blocks.axis]

    def kernel(*refs: Any) -> None:
        numbers, key, inputs, outputs = call.unpack(refs)
        data = _dimensions(tiles, tiles.tile)
        loaded = [_canonical(tiles, ref[...]) for ref in inputs]
        out = tile_step(
            program,
            call.leaf(loaded),
            numbers,
            axis=1,
            key=key,
            position=lambda: _positions(tiles, data, strides),
            valid=_valid(tiles, data, length),
        )
        for ref, x in zip(outputs, jax.tree.leaves(out), strict=True):
            ref[...] = _stored(tiles, x, ref.shape).astype(ref.dtype)

    def spec(x: jax.Array) -> pl.BlockSpec:
        whole = x.shape == blocks.shape
        return pl.BlockSpec(
            tiles.tile if whole else tiles.scale_tile, lambda *program_id: program_id
        )

    smem = pl.BlockSpec(memory_space=pltpu.SMEM)
    physical = [x.transpose(tiles.order) for x in call.arrays]
    specs = [spec(x) for x in call.arrays]
    results = pl.pallas_call(
        kernel,
        grid=tiles.grid,
        in_specs=[smem, smem, *specs],
        out_specs=[specs[i] for i in call.written],
        out_shape=[
            jax.ShapeDtypeStruct(physical[i].shape, physical[i].dtype)
            for i in call.written
        ],
        input_output_aliases=call.aliases,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",) * len(tiles.grid)
        ),
        interpret=interpret,
        name=call.name,
    )(*call.operands, *physical)
    back = tuple(tiles.order.index(k) for k in range(len(tiles.order)))
    return call.results([x.transpose(back) for x in results])


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
    tiles: Tiling, shape: tuple[int, ...], strides: tuple[int, ...]
) -> jax.Array:
    """Global position of each value of this tile."""
    start = jnp.int32(0)
    for k, (n, stride) in enumerate(zip(tiles.tile, strides, strict=True)):
        start = start + pl.program_id(k) * wrap(n * stride)
    if tiles.axis is None:
        return positions(shape, strides, start)
    step, last = strides[tiles.axis], len(strides) - 1
    rest = [strides[k] for k in (last - 1, last) if k != tiles.axis]
    return positions(shape, (tiles.block * step, step, *rest), start)


def _valid(
    tiles: Tiling, shape: tuple[int, ...], length: int | None
) -> jax.Array | None:
    """Which values are not beyond the end of a partial last block; None if all."""
    if tiles.axis is None or length is None or length % tiles.block == 0:
        return None
    start = pl.program_id(tiles.axis) * tiles.tile[tiles.axis]
    block = lax.broadcasted_iota(jnp.int32, shape, 0)
    within = lax.broadcasted_iota(jnp.int32, shape, 1)
    return start + block * tiles.block + within < length
