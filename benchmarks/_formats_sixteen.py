"""What `formats.py --slow` compares: formats of 16 bits beside those of 8."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from _formats_candidates import (
    BITS8,
    CANDIDATES,
    DEFAULT,
    Candidate,
    Log8,
    NearestLinear8,
)

from octavo.pallas_kernels import FORMATS, Format
from octavo.pallas_kernels.formats import Linear8, MuLaw
from octavo.pallas_kernels.formats.base import Numbers
from octavo.pallas_kernels.rounding import NOISE_BITS


@dataclass(frozen=True)
class Linear16(Linear8):
    """linear8 or ratio8 with 32,767 steps."""

    dtype = jnp.int16

    def encoding(self, scale: jax.Array) -> Numbers:
        return (32767 / scale,)

    def encoded(
        self, x: jax.Array, block: Numbers, noise: jax.Array | int
    ) -> jax.Array:
        # In [-1/2, 1/2): of 15 bits and a fraction, fixed point would have 7 bits.
        dither = jnp.float32(noise + 0.5) / (1 << NOISE_BITS) - 0.5
        return jnp.round(jnp.clip(x * block[0] + dither, -32767, 32767))

    def decoding(self, scale: jax.Array) -> Numbers:
        return (scale * (1.0 / 32767),)


@dataclass(frozen=True)
class NearestBFloat16(Format):
    """bf16 to the nearest."""

    dtype = jnp.bfloat16
    quantized = False

    def encoded(
        self, x: jax.Array, block: Numbers, noise: jax.Array | int
    ) -> jax.Array:
        return x.astype(jnp.bfloat16).astype(jnp.float32)

    def decoded(self, codes: jax.Array, block: Numbers) -> jax.Array:
        return codes


BF16 = FORMATS["bf16"](False, False)
# Beside v, where m is slow.
SLOW: dict[str, Candidate] = {
    DEFAULT: CANDIDATES[DEFAULT],
    "mulaw16 / bits8": Candidate(MuLaw(16), BITS8),
    "ratio16 / bits8": Candidate(Linear16(relative=True), BITS8),
    "bf16 / bf16: bf16": CANDIDATES["bf16 / bf16: bf16"],
    "bf16 to nearest / bf16": Candidate(NearestBFloat16(), BF16),
}
MOMENTA: dict[str, Candidate] = {
    "mulaw8: 8bit": Candidate(FORMATS["8bit"](True, False)),
    "mulaw16: 16bit": Candidate(FORMATS["16bit"](True, False)),
    "bf16: bf16": Candidate(FORMATS["bf16"](True, False)),
    "bf16 to nearest": Candidate(NearestBFloat16()),
    "dynamic8: dynamic8": Candidate(FORMATS["dynamic8"](True, False)),
    "linear8": Candidate(Linear8()),
    "linear16": Candidate(Linear16()),
    "linear8 to nearest": Candidate(NearestLinear8()),
    "log8, dither": Candidate(Log8()),
}
