"""NVIDIA GPUs: Pallas kernels, one per leaf and pass, lowered by Triton, in place.

Each thread takes whole blocks (see `_rows`), so that none waits for another one.
Pallas' Triton backend is deprecated from JAX 0.11 on; this is the only file that knows
it.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from ..arithmetic import EXACT, QUICK, Arithmetic, using
from ..norms import tile_terms
from ..program import Leaf, Noise, Program, Scalars, wide
from ..step import (
    Advanced,
    advance,
    decoding_of,
    moved,
    new_codes,
    new_scales,
    settle,
)
from ._call import Call
from ._rows import At, Hashes, Tile, Tiling, blocked, flat

_STEP_VALUES, _SUM_VALUES = 1024, 4096  # of a program, where there are no blocks


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
    blocks, quantized = program.storage.blocks, program.storage.quantized
    call = Call(program, leaf, scalars, noise)
    quick = QUICK if interpret else _FLUSHING
    with using(quick if quantized else EXACT):
        if program.sums:
            in_blocks = quantized and program.reads_state
            tiling = blocked(blocks) if in_blocks else flat(blocks, _SUM_VALUES)
            return _sums(program, tiling, call, interpret)
        tiling = blocked(blocks) if quantized else flat(blocks, _STEP_VALUES)
        return _step(program, tiling, call, interpret)


def _step(program: Program, tiling: Tiling, call: Call, interpret: Any) -> Leaf:
    def kernel(*refs: Any) -> None:
        tile = Tile(tiling)
        layer = tile.layer(program.storage.blocks)
        numbers, noise, inputs, outputs = call.unpack(refs, layer)
        source, target = call.leaf(inputs), call.results(outputs)
        _step_tile(program, tile, source, target, numbers, noise)

    stored = [call.arrays[i] for i in call.written]
    results = pl.pallas_call(
        kernel,
        grid=(tiling.programs,),
        out_shape=[jax.ShapeDtypeStruct((x.size,), x.dtype) for x in stored],
        input_output_aliases=call.aliases,
        compiler_params=_params(tiling),
        interpret=interpret,
        name=program.name,
    )(*call.operands, *(x.reshape(-1) for x in call.arrays))
    shaped = zip(results, stored, strict=True)
    return call.results([x.reshape(like.shape) for x, like in shaped])


def _step_tile(
    program: Program,
    tile: Tile,
    source: Leaf,
    target: Leaf,
    numbers: Scalars,
    noise: Noise,
) -> None:
    """Step the blocks of a tile, from references to references."""
    scales, decoding = _scales(program, tile, source)
    hashes = Hashes(tile, program.storage.blocks, noise)
    rows: list[Leaf] = []
    results: list[tuple[Any, Any, Any]] = []
    new: list[Advanced] = []
    randoms = [hashes.of_slab(k) for k in range(tile.tiling.slabs)]
    for k, random in enumerate(randoms):
        at = tile.slab(k)
        row = _load(_values(source), at)
        broad = wide(program, row, numbers)
        rows.append(row)
        new.append(advance(program, broad, numbers, at.exist, decoding))
        # Before it is known whether the block is kept: what p is made of would take two
        # registers for each row, and it takes one.
        results.append(moved(program, row, broad, new[k], numbers, random, None))
    settled = settle(
        program,
        _largest(tile.tiling, [x.magnitudes for x in new]),
        new[-1].finite,
        numbers,
    )
    # What is not kept is not stored. With one comparison alone for a condition, ptxas
    # makes a branch around each store; with two, the stores are predicated.
    keep = settled.keep & tile.exists
    found = new_scales(settled, scales, scales, None)
    _store(target.scales, found, tile.scales, keep)
    for k, (g, p, remainder) in enumerate(results):
        _store(target.remainder, remainder, tile.slab(k), keep)
        if program.in_place:
            _store(target.p, p, tile.slab(k), keep)
        else:
            update = jnp.where(settled.keep, g, -0.0)
            _store(target.g, update, tile.slab(k), tile.exists)
    for k, (row, random) in enumerate(zip(rows, randoms, strict=True)):
        broad = wide(program, row, numbers)
        codes = new_codes(program, row, broad, new[k], settled, random, None)
        _store(target.codes, codes, tile.slab(k), keep)


def _sums(program: Program, tiling: Tiling, call: Call, interpret: Any) -> jax.Array:
    """Sums over each layer, float32 of shape (sums, layers).

    Each program writes one number for each sum, without atomics, so that they are
    added up in one order; that is done outside.
    """
    blocks, count = program.storage.blocks, len(program.sums)

    def kernel(*refs: Any) -> None:
        tile = Tile(tiling)
        numbers, _, inputs, (out,) = call.unpack(refs, tile.layer(blocks))
        source = call.leaf(inputs)
        decoding = _scales(program, tile, source)[1] if source.codes else None
        totals = [jnp.float32(0.0)] * count
        for k in range(tiling.slabs):
            at = tile.slab(k)
            row = _load(_values(source), at)
            terms = tile_terms(program, row, numbers, at.exist, decoding)
            totals = [x + y for x, y in zip(totals, terms, strict=True)]
        for k, x in enumerate(totals):
            x = jnp.sum(x, axis=0)  # of each thread, before threads exchange sums
            plgpu.store(out.at[k * tiling.programs + pl.program_id(0)], jnp.sum(x))

    partial = pl.pallas_call(
        kernel,
        grid=(tiling.programs,),
        out_shape=jax.ShapeDtypeStruct((count * tiling.programs,), jnp.float32),
        compiler_params=_params(tiling),
        interpret=interpret,
        name=program.name,
    )(*call.operands, *(x.reshape(-1) for x in call.arrays))
    outer = blocks.shape[: blocks.axis] if blocks.layers else ()
    rest = tuple(1 + k for k in range(len(outer)) if k not in blocks.layers)
    totals = jnp.sum(partial.reshape(count, *outer, -1), axis=(*rest, -1))
    return totals.reshape(count, -1)


def _params(tiling: Tiling) -> Any:
    return plgpu.CompilerParams(num_warps=tiling.warps, num_stages=1)


def _scales(
    program: Program, tile: Tile, source: Leaf
) -> tuple[tuple[Any, ...], list[Any]]:
    """The scales of a tile, and what is made of them for its rows."""
    scales = _load(source.scales, tile.scales)
    return scales, decoding_of(
        program, [None if x is None else x.astype(jnp.float32) for x in scales]
    )


def _values(leaf: Leaf) -> Leaf:
    """Without what is one number for each block."""
    return leaf._replace(scales=(None,) * len(leaf.scales))


def _largest(
    tiling: Tiling, magnitudes: Sequence[tuple[jax.Array, ...]]
) -> list[jax.Array]:
    """The largest of each block, from those of each value of each row."""
    slots = zip(*magnitudes, strict=True)
    found = [functools.reduce(jnp.maximum, rows) for rows in slots]
    for axis in (0, tiling.within):
        if tiling.shape[axis] > 1:
            found = [jnp.max(x, axis=axis, keepdims=True) for x in found]
    return found


def _load(refs: Any, at: At) -> Any:
    """A tree of arrays from one of references."""

    def load(ref: Any) -> jax.Array:
        other = None if at.exist is None else jnp.zeros((), ref.dtype)
        return plgpu.load(ref.at[at.offsets], mask=at.exist, other=other)

    return jax.tree.map(load, refs)


def _store(refs: Any, arrays: Any, at: At, keep: jax.Array) -> None:
    def store(ref: Any, x: jax.Array) -> None:
        mask = jnp.broadcast_to(keep, x.shape)
        mask = mask if at.exist is None else mask & at.exist
        plgpu.store(ref.at[at.offsets], x.astype(ref.dtype), mask=mask)

    jax.tree.map(store, refs, arrays)


def _flushing(instruction: str) -> Callable[[jax.Array], jax.Array]:
    """An approximation by the hardware alone, which takes denormal numbers for zeros.

    Otherwise the compiler scales them up and down again: a comparison, two products.
    """

    def approximate(x: jax.Array) -> jax.Array:
        (y,) = plgpu.elementwise_inline_asm(
            f"{instruction}.approx.ftz.f32 $0, $1;",
            args=[x],
            constraints="=f,f",
            pack=1,
            result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, jnp.float32)],
        )
        return y

    return approximate


_FLUSHING = Arithmetic(_flushing("rsqrt"), _flushing("rcp"))
