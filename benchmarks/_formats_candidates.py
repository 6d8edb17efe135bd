"""What `formats.py` compares: the library's formats, and others as small classes."""

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from octavo.pallas_kernels import FORMATS, Format
from octavo.pallas_kernels.arithmetic import SMALLEST
from octavo.pallas_kernels.formats import Bits8, Linear8
from octavo.pallas_kernels.formats.base import (
    Numbers,
    bits_of,
    fixed_point,
    float_of,
    reciprocal,
    rounded_up,
)
from octavo.pallas_kernels.rounding import NEAREST, NOISE_BITS

_UNIT = 1 << NOISE_BITS


class Candidate(NamedTuple):
    """How m and v are stored; without v, an SGD, or a Lion, which steps by signs."""

    m: Format
    v: Format | None = None
    signs: bool = False


@dataclass(frozen=True)
class Curved(Format):
    """v in 256 equal steps of a curve of it, unbiased, from a lowest level up.

    Attributes:
      lowest: the level.
      scale_bits: of the mantissa of a scale; bf16 has 7.
    """

    lowest: int = 1
    scale_bits: int = 3
    more = 0  # units of noise
    unbiased = True

    @abstractmethod
    def curve(self, v: jax.Array) -> jax.Array:
        """Monotone, for v > 0."""

    @abstractmethod
    def inverse(self, y: jax.Array) -> jax.Array:
        """v, for y > 0."""

    def magnitude(self, x: jax.Array) -> jax.Array:
        return jnp.where(x > 0, self.curve(x), 0.0)

    def scale(self, largest: jax.Array) -> jax.Array:
        up = rounded_up(largest, self.scale_bits)
        return jnp.where(largest < SMALLEST, 0.0, up)

    def encoding(self, scale: jax.Array) -> Numbers:
        return (((self.lowest + 255) * _UNIT - 2) / jnp.maximum(scale, SMALLEST),)

    def encoded(
        self, x: jax.Array, block: Numbers, noise: jax.Array | int
    ) -> jax.Array:
        level = jnp.maximum(self.magnitude(x) * block[0], float(self.lowest * _UNIT))
        first = (self.lowest + 128) * _UNIT
        return (fixed_point(level, self.more - first) + noise) >> NOISE_BITS

    def decoded(self, codes: jax.Array, block: Numbers) -> jax.Array:
        level = codes.astype(jnp.float32) + float(self.lowest + 128)
        y = level * (block[0] / (self.lowest + 255))
        return jnp.where(y > 0, self.inverse(y), 0.0)


@dataclass(frozen=True)
class Root(Curved):
    """The n-th root."""

    n: int = 8

    def curve(self, v: jax.Array) -> jax.Array:
        return v ** (1 / self.n)

    def inverse(self, y: jax.Array) -> jax.Array:
        return y**self.n


@dataclass(frozen=True)
class Bits(Curved):
    """A bit pattern shifted right, as bits8 has it."""

    shift: int = 3
    more = 1

    def curve(self, v: jax.Array) -> jax.Array:
        lost = np.int32(1 << (32 - self.shift))  # in the inverse
        return float_of((bits_of(v) >> self.shift) + lost)

    def inverse(self, y: jax.Array) -> jax.Array:
        return float_of(bits_of(y) << self.shift)


@dataclass(frozen=True)
class Dithered(Format):
    """The scale is the largest, or longer by up to an eighth of an octave, at random.

    So all codes move by up to one in each step.

    Attributes:
      dither: whether it is longer.
      noise: by how much: int32 in [0, 2**14); None: not at all.
    """

    dither: bool = True
    noise: Any = None

    def dithered(self, noise: jax.Array) -> Format:
        """With noise for the scales of one step."""
        return replace(self, noise=noise) if self.dither else self

    def scale(self, largest: jax.Array) -> jax.Array:
        longer = bits_of(largest)
        if self.noise is not None:
            longer = longer + (self.noise << (20 - NOISE_BITS))
        to_nearest = (longer + np.int32(0x8000)) & np.int32(-0x10000)
        return jnp.where(largest < SMALLEST, 0.0, float_of(to_nearest))


@dataclass(frozen=True)
class Log8(Dithered):
    """Sign, octave and 3 bits of mantissa: 127 sizes down to 1.25 * 2**-16."""

    def encoding(self, scale: jax.Array) -> Numbers:
        return (reciprocal(scale),)

    def encoded(
        self, x: jax.Array, block: Numbers, noise: jax.Array | int
    ) -> jax.Array:
        bits = bits_of(jnp.abs(x) * block[0]) + np.int32(1 << 19)
        code = jnp.clip((bits >> 20) - 889, 0, 127)
        return jnp.where(x < 0.0, -code, code)

    def decoded(self, codes: jax.Array, block: Numbers) -> jax.Array:
        size = jnp.where(codes == 0, 0.0, float_of((jnp.abs(codes) + 889) << 20))
        return jnp.where(codes < 0, -size, size) * block[0]


