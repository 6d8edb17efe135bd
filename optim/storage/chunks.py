"""A leaf in chunks, which are to it what shards are: whole blocks, and their places."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from octavo.pallas_kernels import Storage, nbytes


class Grid(NamedTuple):
    """Equal chunks of a leaf.

    Attributes:
      start: index in the leaf of the first value of the first one.
      shape: of each.
      counts: how many, along each axis.
    """

    start: tuple[int, ...]
    shape: tuple[int, ...]
    counts: tuple[int, ...]

    @property
    def chunks(self) -> int:
        """In all."""
        return math.prod(self.counts)

    def at(self, k: jax.Array | int) -> list[jax.Array | int]:
        """Index in the leaf of the first value of chunk k."""
        found: list[jax.Array | int] = []
        axes = [*zip(self.start, self.shape, self.counts, strict=True)]
        for first, length, count in reversed(axes):
            k, rest = divided(k, count)
            found.append(first + rest * length)
        return found[::-1]


def divided(k: jax.Array | int, n: int) -> tuple[Any, Any]:
    """Quotient and remainder of what is not negative, in one operation each."""
    if isinstance(k, int):
        return divmod(k, n)
    m = jnp.asarray(n, k.dtype)
    return lax.div(k, m), lax.rem(k, m)


def grids_of(storage: Storage, dtypes: Sequence[Any], page_bytes: int) -> list[Grid]:
    """A leaf, or a shard of it, in chunks: at most two grids for each axis that is cut.

    Args:
      storage: of it.
      dtypes: of the gradient and the parameter.
      page_bytes: most bytes of a chunk: of its gradient, parameter and state.
    """
    shape = storage.shape
    lengths = chunk_shape(storage, dtypes, page_bytes)
    each = []
    for n, length in zip(shape, lengths, strict=True):
        rest = n % length
        parts = [(0, length, n // length)]
        each.append([*parts, (n - rest, rest, 1)] if rest else parts)
    return [Grid(*zip(*parts, strict=True)) for parts in itertools.product(*each)]


def chunk_shape(
    storage: Storage, dtypes: Sequence[Any], page_bytes: int
) -> tuple[int, ...]:
    """The longest chunk of at most so many bytes: outer axes are cut first.

    No longer than half of the leaf: what is fetched as a whole waits for nothing.
    """
    shape, least = storage.shape, least_shape(storage)
    half = chunk_bytes(storage, dtypes, shape) // 2
    page_bytes = max(min(page_bytes, half), chunk_bytes(storage, dtypes, least))
    for k in range(len(shape)):
        lengths = (*least[:k], shape[k], *shape[k + 1 :])
        if chunk_bytes(storage, dtypes, lengths) <= page_bytes:
            return lengths
        unit = chunk_bytes(storage, dtypes, (*least[: k + 1], *shape[k + 1 :]))
        if unit <= page_bytes:
            # A power of two: it divides most axes, and no shorter chunk is left over.
            fits = 1 << (page_bytes // unit).bit_length() - 1
            return (*least[:k], min(fits * least[k], shape[k]), *shape[k + 1 :])
    return least


def least_shape(storage: Storage) -> tuple[int, ...]:
    """The smallest chunk: blocks across all of the last axis, one along the others.

    Where rows are in groups, whole ones.
    """
    shape, blocks = storage.shape, storage.blocks
    last = len(shape) - 1
    least = [
        min(blocks.size, n) if k == blocks.axis else 1 if k < last or not last else n
        for k, n in enumerate(shape)
    ]
    if storage.folded:
        least[-2] = storage.row_unit
    return tuple(least)


def chunk_bytes(storage: Storage, dtypes: Sequence[Any], shape: tuple[int, ...]) -> int:
    """Of a chunk of this shape: its gradient, parameter and state."""
    part = part_of(storage, shape)
    count = math.prod(shape)
    own = sum(jnp.dtype(dtype).itemsize for dtype in dtypes) * count
    for k, form in enumerate(part.formats):
        own += nbytes(part.codes(k)) + (nbytes(part.scales(k)) if form.quantized else 0)
    return own + (nbytes(part.remainder) if part.has_remainder else 0)


def part_of(storage: Storage, shape: tuple[int, ...]) -> Storage:
    """The record of one chunk."""
    blocks = storage.blocks
    whole = blocks.shape if blocks.whole is None else blocks.whole
    return replace(storage, blocks=replace(blocks, shape=shape, whole=whole))
