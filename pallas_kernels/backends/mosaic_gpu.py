"""NVIDIA GPUs from Hopper on: a Pallas kernel for each leaf, lowered by Mosaic GPU.

It stands beside Triton's, which Pallas deprecates from JAX 0.11 on, and takes what most
of a model is: blocks of 8, 16 or 32 values down rows of whole tiles. The 128 threads of
a warpgroup take 128 columns of a row of blocks. The rows of a block are as many vectors
in the kernel's Python, so each thread has whole blocks, and waits for none.

It is only run where it is named: no device has run it yet.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .. import rounding
from ..arithmetic import QUICK, using
from ..layout import Blocks, wrap
from ..program import Leaf, Noise, Program, Scalars, wide
from ..step import Advanced, Random, advance, decoding_of, new_scales, settle, write
from ._call import Call

_COLUMNS = 128  # of a tile: one for each thread of a warpgroup
_BLOCKS = (8, 16, 32)  # as many float32 values of each slot stay in registers
_GRID = "tile"
_LAYOUT = plgpu.Layout.WG_STRIDED((_COLUMNS,), vec_size=1)
# Mosaic GPU lowers what these do; dynamic8, for one, takes `floor`.
_FORMATS = ("32bit", "bf16", "bits8", "mulaw8", "mulaw16", "ratio8")


def refuses(program: Program) -> str | None:
    """Why the kernel cannot take a leaf."""
    storage, blocks = program.storage, program.storage.blocks
    if program.sums:
        return "the Mosaic GPU kernel has no sums"
    if not storage.quantized or blocks.axis is None:
        return "the Mosaic GPU kernel takes leaves with blocks"
    if blocks.layers:
        return "the Mosaic GPU kernel takes no layers"
    if not all(form.name in _FORMATS for form in storage.formats):
        return f"the Mosaic GPU kernel takes formats of {', '.join(_FORMATS)}"
    if blocks.size not in _BLOCKS or blocks.shape[blocks.axis] % blocks.size:
        return "the Mosaic GPU kernel takes whole blocks of 8, 16 or 32 values"
    if math.prod(blocks.shape) >= 2**31:
        return "the Mosaic GPU kernel counts in 32 bits"
    if _inner(blocks) % _COLUMNS:
        return f"the Mosaic GPU kernel takes rows of a multiple of {_COLUMNS} values"
    inside = range(blocks.axis + 1, len(blocks.shape) - 1)
    if any(blocks.strides[k] != math.prod(blocks.shape[k + 1 :]) for k in inside):
        return "the Mosaic GPU kernel takes rows that are contiguous in the whole leaf"
    return None


def run(
    program: Program,
    leaf: Leaf,
    scalars: Scalars,
    noise: Noise,
    *,
    interpret: Any = False,
) -> Leaf:
    """A step of one leaf. The arguments are those of `backends.tpu.run`."""
    call = Call(program, leaf, scalars, noise)
    inner = _inner(program.storage.blocks)

    def kernel(*refs: Any) -> None:
        large = refs[len(call.operands) :]
        refs = *refs, *(large[i] for i in call.written)  # written where they are
        numbers, start, inputs, outputs = call.unpack(refs, 0)
        source, target = call.leaf(inputs), call.results(outputs)
        column = lax.broadcasted_iota(jnp.int32, (_COLUMNS,), 0)
        if not interpret:  # no interpreter knows layouts, and nothing else has one
            column = plgpu.layout_cast(column, _LAYOUT)
        _step_tile(program, column, source, target, numbers, start)

    tiles = math.prod(program.storage.blocks.scale_shape) // _COLUMNS
    arrays: list[Any] = [x.reshape(-1, inner) for x in call.arrays]
    for i in call.written:
        arrays[i] = jax.new_ref(arrays[i], memory_space=plgpu.GMEM)
    with using(QUICK):
        pl.kernel(
            kernel,
            mesh=plgpu.Mesh(grid=(tiles,), grid_names=(_GRID,)),
            # No barriers around loads and stores: a thread reads what no other writes,
            # and all of it before it writes.
            compiler_params=plgpu.CompilerParams(
                approx_math=True, unsafe_no_auto_barriers=True
            ),
            interpret=interpret,
            name=program.name,
        )(*call.operands, *arrays)
    return call.results(
        [jax.freeze(arrays[i]).reshape(call.arrays[i].shape) for i in call.written]
    )


def _step_tile(
    program: Program,
    column: jax.Array,
    source: Leaf,
    target: Leaf,
    numbers: Scalars,
    noise: Noise,
) -> None:
    """Step the blocks of a tile, from references to references."""
    blocks = program.storage.blocks
    tiles, tile = _inner(blocks) // _COLUMNS, lax.axis_index(_GRID)
    down = lax.div(tile, jnp.int32(tiles))  # which row of blocks, of all outer axes
    across = pl.ds((tile - down * tiles) * _COLUMNS, _COLUMNS)

    def at(row: int) -> tuple[Any, Any]:
        return down * blocks.size + row, across

    scales = _load(source.scales, (down, across))
    decoding = decoding_of(program, jax.tree.map(_float32, scales))
    rows: list[Leaf] = []
    new: list[Advanced] = []
    for k in range(blocks.size):
        rows.append(_load(_values(source), at(k)))
        broad = wide(program, rows[k], numbers)
        new.append(advance(program, broad, numbers, None, decoding))
    slots = zip(*[x.magnitudes for x in new], strict=True)
    largest = [functools.reduce(jnp.maximum, x) for x in slots]
    settled = settle(program, largest, new[-1].finite, numbers)
    found = new_scales(settled, jax.tree.map(_float32, scales), scales, settled.keep)
    _store(target.scales, found, (down, across))
    hashes = _hashes(blocks, noise, down, across.start + column)
    for k, (row, x) in enumerate(zip(rows, new, strict=True)):
        bits, quarter = hashes[k % len(hashes)], k // len(hashes)
        out = write(
            program,
            row,
            wide(program, row, numbers),
            x,
            settled,
            numbers,
            _random(bits, quarter),
        )
        _store(target._replace(scales=()), out._replace(scales=()), at(k))


def _hashes(
    blocks: Blocks, noise: Noise, down: jax.Array, across: jax.Array
) -> list[jax.Array]:
    """Random bits of the first rows of a tile's blocks: of all those that have own."""
    assert blocks.axis is not None
    outer, count = blocks.shape[: blocks.axis], blocks.count
    stride = wrap(blocks.strides[blocks.axis])
    index = lax.div(down, jnp.int32(count))
    start = noise.origin + (down - index * count) * wrap(blocks.size * stride)
    for length, apart in reversed([*zip(outer, blocks.strides, strict=False)]):
        above = lax.div(index, jnp.int32(length))
        start = start + (index - above * length) * wrap(apart)
        index = above
    position = across + start
    key = rounding.leaf_key(noise.step, noise.leaf)
    period = rounding.period(blocks.size)
    return [rounding.hashed(key, position + wrap(k * stride)) for k in range(period)]


def _random(bits: jax.Array, quarter: int) -> Random:
    """Noise for the values of a row."""
    return lambda draw: rounding.noise(bits, quarter, draw)


def _inner(blocks: Blocks) -> int:
    """How far the values of a block are apart."""
    assert blocks.axis is not None
    return math.prod(blocks.shape[blocks.axis + 1 :])


def _values(leaf: Leaf) -> Leaf:
    """Without what is one number for each block."""
    return leaf._replace(scales=(None,) * len(leaf.scales))


def _float32(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32)


def _load(refs: Any, at: tuple[Any, Any]) -> Any:
    """A tree of arrays from one of references."""
    return jax.tree.map(lambda ref: ref[at], refs)


def _store(refs: Any, arrays: Any, at: tuple[Any, Any]) -> None:
    def store(ref: Any, x: jax.Array) -> None:
        ref[at] = x

    jax.tree.map(store, refs, arrays)
