"""What a storage format is."""

from abc import ABC, abstractmethod
from typing import ClassVar, TypeAlias

import jax
import jax.numpy as jnp
import jax.typing
import numpy as np
from jax import lax

from ..arithmetic import SMALLEST
from ..rounding import NEAREST

Numbers: TypeAlias = tuple[jax.Array, ...]

LARGEST = 2.0**126  # beyond it, the reciprocal of a scale is not a normal number


class Format(ABC):
    """How one moment is stored: codes, and for quantized formats a scale per block.

    Everything but the largest of a block, which each backend finds in the way that
    suits its hardware, is elementwise: `encode` and `decode` are plain arithmetic (no
    table look-up: it lowers on no GPU backend), and so run in every backend and outside
    of them.

    Attributes:
      name: identifies the code book; part of the state's format tag.
      number: the same in states and checkpoints. Never renumber.
      dtype: of what is stored.
      quantized: whether blocks share a bf16 scale.
      relative: whether what is stored is the moment over the root of another one; see
        `Slot.relative_to`.
      unbiased: whether `encode` uses `noise`.
      packed: codes in one stored value: 2 for codes of 4 bits in int8, the first in
        the low bits. Consecutive along the blocked axis.
      block_size: of its blocks, where the user names none.
    """

    name: str
    number: int
    dtype: ClassVar[jax.typing.DTypeLike] = jnp.int8
    quantized: ClassVar[bool] = True
    relative: bool = False
    unbiased: bool = False
    packed: ClassVar[int] = 1
    block_size: ClassVar[int] = 32

    def magnitude(self, x: jax.Array) -> jax.Array:
        """What the largest of a block is sought of; elementwise.

        Infinite where x cannot be stored: a plain maximum ignores NaN on some backends.
        """
        size = jnp.abs(x)
        return jnp.where(size <= LARGEST, size, jnp.inf)

    def scale(self, largest: jax.Array) -> jax.Array:
        """The scale of a block, from the largest magnitude in it.

        Float32 that bf16 holds, not smaller; infinite where that is, so that the caller
        can see it. Codes of zeros decode to zeros by it.
        """
        return jnp.where(largest < SMALLEST, 0.0, rounded_up(largest))

    def encode(
        self, x: jax.Array, scale: jax.Array, noise: jax.Array | int = NEAREST
    ) -> jax.Array:
        """Float32 to codes, int32 or float32; elementwise.

        Of int32 only the low bits count, those that a cast to `dtype` keeps.

        Args:
          x: any shape.
          scale: broadcasts to it; not used where the format is not quantized.
          noise: int32 in [0, 2**14), the shape of x, for unbiased rounding; 2**13
            rounds to the nearest.
        """
        return self.encoded(x, self.encoding(scale), noise)

    def decode(self, codes: jax.Array, scale: jax.Array) -> jax.Array:
        """Codes (int32 or float32) and scales to float32; elementwise.

        Zeros decode to zeros.
        """
        return self.decoded(codes, self.decoding(scale))

    def encoding(self, scale: jax.Array) -> Numbers:
        """What `encoded` takes of a block: computed once, not for each value."""
        return (scale,)

    def decoding(self, scale: jax.Array) -> Numbers:
        """What `decoded` takes of a block."""
        return (scale,)

    def lowest(self, block: Numbers) -> jax.Array | None:
        """The least that a block stores, from `decoding`; None: zero, or what comes."""
        del block
        return None

    @abstractmethod
    def encoded(
        self, x: jax.Array, block: Numbers, noise: jax.Array | int
    ) -> jax.Array:
        """Codes, from the numbers of each block, which broadcast."""

    @abstractmethod
    def decoded(self, codes: jax.Array, block: Numbers) -> jax.Array:
        """The inverse."""


def bits_of(x: jax.Array) -> jax.Array:
    """Of float32, as int32."""
    return lax.bitcast_convert_type(x, jnp.int32)


def float_of(bits: jax.Array) -> jax.Array:
    """The float32 that has these bits."""
    return lax.bitcast_convert_type(bits, jnp.float32)


def widened(x: jax.Array, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
    """Stored values in the type that is computed in: integer codes as int32."""
    return x.astype(jnp.int32 if jnp.issubdtype(x.dtype, jnp.integer) else dtype)


def rounded_up(largest: jax.Array, bits: int = 7) -> jax.Array:
    """A positive number with a mantissa of some bits of bf16's, not smaller.

    So no value exceeds its scale.
    """
    lost = (1 << (23 - bits)) - 1
    return float_of((bits_of(largest) + np.int32(lost)) & np.int32(~lost))


def reciprocal(scale: jax.Array) -> jax.Array:
    """1 / scale, and 0 where the whole block is zero."""
    return jnp.where(scale > 0.0, 1.0 / jnp.maximum(scale, SMALLEST), 0.0)


# Added to a float32 of less than 2**22, it leaves the nearest integer in the low bits:
# one addition, where some devices take five operations for a cast.
_MAGIC = np.float32(1.5 * 2**23)


def fixed_point(x: jax.Array, start: int = 0) -> jax.Array:
    """The nearest integer to x + start, int32, of which only the low 22 bits count."""
    return bits_of(x + (_MAGIC + np.float32(start)))
