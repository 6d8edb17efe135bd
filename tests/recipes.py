"""What CONTRIBUTING's recipes add: formats, rules with slots of every kind."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from octavo import optim
from octavo.optim.options import Options
from octavo.optim.stepping.transformation import fused
from octavo.pallas_kernels import Format, Rule, Slot
from octavo.pallas_kernels.formats.base import Numbers, reciprocal

# ------------------------------------------------------------------------- formats


@dataclass(frozen=True)
class Fp8(Format):
    """float8_e4m3fn, the block's largest being 448."""

    name = "fp8"
    number = 100
    dtype = jnp.float8_e4m3fn

    def encoding(self, scale: jax.Array) -> Numbers:
        return (reciprocal(scale) * 448.0,)

    def encoded(
        self, x: jax.Array, block: Numbers, noise: jax.Array | int
    ) -> jax.Array:
        y = jnp.clip(x * block[0], -448.0, 448.0)
        return y.astype(jnp.float8_e4m3fn).astype(jnp.float32)

    def decoded(self, codes: jax.Array, block: Numbers) -> jax.Array:
        (scale,) = block
        return codes * (scale * (1 / 448.0))


@dataclass(frozen=True)
class Linear4(Format):
    """Half a byte: 15 steps, signed around 0 or not; two codes in each int8."""

    signed: bool
    packed = 2

    @property
    def name(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return "linear4" if self.signed else "linear4u"

    @property
    def number(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return 101 if self.signed else 102

    def encoded(
        self, x: jax.Array, block: Numbers, noise: jax.Array | int
    ) -> jax.Array:
        (scale,), levels = block, 7 if self.signed else 15
        y = jnp.floor(x * (reciprocal(scale) * levels) + 0.5)
        y = jnp.where(jnp.logical_and(not self.signed, x > 0), jnp.maximum(y, 1.0), y)
        return jnp.clip(y, -7.0, 15.0).astype(jnp.int32) & 15

    def decoded(self, codes: jax.Array, block: Numbers) -> jax.Array:
        (scale,) = block
        value = jnp.where((codes > 7) & self.signed, codes - 16, codes)
        return value.astype(jnp.float32) * (scale / (7 if self.signed else 15))


MADE = {
    "fp8": lambda signed, relative: Fp8(),
    "linear4": lambda signed, relative: Linear4(signed),
}


# --------------------------------------------------------------------------- rules


class _Scalars(NamedTuple):
    b: jax.Array


def _scalars(t: jax.Array, learning_rate: jax.Array, h: float) -> _Scalars:
    return _Scalars(jnp.asarray(h, jnp.float32))


def _largest(g: jax.Array, slots: Any, s: _Scalars) -> Any:
    """Steps by the gradient over its largest magnitude yet, which decays."""
    (v,) = slots
    v = jnp.maximum(s.b * v, jnp.abs(g))
    return g / (v + 1e-8), (v,)


def _momentum(g: jax.Array, slots: Any, s: _Scalars) -> Any:
    (m,) = slots
    m = s.b * m + g
    return m, (m,)


def _by_rows(g: jax.Array, slots: Any, s: _Scalars) -> Any:
    """The second moment of each row, as Adafactor's."""
    m, v = slots
    m = s.b * m + g
    v = s.b * v + (1 - s.b) * jnp.mean(g * g, axis=-1, keepdims=True)
    return m / (jnp.sqrt(v) + 1e-8), (m, v)


NU_MAX = Rule((Slot("nu_max", signed=False),), _scalars, _largest)
FROM_A_TENTH = Rule((Slot("trace", signed=True, initial=0.1),), _scalars, _momentum)
ROWS = Rule(
    (
        Slot("mu", signed=True),
        Slot("rows", signed=False, shape=lambda shape: (*shape[:-1], 1)),
    ),
    _scalars,
    _by_rows,
)


def _mean_square(g: jax.Array, slots: Any, s: _Scalars) -> Any:
    (v,) = slots
    v = s.b * v + (1 - s.b) * jnp.mean(g * g, axis=-1, keepdims=True)
    return g / (jnp.sqrt(v) + 1e-8), (v,)


ROWS_ALONE = Rule(ROWS.slots[1:], _scalars, _mean_square)


def made(rule: Rule, **options: Any) -> optim.Transformation:
    return fused(rule, 0.9, 1e-2, Options(**options))


CASES: dict[str, optim.Transformation] = {
    "slot nu_max": made(NU_MAX),
    "slot that starts at 0.1": made(FROM_A_TENTH),
    "slot that starts at 0.1, 32 bits": made(FROM_A_TENTH, state="32bit"),
    "rows alone": made(ROWS_ALONE),
}


def case(name: str) -> optim.Transformation:
    """Formats by name are known only while the fixture has added them."""
    return {
        **CASES,
        "fp8": optim.adamw(1e-2, state="fp8"),
        "half bytes": optim.adamw(1e-2, state={"mu": "linear4", "nu": "8bit"}),
        "half bytes by path": optim.adamw(
            1e-2, state=lambda path: "linear4" if "kernel" in path else "8bit"
        ),
        "half bytes, nu too": optim.adamw(1e-2, state="linear4", block_axis=-1),
        "rows": made(ROWS, state={"mu": "bf16", "rows": "32bit"}),
    }[name]


NAMES = [
    *CASES,
    *("fp8", "half bytes", "half bytes by path", "half bytes, nu too", "rows"),
]
WIDE = {  # the same optimizer with moments in 32 bits
    name: made(NU_MAX, state="32bit")
    if "nu_max" in name
    else made(FROM_A_TENTH, state="32bit")
    if "0.1" in name
    else made(ROWS, state="32bit")
    if name == "rows"
    else made(ROWS_ALONE, state="32bit")
    if name == "rows alone"
    else optim.adamw(1e-2, state="32bit")
    for name in NAMES
}
