"""Tiles whose blocks are held by threads of a GPU: each has a block, or a part of it.

An array is row-major, so a leaf of any rank is (outer, blocked axis, inner) for free. A
tile is some blocks, side by side, and value i of each of them is in row i // parts.
Neighbours in a row are neighbours in memory: of different blocks, or of the same one
where those are contiguous. So a thread has one value, or none, of each row, the largest
of a block is found in maxima of its registers, and what is known of a block is computed
once for all rows.

A kernel's Python takes rows in slabs: those whose values share their random bits. One
row at a time would be four times as many operations, and Triton compiles for a time
that grows with their third power.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from .. import rounding
from ..layout import Blocks, wrap
from ..program import Noise
from ..step import Random

_LANES = 32  # threads of a warp
# Measured on an H100. Two threads share a block of 32: one that has all of it takes so
# many registers that too few loads are in flight (docs/decisions.md).
_THREADS = 256  # of a program
_FLAT_THREADS = 128  # of one that needs no blocks
_MOST_ROWS = 16  # as many float32 values of each slot stay in a thread's registers


class At(NamedTuple):
    """Where values are in an array, and which of them exist; None: all do."""

    offsets: jax.Array
    exist: jax.Array | None


@dataclass(frozen=True)
class Tiling:
    """A leaf as (outer, length, inner), `length` down blocks, and its tiles.

    Args:
      outer: product of the axes outside of blocks.
      length: of the blocked axis.
      inner: product of the axes inside: how far values of a block are apart.
      block: values of a block.
      parts: values of a block in each row.
      columns: blocks in a tile.
    """

    outer: int
    length: int
    inner: int
    block: int
    parts: int
    columns: int

    @property
    def blocks(self) -> int:
        """In each of `outer`."""
        return -(-self.length // self.block) * self.inner

    @property
    def tiles(self) -> int:
        """In each of `outer`; a program takes one."""
        return -(-self.blocks // self.columns)

    @property
    def period(self) -> int:
        """Rows of a block that have random bits of their own."""
        return rounding.period(self.block) // self.parts

    @property
    def windows(self) -> int:
        """Rows of a slab, which have the same random bits."""
        used = -(-min(self.block, self.length) // (self.period * self.parts))
        return pl.next_power_of_2(used)

    @property
    def slabs(self) -> int:
        """Of a tile, but those of which no row exists."""
        return min(self.period, -(-self.length // self.parts))

    @property
    def programs(self) -> int:
        """Of the kernel: one for each tile."""
        return self.outer * self.tiles

    @property
    def warps(self) -> int:
        """Of a program: a thread for each value of a row, but where rows are long."""
        if self.block == 1:
            return _FLAT_THREADS // _LANES
        return min(max(self.parts * self.columns, _THREADS), 2 * _THREADS) // _LANES

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of a slab."""
        if self.inner > 1:
            return self.windows, self.parts, self.columns
        return self.windows, self.columns, self.parts

    @property
    def within(self) -> int:
        """The axis of a slab along which are the parts of a block."""
        return 1 if self.inner > 1 else 2

    @property
    def block_shape(self) -> tuple[int, ...]:
        """Of what is known of each block."""
        return tuple(
            1 if k in (0, self.within) else n for k, n in enumerate(self.shape)
        )

    def index(self, slab: int, windows: int) -> jax.Array:
        """In a kernel: which of the values of its block each value of a slab is."""
        shape = windows, *self.shape[1:]
        row = lax.broadcasted_iota(jnp.int32, shape, 0) * self.period + slab
        part = lax.broadcasted_iota(jnp.int32, shape, self.within)
        return row * self.parts + part


