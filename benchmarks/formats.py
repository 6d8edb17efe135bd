"""How well Adam runs on moments of 8 bits: candidates for each moment, side by side.

Every candidate runs freely on its own rounded moments, next to an exact Adam that
sees the same gradients. Gaussian gradients in blocks of 32 values, in two groups:

* `spread`: each element has its own log-normal scale (sigma 1). Half of each block's
  gradients fall to a tenth after `--settle` steps, for `--drop` steps.
* `small`: rows 0-3 of each block have scale 1, and seven rows each have 1e-3, 1e-4,
  1e-5 and 1e-6.

Columns of the table, all measured on u = m / sqrt(v):

* error: rms(u - exact u) / rms(exact u) of `spread` before the drop;
* drop: rms(u) / rms(exact u) of the fallen half, at the end;
* 1e-3 ... 1e-6: rms(u) / rms(exact u) of those rows of `small`, at the end. 1 is
  exact, below is a step that is too small, above one that is too large.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from rich.console import Console
from rich.table import Table

from octavo.pallas_kernels import FORMATS, Format, rounding
from octavo.pallas_kernels.formats.base import reciprocal

BLOCK = 32
FRACTIONS = (1e-3, 1e-4, 1e-5, 1e-6)
_B1, _B2, _SHORT_B2 = 0.9, 0.999, 0.95


@dataclass(frozen=True)
class Root(Format):
    """v linear in its n-th root, 256 steps, unbiased: Root8 for any n."""

    n: int
    unbiased = True

    def scale(self, largest: jax.Array) -> jax.Array:
        return super().scale(self._root(largest))

    def encode(
        self, x: jax.Array, scale: jax.Array, noise: jax.Array | float = 0.5
    ) -> jax.Array:
        level = self._root(x) * (reciprocal(scale) * 256) + noise
        return jnp.clip(jnp.floor(level), 1, 256).astype(jnp.int32)

    def _root(self, x: jax.Array) -> jax.Array:
        return jnp.where(x > 0, x, 0.0) ** (1 / self.n)

    def decode(self, codes: jax.Array, scale: jax.Array) -> jax.Array:
        return (codes.astype(jnp.float32) * scale / 256) ** self.n


@dataclass(frozen=True)
class Logarithm(Format):
    """v as a float of 3 mantissa bits, 256 codes, unbiased, clamped up."""

    unbiased = True

    def encode(
        self, x: jax.Array, scale: jax.Array, noise: jax.Array | float = 0.5
    ) -> jax.Array:
        bits = lax.bitcast_convert_type(x * reciprocal(scale), jnp.int32)
        dither = jnp.asarray(noise * 2.0**20).astype(jnp.int32)
        code = ((bits + dither) >> 20) - (127 * 8 - 255)
        return jnp.clip(code, 0, 255)

    def decode(self, codes: jax.Array, scale: jax.Array) -> jax.Array:
        bits = (codes + (127 * 8 - 255)) << 20
        return lax.bitcast_convert_type(bits, jnp.float32) * scale


@dataclass(frozen=True)
class Square(Format):
    """m by a square law: sign(c) * scale * (c / 127)**2."""

    unbiased: bool  # pyright: ignore[reportGeneralTypeIssues]

    def encode(
        self, x: jax.Array, scale: jax.Array, noise: jax.Array | float = 0.5
    ) -> jax.Array:
        y = jnp.abs(x) * reciprocal(scale) * 127**2
        lower = jnp.minimum(jnp.floor(jnp.sqrt(y)), 126)
        up = y > lower**2 + (2 * lower + 1) * (1 - noise)
        code = jnp.where(up, lower + 1, lower)
        return jnp.where(x < 0, -code, code).astype(jnp.int32)

    def decode(self, codes: jax.Array, scale: jax.Array) -> jax.Array:
        c = codes.astype(jnp.float32) / 127
        return c * jnp.abs(c) * scale


F32 = FORMATS["32bit"](True)
LOG8, ROOT8 = FORMATS["8bit"](True), FORMATS["8bit"](False)
DYNAMIC8 = FORMATS["dynamic8"](True)

CANDIDATES: dict[str, tuple[Format, Format]] = {
    "f32 / fourth root": (F32, Root(4)),
    "f32 / sixth root": (F32, Root(6)),
    "f32 / eighth root": (F32, ROOT8),
    "f32 / twelfth root": (F32, Root(12)),
    "f32 / logarithm, 3 mantissa bits": (F32, Logarithm()),
    "log8 / eighth root (8bit)": (LOG8, ROOT8),
    "dynamic8 / eighth root": (DYNAMIC8, ROOT8),
    "square law, nearest / eighth root": (Square(unbiased=False), ROOT8),
    "square law, unbiased / eighth root": (Square(unbiased=True), ROOT8),
    "dynamic8 / dynamic8, nearest": (DYNAMIC8, FORMATS["dynamic8"](False)),
    "bf16 / bf16": (FORMATS["bf16"](True), FORMATS["bf16"](False)),
}


class Moments(NamedTuple):
    """Exact m and v, and what an optimizer with rounded state sees of its own."""

    m: jax.Array
    v: jax.Array
    rounded_m: jax.Array
    rounded_v: jax.Array


class Squares(NamedTuple):
    """Sums over steps, per element."""

    error: jax.Array
    rounded: jax.Array
    exact: jax.Array


def _round(form: Format, x: jax.Array, noise: Callable[[], jax.Array]) -> jax.Array:
    """Encoded and decoded: a block is a column."""
    scale = form.scale(jnp.max(form.magnitude(x), axis=0, keepdims=True))
    codes = form.encode(x, scale, noise() if form.unbiased else 0.5)
    return form.decode(codes, scale)


def _adam(m: jax.Array, v: jax.Array, g: jax.Array, b2: jax.Array) -> tuple:
    return _B1 * m + (1 - _B1) * g, b2 * v + (1 - b2) * g * g


def _update(m: jax.Array, v: jax.Array) -> jax.Array:
    return jnp.where(v > 0, m * lax.rsqrt(jnp.where(v > 0, v, 1.0)), 0.0)


@partial(jax.jit, static_argnums=(0, 1))
def run(
    formats: tuple[Format, Format],
    steps: int,
    moments: Moments,
    sigma: jax.Array,
    b2: jax.Array,
    seed: jax.Array,
) -> tuple[Moments, Squares]:
    """Some steps of exact and rounded Adam on the same gradients.

    The bias corrections are left out: they are the same factor on both sides.
    """
    position = jnp.arange(sigma.size, dtype=jnp.int32).reshape(sigma.shape)

    def step(carry: tuple, t: jax.Array) -> tuple[tuple, None]:
        old, sums = carry
        g = sigma * jax.random.normal(jax.random.fold_in(seed, t), sigma.shape)
        key = jax.random.bits(jax.random.fold_in(seed, -1 - t)).astype(jnp.int32)
        m, v = _adam(old.m, old.v, g, b2)
        # The update uses the moments before they are rounded, as Octavo's does.
        m8, v8 = _adam(old.rounded_m, old.rounded_v, g, b2)
        exact, rounded = _update(m, v), _update(m8, v8)
        stored = (
            _round(form, x, partial(rounding.uniform, key, slot, position))
            for slot, (form, x) in enumerate(zip(formats, (m8, v8), strict=True))
        )
        squares = Squares((rounded - exact) ** 2, rounded**2, exact**2)
        return (Moments(m, v, *stored), jax.tree.map(jnp.add, sums, squares)), None

    zeros = Squares(*(jnp.zeros(sigma.shape) for _ in Squares._fields))
    return lax.scan(step, (moments, zeros), jnp.arange(steps))[0]


def scales(columns: int, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Standard deviations of the gradients, before and after the drop."""
    spread = jnp.exp(jax.random.normal(key, (BLOCK, columns)))
    row = jnp.arange(BLOCK)[:, None]
    dropped = jnp.where(row % 2 == 0, 0.1, 1.0) * spread
    large = jnp.ones((4, 1))
    small = jnp.concatenate([large, *(jnp.full((7, 1), f) for f in FRACTIONS)])
    small = jnp.broadcast_to(small, spread.shape)
    return jnp.hstack([spread, small]), jnp.hstack([dropped, small])


