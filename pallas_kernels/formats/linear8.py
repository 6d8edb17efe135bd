"""8 bits in equal steps: the default format of first moments beside second ones."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from ..rounding import NOISE_BITS
from .base import Format, Numbers, fixed_point, rounded_up

_TOP = 127
_UNIT = 1 << NOISE_BITS  # of a code, in fixed point
_SMALLEST = 2.0**-100  # of a scale; smaller moments become zero


@dataclass(frozen=True)
class Linear8(Format):
    """127 equal steps up to the block's largest; `relative`: of m / sqrt(v).

        m = scale * code / 127,               scale >= largest |m|             (linear8)
        m = sqrt(v) * scale * code / 127,     scale >= largest |m| / sqrt(v)    (ratio8)

    Adam steps by m / sqrt(v): however small the gradients of an element are beside its
    neighbours', that is as large as theirs, and equal steps serve all of them. SGD
    steps by m, and an error of it counts as much in a small one as in a large one.

    Rounding is unbiased: a moment that gets no more gradients decays as it should,
    whatever its neighbours do, and becomes zero; zero stays zero. The scale is 2**-100
    or more. 1 byte, and 2 / block_size for the scale.

    The largest |m| / sqrt(v) is bounded where b1**2 < b2, by
    (1 - b1) / sqrt((1 - b2) (1 - b1**2 / b2)): 7.3 for 0.9 and 0.999. Elsewhere it
    grows in an element that gets no more gradients, as Adam's steps do, and its
    neighbours are stored more coarsely.
    """

    relative: bool = False  # pyright: ignore[reportGeneralTypeIssues]
    unbiased = True

    @property
    def name(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return "ratio8" if self.relative else "linear8"

    @property
    def number(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return 8 if self.relative else 10

    def magnitude(self, x: jax.Array) -> jax.Array:
        # Whatever is not finite is seen in v.
        return jnp.abs(x) if self.relative else super().magnitude(x)

    def scale(self, largest: jax.Array) -> jax.Array:
        return rounded_up(jnp.maximum(largest, _SMALLEST))

    def encoding(self, scale: jax.Array) -> Numbers:
        # A little less than 127: rounding must not reach 128.
        return ((_TOP * _UNIT - 2) / scale,)

    def encoded(
        self, x: jax.Array, block: Numbers, noise: jax.Array | int
    ) -> jax.Array:
        return (fixed_point(x * block[0]) + noise) >> NOISE_BITS

    def decoding(self, scale: jax.Array) -> Numbers:
        return (scale * (1.0 / _TOP),)

    def decoded(self, codes: jax.Array, block: Numbers) -> jax.Array:
        return codes.astype(jnp.float32) * block[0]
