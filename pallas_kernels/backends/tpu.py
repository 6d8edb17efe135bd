"""TPU: Pallas kernels, one per leaf and pass, lowered by Mosaic, in place.

The kernel works on the leaf in its order in memory, in any number of dimensions: a
reshape or transpose that is free in the row-major picture of an array would copy the
leaf if it changed the tiled layout.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..formats import widened
from ..layout import Blocks, positions, wrap
from ..norms import tile_terms
from ..program import Leaf, Noise, Program, Scalars
from ..step import tile_step
from ._call import Call
from ._memory import Tiling, tiling


def refuses(program: Program) -> str | None:
    """Why the kernel cannot take a leaf."""
    blocks = program.storage.blocks
    if len(blocks.shape) < 2:
        return "the TPU kernel takes leaves of rank 2 or more"
    tiles = _tiles(program)
    if any(tiles.tile[tiles.order.index(k)] > 1 for k in blocks.layers):
        return "layers on sublanes or lanes are left to XLA"
    if not tiles.fits:
        return f"blocks of {tiles.block} along lanes take more memory than it has"
    return None


def run(
    program: Program,
    leaf: Leaf,
    scalars: Scalars,
    noise: Noise,
    *,
    interpret: Any = False,
) -> Any:
    """One pass over one leaf.

    Args:
      program: what to compute.
      leaf: the arrays that it reads.
      scalars: operands of the step.
      noise: for unbiased rounding.
      interpret: as in `pl.pallas_call`; `pltpu.InterpretParams()` simulates a TPU.
    """
    tiles, call = _tiles(program), Call(program, leaf, scalars, noise)
    if program.sums:
        return _sums(program, tiles, call, interpret)
    return _step(program, tiles, call, interpret)


def _step(program: Program, tiles: Tiling, call: Call, interpret: Any) -> Leaf:
    blocks = program.storage.blocks
    strides = tuple(blocks.strides[k] for k in tiles.order)

    def kernel(*refs: Any) -> None:
        layer = _layer(tiles, blocks)
        numbers, noise, inputs, outputs = call.unpack(refs, layer)

        def part(at: _Part) -> None:
            out = tile_step(
                program,
                call.leaf(at.loaded(call, inputs)),
                numbers,
                largest=lambda x: jnp.max(x, axis=1, keepdims=True),
                noise=noise,
                position=lambda: at.positions(strides, noise.origin),
                valid=at.valid(blocks, everywhere=False),
            )
            results = zip(outputs, jax.tree.leaves(out), call.written, strict=True)
            for ref, x, i in results:
                at.store(ref, x, call.scaled[i])

        _for_each_part(tiles, part)

    specs, physical = _specs(tiles, call), _physical(tiles, call)
    results = pl.pallas_call(
        kernel,
        grid=tiles.grid,
        in_specs=[_SMEM for _ in call.operands] + specs,
        out_specs=[specs[i] for i in call.written],
        out_shape=[
            jax.ShapeDtypeStruct(physical[i].shape, physical[i].dtype)
            for i in call.written
        ],
        input_output_aliases=call.aliases,
        compiler_params=_parallel(tiles),
        interpret=interpret,
        name=program.name,
    )(*call.operands, *physical)
    back = tuple(tiles.order.index(k) for k in range(len(tiles.order)))
    return call.results([x.transpose(back) for x in results])


def _sums(program: Program, tiles: Tiling, call: Call, interpret: Any) -> jax.Array:
    """Sums over each layer, float32 (sums, layers).

    Each tile writes what it adds up, one number for each lane and sum, so that tiles
    may run in any order and on any core; those are added up outside.
    """
    blocks, count = program.storage.blocks, len(program.sums)

    def kernel(*refs: Any) -> None:
        numbers, _, inputs, (out,) = call.unpack(refs, _layer(tiles, blocks))
        out[...] = jnp.zeros(out.shape, out.dtype)

        def part(at: _Part) -> None:
            valid = at.valid(blocks, everywhere=True)
            leaf = call.leaf(at.loaded(call, inputs))
            for k, x in enumerate(tile_terms(program, leaf, numbers, valid)):
                row = jnp.sum(x, axis=tuple(range(x.ndim - 1))).reshape(1, -1)
                out[k : k + 1, at.lanes] += row

        _for_each_part(tiles, part)

    lanes = tiles.dimensions[-1]
    none = (None,) * len(tiles.grid)
    partial = pl.pallas_call(
        kernel,
        grid=tiles.grid,
        in_specs=[_SMEM for _ in call.operands] + _specs(tiles, call),
        out_specs=pl.BlockSpec(
            (*none, count, lanes), lambda *program_id: (*program_id, 0, 0)
        ),
        out_shape=jax.ShapeDtypeStruct((*tiles.grid, count, lanes), jnp.float32),
        compiler_params=_parallel(tiles),
        interpret=interpret,
        name=program.name,
    )(*call.operands, *_physical(tiles, call))
    rest = [k for k, axis in enumerate(tiles.order) if axis not in blocks.layers]
    totals = jnp.sum(partial, axis=(*rest, partial.ndim - 1))
    return totals.reshape(-1, count).T


_SMEM = pl.BlockSpec(memory_space=pltpu.SMEM)


def _tiles(program: Program) -> Tiling:
    """Blocks matter only where the pass reads them."""
    in_blocks = program.storage.quantized and program.reads_state
    return tiling(program.storage.blocks, in_blocks)


def _layer(tiles: Tiling, blocks: Blocks) -> Any:
    """Index of the layer that this tile is a part of."""
    index = jnp.int32(0)
    for axis in blocks.layers:
        k = tiles.order.index(axis)
        index = index * tiles.grid[k] + pl.program_id(k)
    return index


def _specs(tiles: Tiling, call: Call) -> list[pl.BlockSpec]:
    shapes = [tiles.scale_tile if scaled else tiles.tile for scaled in call.scaled]
    return [pl.BlockSpec(shape, lambda *program_id: program_id) for shape in shapes]


def _physical(tiles: Tiling, call: Call) -> list[jax.Array]:
    return [x.transpose(tiles.order) for x in call.arrays]


def _parallel(tiles: Tiling) -> pltpu.CompilerParams:
    # Blocks along lanes are transposed, which takes the tile's memory again: 20 of the
    # 16 MiB that v5e and v5p give a kernel by default (they have 64 and more).
    on_lanes = tiles.axis == len(tiles.order) - 1
    return pltpu.CompilerParams(
        dimension_semantics=("parallel",) * len(tiles.grid),
        vmem_limit_bytes=32 * 2**20 if on_lanes else None,
    )


def _for_each_part(tiles: Tiling, function: Callable[["_Part"], None]) -> None:
    """In the kernel: work on the parts of the tile, one after another."""
    parts = tiles.parts

    def body(index: jax.Array, carry: None) -> None:
        starts: list[Any] = []
        for n, length in zip(reversed(parts.grid), reversed(parts.tile), strict=True):
            k: Any = 0 if n == 1 else lax.rem(index, jnp.int32(n))
            starts.append(k if n == 1 else pl.multiple_of(k * length, length))
            index = lax.div(index, jnp.int32(n))
        function(_Part(tiles, parts, tuple(reversed(starts))))
        return carry

    if math.prod(parts.grid) == 1:
        body(jnp.int32(0), None)
    else:
        lax.fori_loop(0, math.prod(parts.grid), body, None)


class _Part(NamedTuple):
    """In the kernel: a part of a tile, which starts at these indices in the tile."""

    tiles: Tiling
    part: Tiling
    starts: tuple[Any, ...]

    @property
    def lanes(self) -> Any:
        """Where the part's last dimension is in the tile's."""
        if self.part.axis == len(self.starts) - 1:
            return slice(None)
        return pl.ds(self.starts[-1], self.part.tile[-1])

    def _slices(self, scaled: bool) -> tuple[Any, ...]:
        def along(k: int) -> Any:
            start, length = self.starts[k], self.part.tile[k]
            if scaled and k == self.part.axis:
                length //= self.part.block
                if not isinstance(start, int):
                    start = pl.multiple_of(lax.div(start, self.part.block), length)
            return pl.ds(start, length)

        return tuple(along(k) for k in range(len(self.starts)))

    def loaded(self, call: Call, refs: list[Any]) -> list[jax.Array]:
        """The arrays, the blocked axis in front and split. In 32 bits: cheap there."""
        arrays = []
        for ref, scaled in zip(refs, call.scaled, strict=True):
            x = widened(ref[self._slices(scaled)])
            shape = self.part.dimensions
            if scaled and self.part.axis is not None:
                shape = (shape[0], 1, *shape[2:])
            if self.part.axis == x.ndim - 1:
                x = x.reshape(x.shape[-2:]).T
            arrays.append(x.reshape(shape))
        return arrays

    def store(self, ref: Any, x: jax.Array, scaled: bool) -> None:
        """A result as it is in memory again."""
        shape = self.part.scale_tile if scaled else self.part.tile
        if self.part.axis == len(shape) - 1:
            x = x.reshape(shape[-1], shape[-2]).T
        ref[self._slices(scaled)] = x.reshape(shape).astype(ref.dtype)

    def _first(self, k: int) -> Any:
        """Index in the leaf, along axis k of the memory order, of the first value."""
        return pl.program_id(k) * self.tiles.tile[k] + self.starts[k]

    def positions(self, strides: tuple[int, ...], start: jax.Array) -> jax.Array:
        """Global position of each value, the leaf's first being `start`."""
        for k, stride in enumerate(strides):
            start = start + self._first(k) * wrap(stride)
        shape, axis = self.part.dimensions, self.part.axis
        if axis is None:
            return positions(shape, strides, start)
        step, last = strides[axis], len(strides) - 1
        rest = [strides[k] for k in (last - 1, last) if k != axis]
        return positions(shape, (self.part.block * step, step, *rest), start)

    def valid(self, blocks: Blocks, everywhere: bool) -> jax.Array | None:
        """Which values exist: in the last block, or `everywhere`; None if all do."""
        valid = None
        for k, axis in enumerate(self.part.order):
            unit = self.part.block if k == self.part.axis else 1
            unit = self.tiles.tile[k] if everywhere else unit
            if blocks.shape[axis] % unit == 0:
                continue
            exists = self._first(k) + self._index(k) < blocks.shape[axis]
            valid = exists if valid is None else valid & exists
        return valid

    def _index(self, k: int) -> jax.Array:
        """Index of each value in the part along axis k of the memory order."""
        shape, axis = self.part.dimensions, self.part.axis
        if axis is None:
            return lax.broadcasted_iota(jnp.int32, shape, k)
        if k == axis:
            block = lax.broadcasted_iota(jnp.int32, shape, 0) * self.part.block
            return block + lax.broadcasted_iota(jnp.int32, shape, 1)
        last = len(self.part.order) - 1
        rest = [n for n in (last - 1, last) if n != axis]
        return lax.broadcasted_iota(jnp.int32, shape, 2 + rest.index(k))
