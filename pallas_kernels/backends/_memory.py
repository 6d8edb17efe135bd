"""The order of a leaf in TPU memory, and the tiles that a kernel takes."""

import math
from dataclasses import dataclass, replace

from ..layout import Blocks

LANES, SUBLANES = 128, 8
_PACKED_SUBLANES = 32  # of an int8 tile
_TILE_LANES = 1024
# A tile's own instructions are 350, so that large tiles cost less. But the first one is
# read and the last one written while nothing is computed: a leaf has at least eight.
_FEWEST_TILES = 8
_TILE_VALUES, _LEAST_VALUES = 1 << 19, 1 << 17
_PART_VALUES = 1 << 16
_MOST_ALONG_LANES = 1 << 19  # fits in 32 MiB, twice as many do not


@dataclass(frozen=True)
class Tiling:
    """A leaf's axes in memory order, and the tile of it that one kernel step takes.

    Args:
      order: the leaf's axes, outermost first; the last two are sublanes and lanes.
      axis: where in `order` the blocked axis is; None if nothing is quantized.
      block: values per block.
      tile: shape of a tile, in memory order.
      grid: number of tiles along each axis.
    """

    order: tuple[int, ...]
    axis: int | None
    block: int
    tile: tuple[int, ...]
    grid: tuple[int, ...]

    @property
    def parts(self) -> "Tiling":
        """The parts of a tile that a kernel works on one after another.

        They are half of a tile and smaller, and the kernel is one of them in a loop:
        much faster to compile. A part of the scales starts at a multiple of 16 rows,
        which bf16 packs, or is the whole.
        """
        sublane, lane = len(self.tile) - 2, len(self.tile) - 1
        part = [1] * len(self.tile)
        part[sublane], part[lane] = _PACKED_SUBLANES, LANES
        if self.axis is not None:
            part[self.axis] = self.block * (16 if self.axis == sublane else 1)
        if self.axis == lane:  # transposed as a whole
            part = list(self.tile)
        part = [n if t % n == 0 else t for n, t in zip(part, self.tile, strict=True)]
        for k in (sublane, lane):  # a loop costs more than a few registers' work
            while math.prod(part) < _PART_VALUES and self.tile[k] % (2 * part[k]) == 0:
                part[k] *= 2
        grid = tuple(t // n for t, n in zip(self.tile, part, strict=True))
        return replace(self, tile=tuple(part), grid=grid)

    @property
    def dimensions(self) -> tuple[int, ...]:
        """A tile in the kernel: (blocks, values of a block, the rest), or as it is."""
        axis, shape = self.axis, self.tile
        if axis is None:
            return shape
        last = len(shape) - 1
        rest = (shape[k] for k in (last - 1, last) if k != axis)
        return (shape[axis] // self.block, self.block, *rest)

    @property
    def scale_tile(self) -> tuple[int, ...]:
        """The tile of the scales."""
        return tuple(
            n // self.block if k == self.axis else n for k, n in enumerate(self.tile)
        )

    @property
    def fits(self) -> bool:
        """Whether a tile, which blocks along lanes transpose and pad, fits in VMEM."""
        if self.axis is None or self.axis != len(self.tile) - 1:
            return True
        return self.tile[-1] * _up(self.tile[-2], LANES) <= _MOST_ALONG_LANES


def memory_order(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The order of axes that XLA gives an array on TPU: the one that pads least.

    The last two axes are padded to tiles of 8 x 128 (fewer sublanes if the axis is
    that short). Found by compiling 150 random shapes for v5e and v7x (JAX 0.10.2,
    libtpu 0.0.51); a wrong guess costs copies, nothing else.

    >>> memory_order((4096, 4096)), memory_order((1000, 333))
    ((0, 1), (1, 0))
    >>> memory_order((768, 12, 64))
    (1, 2, 0)
    """

    def padded(sublane: int, lane: int) -> int:
        rest = math.prod(shape) // (shape[sublane] * shape[lane])
        rows = shape[sublane]
        rows = next((n for n in (2, 4) if rows <= n), _up(rows, SUBLANES))
        return rest * rows * _up(shape[lane], LANES)

    axes = range(len(shape))
    pairs = [(s, x) for s in axes for x in axes if s != x]
    sublane, lane = min(pairs, key=lambda p: (padded(*p), -p[1], -p[0]))
    return (*(k for k in axes if k not in (sublane, lane)), sublane, lane)


def tiling(blocks: Blocks, quantized: bool) -> Tiling:
    """The tiling of a leaf of rank 2 or more.

    Whole blocks in every tile; and both the tile and its scales a multiple of
    8 x 128, or as long as the array, which Mosaic demands.
    """
    order = memory_order(blocks.shape)
    shape = tuple(blocks.shape[k] for k in order)
    axis = order.index(blocks.axis) if quantized and blocks.axis is not None else None
    sublane, lane = len(shape) - 2, len(shape) - 1
    units = [1] * len(shape)
    units[sublane], units[lane] = _PACKED_SUBLANES, LANES
    if axis is not None:
        packed = SUBLANES if axis == sublane else units[axis]
        units[axis] = blocks.size * packed
    tile, room = [1] * len(shape), _room(math.prod(shape), axis == lane)
    reserved = 1 if axis is None else units[axis]
    for k in (lane, sublane):
        if k != axis:
            most = room // reserved
            most = min(most, _TILE_LANES) if k == lane else most
            tile[k] = _fit(shape[k], units[k], most, block=1)
            # Blocks along lanes are transposed: then sublanes are lanes, and padded.
            room //= _up(tile[k], LANES) if axis == lane else tile[k]
    if axis is not None:
        tile[axis] = _fit(shape[axis], units[axis], room, blocks.size)
    grid = tuple(-(-n // t) for n, t in zip(shape, tile, strict=True))
    return Tiling(order, axis, blocks.size, tuple(tile), grid)


def _room(size: int, on_lanes: bool) -> int:
    """Values of a tile."""
    if on_lanes:  # transposed, which takes its memory again
        return _LEAST_VALUES
    room = _TILE_VALUES
    while room > _LEAST_VALUES and room * _FEWEST_TILES > size:
        room //= 2
    return room


def _fit(length: int, unit: int, room: int, block: int) -> int:
    """A tile of about `room`: units in even parts, or the axis if it is short."""
    most = max(room // unit, 1) * unit
    if length <= most:
        return length if length % block == 0 else _up(length, unit)
    parts = -(-length // most)
    return _up(-(-length // parts), unit)


def _up(n: int, unit: int) -> int:
    return -(-n // unit) * unit
