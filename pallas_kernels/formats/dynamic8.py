"""bitsandbytes' dynamic map, by arithmetic."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from .base import Format, Numbers, reciprocal

_DECADES = 7


@dataclass(frozen=True)
class Dynamic8(Format):
    """Seven decades, each of equal cells: finer where values are larger.

    Decade e = 0..6 covers scale * [10**(e-7), 10**(e-6)) with n = 2**e cells (2**(e+1)
    if unsigned); cell k holds its centre,

        |x| = scale * 10**(e - 6) * (0.1 + 0.9 * (k + 0.5) / n),

    and two codes stand for 0 and scale (Dettmers et al., arXiv 2110.02861, section
    2.1; bitsandbytes `create_dynamic_map`). Signed codes are bitsandbytes' index - 127
    (which has no -1, and whose +1 wraps to -128); unsigned codes are its index
    (128..255 wrap to negative numbers).

    Rounded to the nearest; worst relative error 6.2 % in the top decade (3.3 %
    unsigned), and about twice as much in each one below. Signed values below half of
    5.5e-7 of the scale flush to zero. Unsigned ones are clamped up to 3.25e-7, where
    bitsandbytes stores zero and then divides by it. 1 byte, and 2 / block_size.
    """

    signed: bool

    @property
    def name(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return "dynamic8" if self.signed else "dynamic8u"

    @property
    def number(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return 5 if self.signed else 6

    @property
    def _cells(self) -> list[int]:
        return [2 ** (e if self.signed else e + 1) for e in range(_DECADES)]

    def encoding(self, scale: jax.Array) -> Numbers:
        return (reciprocal(scale),)

    def encoded(
        self, x: jax.Array, block: Numbers, noise: jax.Array | int
    ) -> jax.Array:
        del noise
        y = x * block[0]
        a = jnp.abs(y)
        index = jnp.zeros(x.shape, jnp.float32)
        for e, n in enumerate(self._cells):
            # Within a decade the borders of the cells are the midpoints, so the cell
            # is the nearest code; across its lower end the midpoint is higher.
            top_below = 10.0 ** (e - 7) * (1 - 0.9 / n) if e else 0.0
            first = 10.0 ** (e - 6) * (0.1 + 0.45 / n)
            cell = jnp.floor(a * (n * 10.0 ** (6 - e) / 0.9) - n / 9)
            cell = jnp.clip(cell, 0.0, n - 1.0) + self._first(n)
            index = jnp.where(a > (top_below + first) / 2, cell, index)
        last = 0.1 + 0.9 * (1 - 0.5 / self._cells[-1])
        index = jnp.where(y > (last + 1) / 2, self._first(2 * self._cells[-1]), index)
        if self.signed:
            index = jnp.where(y < 0.0, -index, index)
        else:
            index = jnp.where(y > 0.0, jnp.maximum(index, 1.0), index)
        code = index.astype(jnp.int32)
        # Into -128..127: casting what does not fit is undefined on some devices.
        return jnp.where(code > 127, code - 256, code)

    def _first(self, n: int) -> int:
        """Code of the lowest cell of the decade that has n cells."""
        return n if self.signed else n - 1

    def decoded(self, codes: jax.Array, block: Numbers) -> jax.Array:
        if self.signed:
            top, sign = codes == -128, jnp.where(codes < 0, -1.0, 1.0)
            index = jnp.abs(codes)
        else:
            index = codes & 0xFF
            top, sign = index == 255, 1.0
        # The map is continuous, convex and piecewise linear in index + 1/2.
        centre = index.astype(jnp.float32) + (0.5 if self.signed else 1.5)
        value = jnp.zeros(codes.shape, jnp.float32)
        for e, n in enumerate(self._cells):
            lowest, slope = 0.1 * 10.0 ** (e - 6), 0.9 * 10.0 ** (e - 6) / n
            value = jnp.maximum(value, (centre - n) * slope + lowest)
        value = jnp.where(index == 0, 0.0, jnp.where(top, 1.0, sign * value))
        return value * block[0]