class Sizes(NamedTuple):
    """Of a simulation: blocks in each group, steps, and steps measured over."""

    columns: int
    settle: int
    drop: int
    window: int
    seed: int


def measure(formats: tuple[Format, Format], sizes: Sizes) -> dict[str, float]:
    """One row of the table."""
    columns = sizes.columns
    keys = jax.random.split(jax.random.key(sizes.seed), 7)
    before, after = scales(columns, keys[0])

    def phase(moments: Moments, steps: int, sigma: jax.Array, b2: float, k: int):
        for key, n in ((keys[k], steps - sizes.window), (keys[k + 1], sizes.window)):
            moments, squares = run(formats, n, moments, sigma, jnp.float32(b2), key)
        return moments, squares

    def rms(part: jax.Array, whole: jax.Array) -> float:
        return float(jnp.sqrt(part.sum() / whole.sum()))

    fresh = Moments(*(jnp.zeros(before.shape) for _ in Moments._fields))
    spread = slice(None, columns)
    _, short = phase(fresh, sizes.settle, before, _SHORT_B2, 1)
    moments, first = phase(fresh, sizes.settle, before, _B2, 3)
    _, last = phase(moments, sizes.drop, after, _B2, 5)
    rounded, exact = last.rounded, last.exact
    small = {
        f"{fraction:.0e}": rms(rounded[rows, columns:], exact[rows, columns:])
        for k, fraction in enumerate(FRACTIONS)
        for rows in [slice(4 + 7 * k, 11 + 7 * k)]
    }
    return {
        "error b2 .999": rms(first.error[:, spread], first.exact[:, spread]),
        "error b2 .95": rms(short.error[:, spread], short.exact[:, spread]),
        "drop": rms(rounded[::2, spread], exact[::2, spread]),
        **small,
    }


def show(rows: dict[str, dict[str, float]]) -> None:
    """Print the table."""
    table = Table()
    table.add_column("m / v", no_wrap=True)
    for name in next(iter(rows.values())):
        table.add_column(name, justify="right")
    for label, row in rows.items():
        table.add_row(label, *(f"{x:.3f}" for x in row.values()))
    Console(width=max(Console().width, 110)).print(table)


def main(argv: Sequence[str] | None = None) -> None:
    """Compute the table and print it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--columns", type=int, default=256, help="blocks in each group")
    parser.add_argument("--settle", type=int, default=4000, help="steps at first")
    parser.add_argument("--drop", type=int, default=6000, help="steps after the drop")
    parser.add_argument("--window", type=int, default=500, help="steps measured over")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="few steps: a smoke test")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    args = parser.parse_args(argv)
    names = list(CANDIDATES)
    if args.quick:
        args.columns, args.settle, args.drop, args.window = 8, 40, 40, 20
        names = ["log8 / eighth root (8bit)"]
    sizes = Sizes(args.columns, args.settle, args.drop, args.window, args.seed)
    rows = {name: measure(CANDIDATES[name], sizes) for name in names}
    show(rows)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
