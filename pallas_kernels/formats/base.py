"""What a storage format is."""

from typing import Protocol

import jax
import jax.typing


class Format(Protocol):
    """How one moment is stored: codes, and for quantized formats a scale per block.

    `encode` and `decode` are plain arithmetic on one tile (no table look-up: it
    lowers on no GPU backend), and so run in every backend and outside of them.
    """

    @property
    def name(self) -> str:
        """Identifies the code book; part of the state's format tag."""
        ...

    @property
    def dtype(self) -> jax.typing.DTypeLike:
        """Of the codes."""
        ...

    @property
    def quantized(self) -> bool:
        """Whether blocks share a bf16 scale."""
        ...

    @property
    def unbiased(self) -> bool:
        """Whether `encode` uses `noise`."""
        ...

    def encode(
        self, x: jax.Array, axis: int, noise: jax.Array | float = 0.5
    ) -> tuple[jax.Array, jax.Array | None]:
        """Float32 tile to codes and scales.

        Args:
          x: any shape; one block is what runs along `axis`.
          axis: the axis within a block.
          noise: in [0, 1), the shape of x, for unbiased rounding; 0.5 rounds to the
            nearest.

        Returns:
          Codes of x's shape, int32 or float32, within `dtype`'s range; and float32
          scales (bf16 values) of length 1 on `axis`, infinite where a value of the
          block was not finite, or None.
        """
        ...

    def decode(self, codes: jax.Array, scale: jax.Array | None) -> jax.Array:
        """Codes (int32 or float32) and scales to a float32 tile.

        Zeros decode to zeros, so that a state of zeros is a fresh state.
        """
        ...
