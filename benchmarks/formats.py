"""How well Adam runs on moments of 8 bits: candidates for each moment, side by side.

Every candidate runs freely on its own rounded moments, next to an exact Adam that sees
the same gradients, in blocks of 32 values. All is measured on u = m / sqrt(v), with
b1 = 0.9 and b2 = 0.999 unless a column says something else. 1 is exact, except for
errors; below is a step that is too small, above one that is too large.

The first table has Gaussian gradients, in two groups: in `spread` each element has its
own log-normal scale (sigma 1), and half of each block's gradients fall to a tenth after
`--settle` steps, for `--drop` steps. In `small` rows 0-3 of each block have scale 1,
and seven rows each have 1e-3, 1e-4, 1e-5 and 1e-6.

* error: rms(u - exact u) / rms(exact u) of `spread` before the drop; t: with
  gradients of heavy tails, Student's t of 3 degrees;
* drop: rms(u) / rms(exact u) of the fallen half, at the end;
* 1e-3 ... 1e-6: rms(u) / rms(exact u) of those rows of `small`, at the end.

The second table has elements that get no more gradients, beside one whose gradient is
the same in every step:

* decay: the way that they take in 2,500 steps, over the exact way;
* stops: mean |u| in the next 2,500, where nothing should move.

The third table has rows of an embedding: a quarter of each block has a gradient in
every step, the others once in 100 and once in 10,000 steps.

* 100, 10,000: the way of such a step and the 50 after it, over the exact way;
* late: mean |u| from 300 steps after it on: how far it is from the exact one's;
* others: the error of the rows that have a gradient in every step.

`--slow` prints instead how slow first moments do, over 20,000 steps and 20,000 more.
Beside v, where elements get no more gradients: the way in 20,000 steps; the largest
rms of u in any 100 steps, and in the last ones; and likewise the error of the element
beside, whose gradient, like its u, is 1. Of SGD's momentum:

* error: rms(m - exact m) / rms(exact m), with gradients of equal and log-normal size;
  1e-2, 1e-3: of elements whose gradients are that fraction of the block's largest, and
  whose mean is as large as their standard deviation;
* drop: rms(m) / rms(exact m), 20,000 steps after half of the gradients, of log-normal
  size, fell to a tenth;
* way: the error of the sum of m over an eighth of the steps;
* decay: rms(m) / rms(exact m), without gradients, when the exact one is a 32nd.

`--signs` prints how Lion does, whose gradients have a mean of 0, .1 and .3 of their
standard deviation: the share of its signs that are wrong, and the error of its way over
2,400 steps. Sizes are equal, log-normal, or equal but for one of a block, which is 100
or 1,000 times as large.

`--grow` prints how accumulators do that only grow: the relative error of their roots,
its mean and its rms, after some steps with Gaussian gradients of log-normal size; of
elements of 1e-2 and 1e-3 of the block's largest; and of those whose gradients begin or
end in step 2,000.
"""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from _formats_adam import (
    BLOCK,
    FRACTIONS,
    Forms,
    Kind,
    World,
    fresh,
    ratio,
    run,
    small,
    spread,
    squares,
    started,
    visits,
    without_gradients,
    world,
)
from _formats_candidates import CANDIDATES, DEFAULT
from _formats_grow import growing
from _formats_momentum import momentum
from _formats_signs import signs
from _formats_slow import slow
from rich.console import Console
from rich.table import Table

FIRST_BETAS = (0.9, 0.95, 0.99)
SHORT = (0.99, 0.95)  # b2, beside 0.999
PERIODS = (100, 10_000)

Column: TypeAlias = list[float]  # a number for each candidate


class Sizes(NamedTuple):
    """Of a simulation: blocks in each group, steps, and steps measured over."""

    columns: int
    settle: int
    drop: int
    window: int
    decay: int
    rare: int
    seed: int


