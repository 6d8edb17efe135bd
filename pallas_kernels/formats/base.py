"""What a storage format is."""

from abc import ABC, abstractmethod
from typing import ClassVar

import jax
import jax.numpy as jnp
import jax.typing
import numpy as np
from jax import lax

_LARGEST = 2.0**126  # beyond it, the reciprocal of a scale is not a normal number
_SMALLEST = np.finfo(np.float32).tiny


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
      unbiased: whether `encode` uses `noise`.
      packed: codes in one stored value: 2 for codes of 4 bits in int8, the first in
        the low bits. Consecutive along the blocked axis.
    """

    name: str
    number: int
    dtype: ClassVar[jax.typing.DTypeLike] = jnp.int8
    quantized: ClassVar[bool] = True
    unbiased: bool = False
    packed: ClassVar[int] = 1

    def magnitude(self, x: jax.Array) -> jax.Array:
        """What the largest of a block is sought of; elementwise.

        Infinite where x cannot be stored: a plain maximum ignores NaN on some backends.
        """
        size = jnp.abs(x)
        return jnp.where(size <= _LARGEST, size, jnp.inf)

    def scale(self, largest: jax.Array) -> jax.Array:
        """The scale of a block, from the largest magnitude in it.

        Float32 that bf16 holds; infinite where that is, so that the caller can see it;
        0 for a block of zeros.
        """
        return as_bf16(largest)

    @abstractmethod
    def encode(
        self, x: jax.Array, scale: jax.Array, noise: jax.Array | float = 0.5
    ) -> jax.Array:
        """Float32 to codes, int32 or float32, within `dtype`'s range; elementwise.

        Args:
          x: any shape.
          scale: broadcasts to it; not used where the format is not quantized.
          noise: in [0, 1), the shape of x, for unbiased rounding; 0.5 rounds to the
            nearest.
        """

    @abstractmethod
    def decode(self, codes: jax.Array, scale: jax.Array) -> jax.Array:
        """Codes (int32 or float32) and scales to float32; elementwise.

        Zeros decode to zeros.
        """


def widened(x: jax.Array, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
    """Stored values in the type that is computed in: integer codes as int32."""
    return x.astype(jnp.int32 if jnp.issubdtype(x.dtype, jnp.integer) else dtype)


def as_bf16(largest: jax.Array, nearest: bool = False) -> jax.Array:
    """A block's largest value as bf16, rounded up: no value exceeds its scale.

    Or to the `nearest`, for formats that round to nearest codes: their code of a
    largest value is 1, and a scale that is always too large would lengthen it by 0.4 %
    in every step. Zero below the smallest normal number: some devices flush those.
    """
    bits = lax.bitcast_convert_type(largest, jnp.int32)
    bits = (bits + np.int32(0x8000 if nearest else 0xFFFF)) & np.int32(-0x10000)
    rounded = lax.bitcast_convert_type(bits, jnp.float32)
    return jnp.where(largest < _SMALLEST, 0.0, rounded)


def reciprocal(scale: jax.Array) -> jax.Array:
    """1 / scale, and 0 where the whole block is zero."""
    return jnp.where(scale > 0.0, 1.0 / jnp.maximum(scale, _SMALLEST), 0.0)
