"""Mu-law, in 8 bits and in 16: the default formats of first moments without squares."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import jax.typing
import numpy as np

from ..rounding import NOISE_BITS
from .base import Format, Numbers, bits_of, float_of, rounded_up

# y is twice what the formula says: those bits of 2 that are left of a code, a cast to
# it drops, and nothing has to be subtracted.
_TWO = int(np.float32(2.0).view(np.int32))
_SIGN = np.int32(-(2**31))
_SMALLEST = 2.0**-100  # of a scale; smaller moments become zero


@dataclass(frozen=True)
class MuLaw(Format):
    """m in steps that are equal within an octave of y, and so follow the size of m.

    What is stored is the sign of m, and the leading bits of a float32,

        y = 1 + R |m| / scale,                      scale >= the largest |m|
        |code| = (bits(y) - bits(1)) >> shift

                  bits    R      octaves  steps in each   a step, of the largest |m|
        mulaw8      8   14.75        4          32        1/472 at zero, 1/59 at it
        mulaw16    16   65519       16        2048        2**-27,         2**-12

    as telephones have it (ITU-T G.711). Where m is much more than 1/R of the block's
    largest, a step is a share of m itself, whatever its neighbours are: 1.6 to 3.1 % of
    y in 8 bits, .03 to .05 % in 16. Equal steps would leave an element of a hundredth
    of the largest a single code, where mulaw8 has five.

    Rounding is unbiased, in m itself: codes are linear in m from each to the next, for
    every octave ends at one. So a moment decays as it should, to zero, and zero stays
    zero. A moment whose decay is b keeps 1 / sqrt(1 - b**2) of its rounding errors: 16
    bits are for those that are slow. The scale is 2**-100 or more. 1 or 2 bytes, and
    2 / block_size for the scale.
    """

    width: int = 8  # pyright: ignore[reportGeneralTypeIssues]
    unbiased = True

    @property
    def name(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return f"mulaw{self.width}"

    @property
    def number(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return {8: 12, 16: 11}[self.width]

    @property
    def dtype(self) -> jax.typing.DTypeLike:  # pyright: ignore[reportIncompatibleVariableOverride]
        return {8: jnp.int8, 16: jnp.int16}[self.width]

    @property
    def _shift(self) -> int:
        """Bits of float32 that are rounded away."""
        return {8: 18, 16: 12}[self.width]

    @property
    def _top(self) -> np.float32:
        """y of the highest code."""
        codes = (1 << (self.width - 1)) - 1
        return np.int32(_TWO + (codes << self._shift)).view(np.float32)

    @property
    def _step(self) -> np.float32:
        """The value of the highest code must not exceed the scale."""
        return np.nextafter(np.float32(1 / (self._top - 2)), np.float32(0))

    def scale(self, largest: jax.Array) -> jax.Array:
        return rounded_up(jnp.maximum(largest, _SMALLEST))

    def encoding(self, scale: jax.Array) -> Numbers:
        return (1.0 / (scale * self._step),)

    def encoded(
        self, x: jax.Array, block: Numbers, noise: jax.Array | int
    ) -> jax.Array:
        size, missing = jnp.abs(x) * block[0], self._shift - NOISE_BITS
        if missing > 0:
            # Half of what the noise has not. The largest y, rounded, exceeds the top by
            # less than the other half.
            zero = np.int32(_TWO + (1 << missing >> 1)).view(np.float32)
            bits = bits_of(size + zero) + (noise << missing)
        else:
            bits = bits_of(jnp.minimum(size + 2.0, self._top)) + (noise >> -missing)
        code = bits >> self._shift
        return jnp.where(x < 0.0, -code, code)

    def decoding(self, scale: jax.Array) -> Numbers:
        return (scale * self._step,)

    def decoded(self, codes: jax.Array, block: Numbers) -> jax.Array:
        zero = (codes & _SIGN) | np.int32(_TWO)
        y = float_of((jnp.abs(codes) << self._shift) + zero)
        return (y - float_of(zero)) * block[0]