def updates(forms: Forms, sizes: Sizes) -> dict[str, Column]:
    """Columns of the first table."""
    n, half = sizes.columns, max(sizes.columns // 2, 1)
    keys = jax.random.split(jax.random.key(sizes.seed), 3)
    before, after = spread(n, keys[0])
    short = [before[:, :half]] * len(SHORT)
    b2 = jnp.repeat(jnp.asarray([0.999, *SHORT]), jnp.asarray([2 * n, half, half]))
    where = world(jnp.hstack([before, small(n), *short]), 0.9, b2)

    def phase(kind: Kind, start: int, end: int, where: World, states: Any) -> Any:
        middle = end - sizes.window
        for ends in ((start, middle), (middle, end)):
            states, sums = run(forms, kind, squares, *ends, where, states, keys[1])
        return states, sums

    states, first = phase("normal", 0, sizes.settle, where, fresh(where, forms))
    where = world(jnp.hstack([after, small(n)]), 0.9, 0.999)
    states = jax.tree.map(lambda x: x[:, : 2 * n], states)
    end = sizes.settle + sizes.drop
    _, last = phase("normal", sizes.settle, end, where, states)
    where = world(before, 0.9, 0.999)
    _, heavy = phase("heavy", 0, sizes.settle, where, fresh(where, forms))

    def error(sums: Any, start: int, end: int) -> Column:
        return [ratio(s.error[:, start:end], s.exact[:, start:end]) for s in sums]

    def size(rows: slice, start: int, end: int) -> Column:
        parts = [(s.rounded[rows], s.exact[rows]) for s in last]
        return [ratio(x[:, start:end], y[:, start:end]) for x, y in parts]

    return {
        "error b2 .999": error(first, 0, n),
        "error b2 .99": error(first, 2 * n, 2 * n + half),
        "error b2 .95": error(first, 2 * n + half, 2 * n + 2 * half),
        "error t": error(heavy, 0, n),
        "drop": size(slice(0, None, 2), 0, n),
        **{
            f"{fraction:.0e}": size(slice(4 + 7 * k, 11 + 7 * k), n, 2 * n)
            for k, fraction in enumerate(FRACTIONS)
        },
    }


def decays(forms: Forms, sizes: Sizes) -> dict[str, Column]:
    """Columns of the second table."""
    n, steps = max(sizes.columns // 4, 1), sizes.decay
    betas = [(b1, 0.999) for b1 in FIRST_BETAS]
    where, states = without_gradients(n, betas, forms, sizes.seed)
    sums = []
    for start in (0, steps):
        key, ends = jax.random.key(sizes.seed), (start, start + steps)
        states, found = run(forms, "constant", squares, *ends, where, states, key)
        sums.append(found)
    table: dict[str, Column] = {}
    for k, b1 in enumerate(FIRST_BETAS):
        at = (slice(1, None), slice(k * n, (k + 1) * n))
        table[f"decay b1 {b1}"] = [
            float(jnp.abs(s.way[at]).sum() / jnp.abs(s.exact_way[at]).sum())
            for s in sums[0]
        ]
    for k, b1 in enumerate(FIRST_BETAS):
        at = (slice(1, None), slice(k * n, (k + 1) * n))
        table[f"stops b1 {b1}"] = [float(s.path[at].mean()) / steps for s in sums[1]]
    return table


def embeddings(forms: Forms, sizes: Sizes) -> dict[str, Column]:
    """Columns of the third table."""
    n = max(sizes.columns // 4, 1)
    shape = (BLOCK, n * len(FIRST_BETAS))
    b1 = jnp.repeat(jnp.asarray(FIRST_BETAS), n)[None]
    keys = jax.random.split(jax.random.key(sizes.seed), 3)
    periods = [1] * 8 + [PERIODS[0]] * 12 + [PERIODS[1]] * 12
    period = jnp.asarray(periods)[:, None] * jnp.ones(shape, jnp.int32)
    phase = jnp.int32(jax.random.uniform(keys[0], shape) * period)
    where = world(jnp.ones(shape), b1, 0.999)._replace(period=period, phase=phase)
    # As after many steps: what the last gradient left, and those before.
    g = jax.random.normal(keys[1], shape)
    v = jnp.where(period > 1000, 0.001 * g * g * 0.999**phase, 1 / period)
    m = jnp.where(period > 1, (1 - b1) * g * b1**phase, 0.0)
    states = started(forms, m, v)
    _, sums = run(forms, "normal", visits, 0, sizes.rare, where, states, keys[2])
    table: dict[str, Column] = {}
    for rows, every in ((slice(8, 20), PERIODS[0]), (slice(20, None), PERIODS[1])):
        for k, b in enumerate(FIRST_BETAS):
            at = (rows, slice(k * n, (k + 1) * n))
            table[f"{every:,} b1 {b}"] = [
                float(s.rounded[at].sum() / s.exact[at].sum()) for s in sums
            ]
    for k, b in enumerate(FIRST_BETAS):
        at = (slice(20, None), slice(k * n, (k + 1) * n))
        table[f"late b1 {b}"] = [
            abs(float((s.late - s.exact_late)[at].sum() / s.late_steps[at].sum()))
            for s in sums
        ]
    table["others"] = [ratio(s.error[:8], s.squares[:8]) for s in sums]
    return table


def text(x: Any) -> str:
    """A number, or what is said instead."""
    if isinstance(x, str):
        return x
    if not math.isfinite(x):
        return "overflows"
    return f"{x:.3g}" if x > 99 else f"{x:.3f}"


def show(title: str, names: Sequence[str], table: dict[str, Any]) -> None:
    """Print a table."""
    shown = Table(title=title)
    shown.add_column("m / v", no_wrap=True)
    for name in table:
        shown.add_column(name, justify="right")
    for name, *row in zip(names, *table.values(), strict=True):
        shown.add_row(name, *map(text, row))
    Console(width=max(Console().width, 130)).print(shown)


def main(argv: Sequence[str] | None = None) -> None:
    """Compute the tables and print them."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--columns", type=int, default=256, help="blocks in each group")
    parser.add_argument("--settle", type=int, default=4000, help="steps at first")
    parser.add_argument("--drop", type=int, default=6000, help="steps after the drop")
    parser.add_argument("--window", type=int, default=500, help="steps measured over")
    parser.add_argument("--decay", type=int, default=2500, help="of the second table")
    parser.add_argument("--rare", type=int, default=11_000, help="of the third table")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--slow", action="store_true", help="slow first moments")
    parser.add_argument("--signs", action="store_true", help="Lion")
    parser.add_argument("--grow", action="store_true", help="what only grows")
    parser.add_argument("--quick", action="store_true", help="few steps: a smoke test")
    parser.add_argument("--only", nargs="+", choices=CANDIDATES, help="these rows")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    args = parser.parse_args(argv)
    names = args.only or list(CANDIDATES)
    sizes = Sizes(*(getattr(args, field) for field in Sizes._fields))
    if args.quick:
        sizes = Sizes(32, 40, 40, 20, 40, 1000, args.seed)
        names = [DEFAULT]
    if args.grow:
        for title, labels, table in growing(sizes.columns, args.seed, args.quick):
            show(title, labels, table)
        return
    if args.signs:
        steps = 200 if args.quick else 3_000
        show("Lion", *signs(sizes.columns, steps, args.seed))
        return
    if args.slow:
        steps = 200 if args.quick else 20_000
        for title, measure in (("Slow first moments", slow), ("Momentum", momentum)):
            show(title, *measure(sizes.columns, steps, args.seed))
        return
    forms = tuple(CANDIDATES[name] for name in names)
    rows: dict[str, dict[str, float]] = {name: {} for name in names}
    for title, measure in (
        ("The update", updates),
        ("Elements that get no more gradients", decays),
        ("Rows of an embedding", embeddings),
    ):
        table = measure(forms, sizes)
        show(title, names, table)
        for column, numbers in table.items():
            for name, number in zip(names, numbers, strict=True):
                rows[name][column] = number
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
