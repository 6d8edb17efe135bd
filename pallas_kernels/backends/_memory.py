"""How a leaf lies in TPU memory, and the tiles that a kernel cuts it into."""

import math
from dataclasses import dataclass

from ..layout import Blocks

LANES, SUBLANES = 128, 8
_PACKED_SUBLANES = 32  # of an int8 tile
_TILE_LANES = 512
_TILE_VALUES = 1 << 17


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
    def scale_tile(self) -> tuple[int, ...]:
        """The tile of the scales."""
        return tuple(
            n // self.block if k == self.axis else n for k, n in enumerate(self.tile)
        )


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
    tile, room = [1] * len(shape), _TILE_VALUES
    reserved = 1 if axis is None else units[axis]
    for k in (lane, sublane):
        if k != axis:
            most = room // reserved
            most = min(most, _TILE_LANES) if k == lane else most
            tile[k] = _fit(shape[k], units[k], most, block=1)
            room //= tile[k]
    if axis is not None:
        tile[axis] = _fit(shape[axis], units[axis], room, blocks.size)
    grid = tuple(-(-n // t) for n, t in zip(shape, tile, strict=True))
    return Tiling(order, axis, blocks.size, tuple(tile), grid)


def _fit(length: int, unit: int, room: int, block: int) -> int:
    """A tile of about `room`: units in even parts, or the axis if it is short."""
    most = max(room // unit, 1) * unit
    if length <= most:
        return length if length % block == 0 else _up(length, unit)
    parts = -(-length // most)
    return _up(-(-length // parts), unit)


def _up(n: int, unit: int) -> int:
    return -(-n // unit) * unit