def blocked(blocks: Blocks) -> Tiling:
    """The tiles of a leaf with blocks."""
    assert blocks.axis is not None
    length = blocks.shape[blocks.axis]
    outer = math.prod(blocks.shape[: blocks.axis])
    inner = math.prod(blocks.shape[blocks.axis + 1 :])
    parts = max(blocks.size // _MOST_ROWS, 1)
    if inner == 1:  # the threads that share a block read 32 bytes of float32
        parts = max(parts, min(blocks.size // rounding.WINDOWS, 8))
    columns = max(_THREADS // parts, _LANES if inner > 1 else 1)
    return Tiling(outer, length, inner, blocks.size, parts, columns)


def flat(blocks: Blocks, columns: int) -> Tiling:
    """The tiles of a leaf whose blocks do not matter: layers, as they are in memory."""
    size = math.prod(blocks.shape)
    outer = math.prod(blocks.shape[: blocks.axis]) if blocks.layers else 1
    return Tiling(outer, 1, size // outer, 1, 1, columns)


class Tile:
    """The tile of this program. To be made in a kernel.

    Attributes:
      tiling: of the leaf.
      outer: which of `outer` it is in.
      first: offsets of the first value of each block.
      exists: whether blocks are in the array; true wherever they are in the leaf.
    """

    def __init__(self, tiling: Tiling) -> None:
        self.tiling = tiling
        program = pl.program_id(0)
        self.outer, program = _divided(program, tiling.tiles, tiling.programs)
        shape = tiling.block_shape
        block = program * tiling.columns + lax.broadcasted_iota(
            jnp.int32, shape, 3 - tiling.within
        )
        self._inside = block < tiling.blocks if tiling.blocks % tiling.columns else None
        self._scales = self.outer * tiling.blocks + block
        self.exists = self._scales < tiling.outer * tiling.blocks
        down, across = _divided(block, tiling.inner, tiling.blocks)
        self._left = tiling.length - down * tiling.block
        start = self.outer * (tiling.length * tiling.inner) + across
        first = start + down * (tiling.block * tiling.inner)
        if tiling.block > 1:
            # Below 2**30, so that sums with numbers below that do not overflow either:
            # the compiler then puts what differs from row to row into the instructions.
            # And Triton no longer sees that neighbours are contiguous, which would give
            # each thread values of several blocks.
            size = tiling.outer * tiling.length * tiling.inner
            first = first & (2**30 - 1 if size <= 2**30 else 2**31 - 1)
        self.first = first

    def layer(self, blocks: Blocks) -> jax.Array | int:
        """Number of the layer that the tile is a part of."""
        index, inside = 0, self.tiling.outer
        for k, n in enumerate(blocks.shape[: blocks.axis]):
            inside //= n
            if k in blocks.layers:
                along = lax.div(self.outer, jnp.int32(inside))
                index = index * n + lax.rem(along, jnp.int32(n))
        return index

    @property
    def scales(self) -> At:
        """Where the scales are."""
        return At(self._scales, self._inside)

    def slab(self, slab: int) -> At:
        """Where the values of a slab are."""
        tiling = self.tiling
        index = tiling.index(slab, tiling.windows)
        last = (slab + (tiling.windows - 1) * tiling.period + 1) * tiling.parts
        exist = self._inside
        if 0 < tiling.length % tiling.block < last:
            exist = index < self._left
            if self._inside is not None:
                exist = exist & self._inside
        return At(self.first + index * tiling.inner, exist)


class Hashes:
    """Random bits of a tile: one hash for all rows of a slab, and all slots."""

    def __init__(self, tile: Tile, blocks: Blocks, noise: Noise) -> None:
        self._tiling = tile.tiling
        self._key = rounding.leaf_key(noise.step, noise.leaf)
        self._start = _position(blocks, tile.first, noise.origin)
        self._stride = 0 if blocks.axis is None else wrap(blocks.strides[blocks.axis])

    def of_slab(self, slab: int) -> Random:
        """Noise for the values of a slab."""
        tiling = self._tiling
        at = self._start + tiling.index(slab, 1) * self._stride
        bits = rounding.hashed(self._key, at)

        def random(draw: rounding.Draw) -> jax.Array:
            if tiling.windows == 1:
                return rounding.noise(bits, 0, draw)
            quarter = lax.broadcasted_iota(jnp.int32, tiling.shape, 0)
            broad = jnp.broadcast_to(bits, tiling.shape)
            return rounding.noise(broad, quarter, draw)

        return random


def _position(blocks: Blocks, at: jax.Array, start: jax.Array) -> jax.Array:
    """Position in the whole leaf of the values at these offsets in this shard of it."""
    position, rest, inside = start, at, math.prod(blocks.shape)
    for length, stride in _merged(blocks):
        whole, inside = inside, inside // length
        index, rest = _divided(rest, inside, whole)
        position = position + index * wrap(stride)
    return position


def _merged(blocks: Blocks) -> list[tuple[int, int]]:
    """Length and stride of each axis, where axes that need no division are one."""
    merged: list[tuple[int, int]] = []
    for length, stride in zip(blocks.shape, blocks.strides, strict=True):
        if merged and merged[-1][1] == length * stride:
            length *= merged.pop()[0]
        merged.append((length, stride))
    return merged


def _divided(x: jax.Array, by: int, limit: int) -> tuple[jax.Array, jax.Array]:
    """Quotient and remainder of 0 <= x < limit."""
    if by == 1:
        return x, jnp.zeros_like(x)
    if by >= limit:
        return jnp.zeros_like(x), x
    quotient = lax.div(x, jnp.full_like(x, by))
    return quotient, x - quotient * by
