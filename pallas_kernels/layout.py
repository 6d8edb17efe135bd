"""Shapes: the blocks and layers of a leaf, and the views that tiles need.

Both follow from its global shape alone, so that the numbers do not depend on the mesh.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import jax
import jax.numpy as jnp
from jax import lax

SMALLEST_BLOCK = 4
_SMALL_LEAF = 2**20
_BLOCKS_OF_SMALL_LEAF = 16


@dataclass(frozen=True)
class Blocks:
    """The blocks of a leaf: `size` consecutive values along `axis` share a scale.

    The last block may be partial. `axis` is None for 0-d leaves. The values at one
    index of the axes `layers` are a layer, and have norms and a ratio of their own; a
    leaf without such axes is one layer. `whole` is the global shape where this is a
    shard.
    """

    shape: tuple[int, ...]
    axis: int | None
    size: int
    layers: tuple[int, ...] = ()
    whole: tuple[int, ...] | None = None

    @cached_property
    def within(self) -> int:
        """After `split`, the axis within a block."""
        assert self.axis is not None
        return self.axis + 1

    @cached_property
    def count(self) -> int:
        """Blocks along the blocked axis."""
        return 1 if self.axis is None else -(-self.shape[self.axis] // self.size)

    @cached_property
    def scale_shape(self) -> tuple[int, ...]:
        """The leaf's shape with the blocked axis shortened to one value per block."""
        if self.axis is None:
            return self.shape
        return (*self.shape[: self.axis], self.count, *self.shape[self.axis + 1 :])

    @cached_property
    def layer_count(self) -> int:
        """Layers in the leaf."""
        return math.prod(self.shape[k] for k in self.layers)

    @cached_property
    def layer_shape(self) -> tuple[int, ...]:
        """The leaf's shape with everything within a layer shortened to one value."""
        return tuple(n if k in self.layers else 1 for k, n in enumerate(self.shape))

    @cached_property
    def strides(self) -> tuple[int, ...]:
        """Row-major strides of the whole leaf, in values."""
        shape = self.shape if self.whole is None else self.whole
        return tuple(math.prod(shape[k + 1 :]) for k in range(len(shape)))


def blocks_of(
    shape: tuple[int, ...],
    block_size: int = 32,
    block_axis: int | None = None,
    layers: tuple[int, ...] = (),
    shards: tuple[int, ...] = (),
) -> Blocks:
    """The blocks of a leaf of this global shape, whose axes `layers` stack layers.

    By default they run down the longest axis other than the last and than `layers`
    (the last, if there is no other).
    The block is the largest power-of-two fraction of `block_size` that divides the
    axis, else the axis ends with a partial block. Leaves under 2**20 values take
    smaller blocks, until the axis has 16: then their scales, too, divide over a mesh.
    Where `shards` has the most shards along each axis, blocks fit those: see
    `longest_in_shards`.

    >>> blocks_of((4096, 1024)).scale_shape
    (128, 1024)
    >>> blocks_of((64, 128)).scale_shape
    (16, 128)
    >>> blocks_of((48, 12, 640), layers=(0,)).scale_shape
    (48, 3, 640)
    >>> blocks_of((4096, 1024), shards=(256, 256)).size
    16
    """
    if not shape:
        return Blocks(shape, None, 1)
    if block_axis is None:
        inside = [k for k in range(len(shape)) if k not in layers]
        axis = max(inside[:-1] or inside or [0], key=lambda k: shape[k])
    else:
        axis = block_axis % len(shape)
    length = shape[axis]
    size = block_size
    while size > SMALLEST_BLOCK and size % 2 == 0 and length % size:
        size //= 2
    if length % size:
        size = block_size
    if math.prod(n for k, n in enumerate(shape) if k not in layers) < _SMALL_LEAF:
        while (
            size // 2 >= SMALLEST_BLOCK
            and size % 2 == 0
            and -(-length // size) < _BLOCKS_OF_SMALL_LEAF
        ):
            size //= 2
    if shards and length:
        size = math.gcd(size, longest_in_shards(length, shards[axis]) or size)
    return Blocks(shape, axis, size, layers)


def longest_in_shards(length: int, shards: int) -> int | None:
    """The longest block, a power of two, that fits any equal shards up to so many.

    Their number may be any power of two, times any odd number. None: whatever block,
    because an odd axis has no such shards.

    >>> longest_in_shards(4096, 256), longest_in_shards(50257, 256)
    (16, None)
    """
    power = length & -length
    if shards == 1 or power == 1:
        return None
    return power // min(power, 1 << (shards.bit_length() - 1))


def split(x: jax.Array, blocks: Blocks) -> jax.Array:
    """[..., n, ...] to [..., count, size, ...]; a partial last block gets zeros."""
    assert blocks.axis is not None
    tail = blocks.count * blocks.size - blocks.shape[blocks.axis]
    if tail:
        widths = [(0, 0, 0)] * x.ndim
        widths[blocks.axis] = (0, tail, 0)
        x = lax.pad(x, jnp.zeros((), x.dtype), widths)
    a = blocks.axis
    return x.reshape(*x.shape[:a], blocks.count, blocks.size, *x.shape[a + 1 :])


def merge(x: jax.Array, blocks: Blocks) -> jax.Array:
    """The inverse of `split`."""
    a = blocks.axis
    assert a is not None
    whole = x.reshape(*x.shape[:a], blocks.count * blocks.size, *x.shape[a + 2 :])
    return lax.slice_in_dim(whole, 0, blocks.shape[a], axis=a)


def positions(
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    start: jax.Array | int,
    repeated: tuple[int, int] | None = None,
) -> jax.Array:
    """int32 global position of each value of a view, wrapping around at 2**32.

    Along the axis `repeated[0]`, of the value that is `repeated[1]`, `2 repeated[1]`...
    before it, the first of those that share its random bits.
    """
    # Innermost axes first: only the last of the sums is of the view's full size.
    position = jnp.full((1,) * len(shape), start, jnp.int32)
    for k in reversed(range(len(shape))):
        along = (*(1,) * k, shape[k], *(1,) * (len(shape) - k - 1))
        index = lax.broadcasted_iota(jnp.int32, along, k)
        if repeated is not None and k == repeated[0]:
            index = lax.rem(index, jnp.int32(repeated[1]))
        position = position + index * wrap(strides[k])
    return position


def wrap(n: int) -> int:
    """n modulo 2**32, as a signed 32-bit integer."""
    return (n + 2**31) % 2**32 - 2**31
