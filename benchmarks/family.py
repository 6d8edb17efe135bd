"""How far each optimizer gets from its 32-bit self, in each format of its state.

An optimizer runs freely on its own rounded state, next to the same one with state in
32 bits that sees the same gradients. These do not depend on the parameters: they are
Gaussian, each element has a scale of its own (log-normal, sigma 1), so that scales
differ within a block, and a mean of a tenth of its standard deviation. Learning rates
are constant; hyperparameters are the defaults but for those in `FAMILY`.

* bytes: of state, per parameter of a leaf of 4096 x 4096;
* error: rms(update - exact update) / rms(exact update), over the last 100 steps;
* way: |p - exact p| / |exact p - start|, after the last step. For `other`, p is of
  another run in 32 bits, whose gradients have the same scales and means, but other
  noise: so far apart are two runs on other batches.

Prints a Markdown table, the one of docs/optimizers/README.md.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from octavo import optim

EXACT, *ROUNDED = STATES = ("32bit", "8bit", "bf16", "dynamic8")
MEAN = 0.1  # of the gradients, in standard deviations
LAST = 100  # steps: of the error
LARGE = jax.ShapeDtypeStruct((4096, 4096), jnp.float32)

Optimizer = Callable[..., optim.Transformation]
FAMILY: dict[str, Optimizer] = {
    "adam": partial(optim.adam, 1e-3),
    "adamw": partial(optim.adamw, 1e-3, weight_decay=0.1),
    "nadam": partial(optim.nadam, 1e-3),
    "amsgrad": partial(optim.amsgrad, 1e-3),
    "adamax": partial(optim.adamax, 2e-3),
    "ademamix": partial(optim.ademamix, 1e-3),
    "lamb": partial(optim.lamb, 5e-3, weight_decay=0.01),
    "rmsprop": partial(optim.rmsprop, 1e-3),
    "rmsprop, centered, momentum 0.9": partial(
        optim.rmsprop, 1e-4, centered=True, momentum=0.9
    ),
    "adagrad": partial(optim.adagrad, 1e-2),
    "lion": partial(optim.lion, 1e-4),
    "sgd, momentum 0.9": partial(optim.sgd, 1e-3, momentum=0.9),
    "lars": partial(optim.lars, 1.0),
}


class Sums(NamedTuple):
    """Of squares, over the last steps."""

    error: jax.Array
    exact: jax.Array


def square(x: jax.Array) -> jax.Array:
    """The sum of squares."""
    return jnp.sum(x * x)


@partial(jax.jit, static_argnames=("make", "steps", "size"))
def measured(make: Optimizer, steps: int, size: tuple[int, int], seed: int) -> Any:
    """Errors, in the order of `ROUNDED`, and ways, of which the last is `other`."""
    keys = jax.random.split(jax.random.key(seed), 4)
    start = jax.random.normal(keys[0], size)
    scale = jnp.exp(jax.random.normal(keys[1], size))
    mean = MEAN * jax.random.rademacher(keys[2], size, jnp.float32)
    optimizers = [make(state=name) for name in (*STATES, EXACT)]

    def step(carry: Any, t: jax.Array) -> Any:
        noise = jax.random.normal(jax.random.fold_in(keys[3], t), (2, *size))
        same, other = scale * (mean + noise)
        updates, runs = [], []
        grads = [*(same for _ in STATES), other]
        for tx, g, (params, state) in zip(optimizers, grads, carry[0], strict=True):
            update, state = tx.update(g, state, params)
            updates.append(update)
            runs.append((optax.apply_updates(params, update), state))
        exact, *rounded, _ = updates
        last = (t >= steps - LAST).astype(jnp.float32)
        errors = jnp.stack([square(u - exact) for u in rounded])
        new = Sums(last * errors, last * square(exact))
        return (runs, jax.tree.map(jnp.add, carry[1], new)), None

    zeros = Sums(jnp.zeros(len(ROUNDED)), jnp.zeros(()))
    runs = [(start, tx.init(start)) for tx in optimizers]
    (runs, sums), _ = lax.scan(step, (runs, zeros), jnp.arange(steps))
    exact, *others = (params for params, _ in runs)
    ways = jnp.stack([square(p - exact) for p in others])
    return (sums.error / sums.exact) ** 0.5, (ways / square(exact - start)) ** 0.5


def bytes_of(make: Optimizer) -> dict[str, float]:
    """Of state per parameter, by format."""
    reports = {name: optim.memory_report(make(state=name), LARGE) for name in STATES}
    return {
        name: report.rows[0].bytes / report.parameters
        for name, report in reports.items()
    }


def figures(
    make: Optimizer, steps: int, size: tuple[int, int], seed: int
) -> dict[str, float]:
    """A row of the table: a number for each of its columns."""
    errors, ways = measured(make, steps, size, seed)
    row = {f"bytes {name}": number for name, number in bytes_of(make).items()}
    columns = [f"error {name}" for name in ROUNDED]
    columns += [f"way {name}" for name in (*ROUNDED, "other")]
    numbers = [*errors.tolist(), *ways.tolist()]
    return row | dict(zip(columns, numbers, strict=True))


def cell(column: str, number: float) -> str:
    """A number as the table shows it."""
    if column.startswith("bytes"):
        return f"{number:.4f}".rstrip("0").rstrip(".")
    return f"{number:.3f}".lstrip("0")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the optimizers and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--size", type=int, nargs=2, default=(512, 64))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--optimizers", nargs="+", choices=FAMILY, default=list(FAMILY), metavar="NAME"
    )
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    args = parser.parse_args(argv)
    rows: dict[str, dict[str, float]] = {}
    for name in args.optimizers:
        row = figures(FAMILY[name], args.steps, tuple(args.size), args.seed)
        if not rows:
            titles = [column.replace(" ", ": ") for column in row]
            print(f"| optimizer | {' | '.join(titles)} |")
            print("|---" * (len(row) + 1) + "|")
        shown = " | ".join(cell(column, number) for column, number in row.items())
        print(f"| {name} | {shown} |", flush=True)
        rows[name] = row
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