@dataclass(frozen=True)
class NearestLinear8(Linear8):
    """ratio8 or linear8 to the nearest."""

    unbiased = False


@dataclass(frozen=True)
class Float8(Dithered):
    """float8_e4m3fn up to 448.

    Companded: it stores |x| (|x| + 1/8), which is finer at the top.
    """

    companded: bool = False
    relative: bool = False  # pyright: ignore[reportIncompatibleVariableOverride]
    dtype = jnp.float8_e4m3fn

    def encoding(self, scale: jax.Array) -> Numbers:
        return (reciprocal(scale),)

    def encoded(
        self, x: jax.Array, block: Numbers, noise: jax.Array | int
    ) -> jax.Array:
        x = x * block[0]
        if self.companded:
            x = x * (jnp.abs(x) + 1 / 8) * (8 / 9)
        return jnp.clip(x * 448, -448, 448)

    def decoded(self, codes: jax.Array, block: Numbers) -> jax.Array:
        x = codes.astype(jnp.float32) / 448
        if self.companded:
            root = jnp.sqrt(1 / 256 + jnp.abs(x) * (9 / 8)) - 1 / 16
            x = jnp.sign(x) * root
        return x * block[0]


@dataclass(frozen=True)
class Square(Format):
    """m by a square law: sign(c) * scale * (c / 127)**2."""

    unbiased: bool = False

    def encoding(self, scale: jax.Array) -> Numbers:
        return (reciprocal(scale),)

    def encoded(
        self, x: jax.Array, block: Numbers, noise: jax.Array | int
    ) -> jax.Array:
        y = jnp.abs(x) * block[0] * 127**2
        lower = jnp.minimum(jnp.floor(jnp.sqrt(y)), 126)
        below = 1 - jnp.float32(noise if self.unbiased else NEAREST) / _UNIT
        code = jnp.where(y > lower**2 + (2 * lower + 1) * below, lower + 1, lower)
        return jnp.where(x < 0, -code, code)

    def decoded(self, codes: jax.Array, block: Numbers) -> jax.Array:
        c = codes.astype(jnp.float32) / 127
        return c * jnp.abs(c) * block[0]


F32, BITS8, RATIO8 = FORMATS["32bit"](True, False), Bits8(), Linear8(relative=True)
DEFAULT = "ratio8 / bits8: 8bit"


def _named(name: str) -> Candidate:
    return Candidate(FORMATS[name](True, True), FORMATS[name](False, False))


CANDIDATES: dict[str, Candidate] = {
    "f32 / fourth root": Candidate(F32, Root(n=4)),
    "f32 / sixth root": Candidate(F32, Root(n=6)),
    "f32 / eighth root": Candidate(F32, Root(n=8)),
    "f32 / twelfth root from 17": Candidate(F32, Root(17, n=12)),
    "f32 / y from 1": Candidate(F32, Bits()),
    "f32 / y from 5": Candidate(F32, Bits(5)),
    "f32 / bits8 (y from 9)": Candidate(F32, BITS8),
    "f32 / y from 9, scales of bf16": Candidate(F32, Bits(9, 7)),
    "f32 / y from 13": Candidate(F32, Bits(13)),
    "f32 / y of shift 4": Candidate(F32, Bits(shift=4)),
    "ratio8 / f32": Candidate(RATIO8, F32),
    DEFAULT: _named("8bit"),
    "ratio8 to nearest / bits8": Candidate(NearestLinear8(relative=True), BITS8),
    "ratio8 as e4m3 / bits8": Candidate(Float8(relative=True), BITS8),
    "linear8 / bits8": Candidate(Linear8(), BITS8),
    "log8, dither / bits8": Candidate(Log8(), BITS8),
    "log8 / bits8": Candidate(Log8(dither=False), BITS8),
    "e4m3 / bits8": Candidate(Float8(), BITS8),
    "e4m3 companded / bits8": Candidate(Float8(companded=True), BITS8),
    "dynamic8 / bits8": Candidate(FORMATS["dynamic8"](True, False), BITS8),
    "square law / bits8": Candidate(Square(), BITS8),
    "square law, unbiased / bits8": Candidate(Square(True), BITS8),
    "dynamic8 / dynamic8: dynamic8": _named("dynamic8"),
    "bf16 / bf16: bf16": _named("bf16"),
}
