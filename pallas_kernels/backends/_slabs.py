"""In a TPU kernel: the part of a tile that is worked on, and the slabs of a part."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .. import rounding
from ..formats import widened
from ..layout import Blocks, positions, wrap
from ..program import Noise
from ..step import Random
from ._memory import SUBLANES, Tiling

_ROWS = 32  # of a slab of 128 lanes: four registers, of which one int8 register is made


class Part(NamedTuple):
    """A part of a tile.

    Args:
      tiles: the leaf's.
      part: the parts of a tile.
      corner: index in the leaf, along each axis of the memory order, of the tile.
      starts: index in the tile of the part.
    """

    tiles: Tiling
    part: Tiling
    corner: tuple[Any, ...]
    starts: tuple[Any, ...]

    @property
    def on_lanes(self) -> bool:
        """Whether blocks run along lanes: then the part is the tile, transposed."""
        return self.part.axis == len(self.starts) - 1

    @property
    def lanes(self) -> Any:
        """Where the part's last dimension is in the tile's."""
        if self.on_lanes:
            return slice(None)
        return pl.ds(self.starts[-1], self.part.tile[-1])

    def groups(self) -> Iterator["Group"]:
        """The slabs, some at a time."""
        if self.part.axis is None or self.on_lanes:
            yield Group((Slab(self, 0, self.part.dimensions[0]),))
            return
        blocks, block = self.part.dimensions[:2]
        count = max(_ROWS // block, 1)
        count = count if blocks % count == 0 else blocks
        slabs = [Slab(self, first, count) for first in range(0, blocks, count)]
        on_sublanes = self.part.axis == len(self.starts) - 2
        together = count == 1 and on_sublanes and block % SUBLANES == 0
        size = SUBLANES if together and blocks % SUBLANES == 0 else 1
        for first in range(0, len(slabs), size):
            yield Group(tuple(slabs[first : first + size]))

    def load_scales(self, ref: Any) -> jax.Array:
        """Those of all blocks, as (blocks, 1, the rest). In 32 bits: cheap there."""
        x = widened(ref[self._slices_of_scales()])
        if self.part.axis is None:
            return x
        x = x.reshape(x.shape[-2:]).T if self.on_lanes else x
        blocks, _, *rest = self.part.dimensions
        return x.reshape(blocks, *rest)

    def store_scales(self, ref: Any, groups: list[jax.Array]) -> None:
        """Those of all groups, as they are in memory."""
        _, _, *rest = self.part.dimensions
        pieces = [x.reshape(-1, *rest) for x in groups]
        x = pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces, axis=0)
        shape = self.part.scale_tile
        x = x.reshape(shape[-1], shape[-2]).T if self.on_lanes else x
        ref[self._slices_of_scales()] = x.reshape(shape).astype(ref.dtype)

    def _slices_of_scales(self) -> tuple[Any, ...]:
        def along(k: int) -> Any:
            start, length = self.starts[k], self.part.scale_tile[k]
            if k == self.part.axis and not isinstance(start, int):
                start = pl.multiple_of(lax.div(start, self.part.block), length)
            return pl.ds(start, length)

        return tuple(along(k) for k in range(len(self.starts)))


class Group(NamedTuple):
    """Some slabs.

    Either one, or eight of one block each: then what is known of their blocks is one
    row of one array for each, eight times as cheap as a row in an array of its own.
    """

    slabs: tuple["Slab", ...]

    @property
    def _one(self) -> bool:
        return len(self.slabs) == 1

    def largest(self, found: list[jax.Array]) -> jax.Array:
        """The largest of each block, from one array for each slab."""
        if self._one:
            return jnp.max(found[0], axis=self.slabs[0].axis, keepdims=True)
        rows = [x.reshape(-1, SUBLANES, x.shape[-1]).max(0) for x in found]
        sublane = lax.broadcasted_iota(jnp.int32, rows[0].shape, 0)
        for k in (4, 2, 1):
            # Where bit k of the index is clear, of the first half of the slabs.
            clear = (sublane & k) == 0
            pairs = zip(rows[:k], rows[k:], strict=True)
            rows = [
                jnp.where(
                    clear,
                    jnp.maximum(x, pltpu.roll(x, SUBLANES - k, 0)),
                    jnp.maximum(y, pltpu.roll(y, k, 0)),
                )
                for x, y in pairs
            ]
        return rows[0]

    def of_part(self, scales: jax.Array) -> jax.Array:
        """What a part has for each block, of the blocks of the group."""
        first = self.slabs[0]
        if self._one:
            return first.scales(scales)
        return scales[first.first : first.first + len(self.slabs)]

    def row(self, k: int, of_blocks: Any) -> Any:
        """What is known of the blocks of slab k."""
        if self._one:
            return of_blocks
        return jax.tree.map(lambda x: x[k : k + 1], of_blocks)

    def exist(self, blocks: Blocks) -> jax.Array | None:
        """Which blocks exist; None if all do."""
        rows = [slab.exist(blocks) for slab in self.slabs]
        if rows[0] is None or self._one:
            return rows[0]
        # As numbers: Mosaic does not join masks.
        found = [jnp.where(x, 1, 0) for x in rows if x is not None]
        return jnp.concatenate(found, axis=0) > 0


class Slab(NamedTuple):
    """Some consecutive blocks of a part: so many, from the first on."""

    of: Part
    first: int
    blocks: int

    @property
    def axis(self) -> int:
        """Of its arrays, that along which blocks run."""
        return 0 if self.blocks == 1 else 1

    @property
    def dimensions(self) -> tuple[int, ...]:
        """(blocks, values of a block, the rest), or as it is in the tile.

        One block has no axis of blocks: else Mosaic copies what is one row for all.
        """
        shape = self.of.part.dimensions
        if self.of.part.axis is None:
            return shape
        return self._with_blocks(*shape[1:])

    def _with_blocks(self, *shape: int) -> tuple[int, ...]:
        return shape if self.blocks == 1 else (self.blocks, *shape)

    def _start(self, k: int) -> Any:
        """Index in the tile along axis k of the memory order."""
        start = self.of.starts[k]
        if k != self.of.part.axis or self.first == 0:
            return start
        return start + self.first * self.of.part.block

    def _slices(self) -> tuple[Any, ...]:
        part = self.of.part

        def along(k: int) -> Any:
            length = self.blocks * part.block if k == part.axis else part.tile[k]
            start, unit = self._start(k), part.block if k == part.axis else length
            if not isinstance(start, int):
                start = pl.multiple_of(start, unit)
            return pl.ds(start, length)

        return tuple(along(k) for k in range(len(self.of.starts)))

    def load(self, ref: Any) -> jax.Array:
        """Values, the blocked axis in front and split. In 32 bits: cheap there."""
        x = widened(ref[self._slices()])
        x = x.reshape(x.shape[-2:]).T if self.of.on_lanes else x
        return x.reshape(self.dimensions)

    def store(self, ref: Any, x: jax.Array) -> None:
        """Values as they are in memory."""
        part = self.of.part
        shape = tuple(
            self.blocks * part.block if k == part.axis else n
            for k, n in enumerate(part.tile)
        )
        x = x.reshape(shape[-1], shape[-2]).T if self.of.on_lanes else x
        ref[self._slices()] = x.reshape(shape).astype(ref.dtype)

    def scales(self, of_part: jax.Array) -> jax.Array:
        """Of its blocks, as (blocks, 1, the rest)."""
        x = of_part[self.first : self.first + self.blocks]
        return x if self.blocks == 1 else x.reshape(self.blocks, 1, *x.shape[1:])

    def _in_leaf(self, k: int) -> Any:
        """Index in the leaf, along axis k of the memory order, of the first value."""
        return self.of.corner[k] + self._start(k)

    def random(self, strides: tuple[int, ...], noise: Noise) -> Random:
        """Noise for its values."""
        part = self.of.part

        def random(draw: rounding.Draw) -> jax.Array:
            key = rounding.leaf_key(noise.step, noise.leaf)
            shape = list(self.dimensions)
            whole = shape[self.axis]
            period = whole if part.axis is None else rounding.period(part.block)
            shape[self.axis] = period
            at = self._positions(tuple(shape), strides, noise.origin)
            bits = rounding.hashed(key, at)
            if period == whole:
                return rounding.noise(bits, 0, draw)
            quarters = range(rounding.WINDOWS)
            windows = [rounding.noise(bits, k, draw) for k in quarters]
            return jnp.concatenate(windows, axis=self.axis)

        return random

    def _positions(
        self, shape: tuple[int, ...], strides: tuple[int, ...], start: jax.Array
    ) -> jax.Array:
        """Global position of the values in a view, the leaf's first being `start`."""
        for k, stride in enumerate(strides):
            start = start + self._in_leaf(k) * wrap(stride)
        part = self.of.part
        if part.axis is None:
            return positions(shape, strides, start)
        step, last = strides[part.axis], len(strides) - 1
        rest = [strides[k] for k in (last - 1, last) if k != part.axis]
        along = (step, *rest) if self.blocks == 1 else (part.block * step, step, *rest)
        return positions(shape, along, start)

    def valid(self, blocks: Blocks, everywhere: bool) -> jax.Array | None:
        """Which values exist: in the last block, or `everywhere`; None if all do."""
        units = self.of.tiles.tile if everywhere else self._units()
        return self._exist(blocks, units, self.dimensions)

    def exist(self, blocks: Blocks) -> jax.Array | None:
        """Which blocks exist, with 1 for the values of a block; None if all do."""
        shape = list(self.dimensions)
        if self.of.part.axis is not None:
            shape[self.axis] = 1
        return self._exist(blocks, self.of.tiles.tile, tuple(shape))

    def _units(self) -> tuple[int, ...]:
        part = self.of.part
        return tuple(part.block if k == part.axis else 1 for k in range(len(part.tile)))

    def _exist(
        self, blocks: Blocks, units: tuple[int, ...], shape: tuple[int, ...]
    ) -> jax.Array | None:
        """Where some axis is not a multiple of its unit, what is in the leaf."""
        exist = None
        for k, axis in enumerate(self.of.part.order):
            if blocks.shape[axis] % units[k] == 0:
                continue
            inside = self._in_leaf(k) + self._index(k, shape) < blocks.shape[axis]
            exist = inside if exist is None else exist & inside
        return exist

    def _index(self, k: int, shape: tuple[int, ...]) -> jax.Array:
        """Index of each value along axis k of the memory order, within the slab."""
        axis = self.of.part.axis
        if axis is None:
            return lax.broadcasted_iota(jnp.int32, shape, k)
        if k == axis:
            index = lax.broadcasted_iota(jnp.int32, shape, self.axis)
            if self.blocks == 1:
                return index
            block = lax.broadcasted_iota(jnp.int32, shape, 0)
            return block * self.of.part.block + index
        last = len(self.of.part.order) - 1
        rest = [n for n in (last - 1, last) if n != axis]
        return lax.broadcasted_iota(jnp.int32, shape, 1 + self.axis + rest.index(k))
