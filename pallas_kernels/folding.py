"""Rows of an array in groups: how host memory has what a TPU streams.

A TPU copies slices between its memory and the host's in tiles, and takes them where
they begin with a tile. Arrays of int8 that come from outside of a program lie in tiles
of 32 rows, but slices of them in tiles of 8: XLA would move the whole array for each.
With a last axis but one of `rows`, both are the same, and axes before it may be cut
anywhere: docs/decisions.md, "Paged state". In memory that is row-major, a group changes
nothing but the shape.
"""

import math
from collections.abc import Sequence

from .formats import Format
from .layout import Blocks

CODE_ROWS = 8  # of one tile
SCALE_ROWS = 2  # of bfloat16, in one word


def folded(shape: tuple[int, ...], rows: int) -> tuple[int, ...]:
    """A shape whose last axis but one is in two: groups, and rows of a group.

    >>> folded((24, 4096, 1024), 8)
    (24, 512, 8, 1024)
    """
    return (*shape[:-2], shape[-2] // rows, rows, shape[-1])


def unfolded(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The inverse of `folded`, for shapes that have such axes."""
    if len(shape) < 3:
        return shape
    return (*shape[:-3], shape[-3] * shape[-2], shape[-1])


def row_unit(blocks: Blocks, formats: Sequence[Format]) -> int:
    """How many rows of a leaf are whole groups in its codes, scales and remainder."""
    along = blocks.axis == len(blocks.shape) - 2
    codes = [form.packed if along else 1 for form in formats]
    scales = [blocks.size if along else 1 for form in formats if form.quantized]
    groups = (*(CODE_ROWS * n for n in codes), *(SCALE_ROWS * n for n in scales))
    return math.lcm(CODE_ROWS, *groups)
