"""TPU: Pallas kernels, one per leaf and pass, lowered by Mosaic, in place.

The kernel works on the leaf in its order in memory, in any number of dimensions: a
reshape or transpose that is free in the row-major picture of an array would copy the
leaf if it changed the tiled layout.

A tile is worked on in slabs, a few registers of whole blocks that stay in registers
from load to store.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..arithmetic import EXACT, QUICK, Arithmetic, using
from ..layout import Blocks
from ..norms import tile_terms
from ..program import Leaf, Noise, Program, Scalars, wide
from ..step import Advanced, advance, decoding_of, new_scales, settle, write
from ._call import Call
from ._memory import Tiling, tiling
from ._slabs import Part, Slab

# float16 has no vectors: "Invalid vector type for load" (libtpu 0.0.52).
DTYPES = (jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16))


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
    quick = QUICK if interpret else _HARDWARE
    with using(quick if program.storage.quantized else EXACT):
        if program.sums:
            return _sums(program, tiles, call, interpret)
        return _step(program, tiles, call, interpret)


# v5e and v5p refine an exact reciprocal in ten operations. JAX 0.11 has moved it.
_reciprocal: Any = getattr(pltpu, "reciprocal", None) or pl.reciprocal
_HARDWARE = Arithmetic(lax.rsqrt, lambda x: _reciprocal(x, approx=True))


def _step(program: Program, tiles: Tiling, call: Call, interpret: Any) -> Leaf:
    blocks = program.storage.blocks

    def kernel(*refs: Any) -> None:
        unpacked = call.unpack(refs, _layer(tiles, blocks))
        kernel, corner = _Kernel(program, tiles, call, *unpacked), _corner(tiles)
        # The first time as if every block were finite. Where one was not, once more:
        # the inputs are still there.
        fast = functools.partial(_write, kernel, True)
        bad = _for_each_part(tiles, corner, fast)

        @pl.when(jnp.max(bad) > 0.0)
        def _() -> None:
            slow = functools.partial(_write, kernel, False)
            _for_each_part(tiles, corner, slow)

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


class _Kernel(NamedTuple):
    """What a kernel is given, static and references."""

    program: Program
    tiles: Tiling
    call: Call
    numbers: Scalars
    noise: Noise
    inputs: list[Any]
    outputs: list[Any]


def _write(kernel: _Kernel, all_kept: bool, part: Part, bad: jax.Array) -> jax.Array:
    """Step a part; 1 where a block was not finite, or what is `bad` already."""
    program, call, blocks = kernel.program, kernel.call, kernel.program.storage.blocks
    strides = tuple(blocks.strides[k] for k in kernel.tiles.order)
    scales = _scales(part, call, kernel.inputs)
    decoding = decoding_of(program, scales)
    values, scale_refs = call.sorted(kernel.outputs)
    made: list[list[jax.Array]] = [[] for _ in scale_refs]
    for group in part.groups():
        rows = [_advanced(kernel, slab, decoding) for slab in group.slabs]
        magnitudes = zip(*(new.magnitudes for *_, new in rows), strict=True)
        largest = [group.largest(list(x)) for x in magnitudes]
        found = settle(program, largest, rows[0][-1].finite, kernel.numbers)
        for k, (slab, row) in enumerate(zip(group.slabs, rows, strict=True)):
            random, mine = slab.random(strides, kernel.noise), group.row(k, found)
            out = write(program, *row, mine, kernel.numbers, random, all_kept=all_kept)
            for ref, x in zip(values, jax.tree.leaves(out), strict=True):
                slab.store(ref, x)
        old = jax.tree.map(group.of_part, scales)
        new = new_scales(found, old, old, None if all_kept else found.keep)
        for pieces, x in zip(made, jax.tree.leaves(new), strict=True):
            pieces.append(x)
        if all_kept:
            exist = group.exist(blocks)
            bad = jnp.maximum(bad, _not_kept(found.keep, exist, bad.shape))
    for ref, pieces in zip(scale_refs, made, strict=True):
        part.store_scales(ref, pieces)
    return bad


def _advanced(
    kernel: _Kernel, slab: Slab, decoding: list[Any]
) -> tuple[Leaf, Leaf, Advanced]:
    """A slab as stored, wide, and after the rule."""
    leaf = _loaded(slab, kernel.call, kernel.inputs)
    tile = wide(kernel.program, leaf, kernel.numbers)
    of_slab = jax.tree.map(slab.scales, decoding)
    valid = slab.valid(kernel.program.storage.blocks, everywhere=False)
    return leaf, tile, advance(kernel.program, tile, kernel.numbers, valid, of_slab)


def _scales(part: Part, call: Call, inputs: list[Any]) -> tuple[Any, ...]:
    """Of all blocks of a part, for each slot."""
    arrays = [
        part.load_scales(ref) if scaled else None
        for ref, scaled in zip(inputs, call.scaled, strict=True)
    ]
    return call.leaf(arrays).scales


def _loaded(slab: Slab, call: Call, inputs: list[Any]) -> Leaf:
    """The values of a slab."""
    arrays = [
        None if scaled else slab.load(ref)
        for ref, scaled in zip(inputs, call.scaled, strict=True)
    ]
    return call.leaf(arrays)


def _not_kept(
    keep: jax.Array, exist: jax.Array | None, shape: tuple[int, ...]
) -> jax.Array:
    """1.0 where a block that exists does not take the step, in the last dimension."""
    kept = keep if exist is None else keep | ~exist
    bad = jnp.where(kept, 0.0, 1.0)
    return jnp.max(bad, axis=tuple(range(bad.ndim - 1))).reshape(shape)


def _sums(program: Program, tiles: Tiling, call: Call, interpret: Any) -> jax.Array:
    """Sums over each layer, float32 (sums, layers).

    Each tile writes what it adds up, one number for each lane and sum, so that tiles
    may run in any order and on any core; those are added up outside.
    """
    blocks, count = program.storage.blocks, len(program.sums)

    def kernel(*refs: Any) -> None:
        numbers, _, inputs, (out,) = call.unpack(refs, _layer(tiles, blocks))
        out[...] = jnp.zeros(out.shape, out.dtype)

        def add(part: Part, carry: jax.Array) -> jax.Array:
            for k, x in enumerate(_terms(part, program, call, numbers, inputs)):
                row = jnp.sum(x, axis=tuple(range(x.ndim - 1))).reshape(1, -1)
                out[k : k + 1, part.lanes] += row
            return carry

        _for_each_part(tiles, _corner(tiles), add)

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


def _terms(
    part: Part, program: Program, call: Call, numbers: Scalars, inputs: list[Any]
) -> list[jax.Array]:
    """What a part adds to each sum, its slabs added up."""
    decoding = None
    if program.reads_state:
        decoding = decoding_of(program, _scales(part, call, inputs))
    totals: list[jax.Array] = []
    for slab in (slab for group in part.groups() for slab in group.slabs):
        of_slab = jax.tree.map(slab.scales, decoding)
        valid = slab.valid(program.storage.blocks, everywhere=True)
        leaf = _loaded(slab, call, inputs)
        terms = tile_terms(program, leaf, numbers, valid, of_slab)
        pairs = zip(totals, terms, strict=True)
        totals = [x + y for x, y in pairs] if totals else terms
    return totals


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
    return pltpu.CompilerParams(
        dimension_semantics=("parallel",) * len(tiles.grid),
        # Two tiles of everything, and what is spilled. v5e and v5p give a kernel 16 MiB
        # by default; every generation has 64 and more.
        vmem_limit_bytes=32 * 2**20,
    )


def _corner(tiles: Tiling) -> tuple[jax.Array, ...]:
    """Index in the leaf of the tile, outside of branches: as the interpreter wants."""
    return tuple(pl.program_id(k) * n for k, n in enumerate(tiles.tile))


def _for_each_part(
    tiles: Tiling,
    corner: tuple[jax.Array, ...],
    function: Callable[[Part, jax.Array], jax.Array],
) -> jax.Array:
    """In the kernel: work on the parts of the tile, one after another.

    The function takes and returns what they carry on: one row of numbers, at first 0.
    """
    parts = tiles.parts

    def body(index: jax.Array, carry: jax.Array) -> jax.Array:
        starts: list[Any] = []
        for n, length in zip(reversed(parts.grid), reversed(parts.tile), strict=True):
            k: Any = 0 if n == 1 else lax.rem(index, jnp.int32(n))
            starts.append(k if n == 1 else pl.multiple_of(k * length, length))
            index = lax.div(index, jnp.int32(n))
        return function(Part(tiles, parts, corner, tuple(reversed(starts))), carry)

    nothing = jnp.zeros((1, parts.dimensions[-1]), jnp.float32)
    if math.prod(parts.grid) == 1:
        return body(jnp.int32(0), nothing)
    return lax.fori_loop(0, math.prod(parts.grid), body, nothing)
