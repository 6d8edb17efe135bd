"""How slow first moments of ratio8 do: the first table of `formats.py --slow`."""

from typing import Any

import jax
import jax.numpy as jnp
from _formats_adam import (
    Forms,
    fresh,
    ratio,
    run,
    spread,
    squares,
    without_gradients,
    world,
)
from _formats_sixteen import SLOW

# b1 and b2. In the last two b1**2 > b2: where gradients end, |m| / sqrt(v) grows.
BETAS = (
    *((b1, 0.999) for b1 in (0.9, 0.95, 0.99, 0.999)),
    *((0.9, 0.95), (0.9999, 0.999), (0.99, 0.95)),
)
_WINDOW = 100  # steps: of the errors of neighbours


def slow(columns: int, steps: int, seed: int) -> tuple[list[str], dict[str, list]]:
    """Labels of the rows, and the columns of the table."""
    forms, n = tuple(SLOW.values()), max(columns // 4, 1)
    found = {**_updates(forms, n, steps, seed), **_decays(forms, n, steps, seed)}
    labels = [f"{name}, b1 {b1}, b2 {b2}" for name in SLOW for b1, b2 in BETAS]
    columns_of = {
        name: [row[j] for j in range(len(forms)) for row in rows]
        for name, rows in found.items()
    }
    return labels, columns_of


def _updates(forms: Forms, n: int, steps: int, seed: int) -> dict[str, list]:
    """Errors before the drop, and sizes of steps after it."""
    keys = jax.random.split(jax.random.key(seed), 2)
    before, after = (jnp.tile(x, len(BETAS)) for x in spread(n, keys[0]))
    b1, b2 = (jnp.repeat(jnp.asarray(b), n) for b in zip(*BETAS, strict=True))
    where = world(before, b1, b2)
    states, sums = fresh(where, forms), []
    for half, sigma in enumerate((before, after)):
        where, middle = where._replace(sigma=sigma), (half + 1) * steps
        for ends in (
            (half * steps, middle - steps // 8),
            (middle - steps // 8, middle),
        ):
            states, last = run(forms, "normal", squares, *ends, where, states, keys[1])
        sums.append(last)

    def each(half: int, field: str, row: int) -> list:
        parts = [slice(k * n, (k + 1) * n) for k in range(len(BETAS))]
        return [
            [
                ratio(getattr(s, field)[::row, part], s.exact[::row, part])
                for s in sums[half]
            ]
            for part in parts
        ]

    return {"error": each(0, "error", 1), "drop": each(1, "rounded", 2)}


def _decays(forms: Forms, n: int, steps: int, seed: int) -> dict[str, list]:
    """Elements without gradients, and the one beside them."""
    where, states = without_gradients(n, BETAS, forms, seed)
    ways: Any = None
    longest, worst = ([jnp.zeros(len(BETAS))] * len(forms) for _ in range(2))
    lengths, errors = longest, worst

    def of_each(rows: jax.Array) -> jax.Array:
        """The rms, over elements and steps, for each pair of betas."""
        mean = rows.reshape(-1, len(BETAS), n).mean((0, 2)) / _WINDOW
        return mean**0.5

    for start in range(0, steps, _WINDOW):
        ends, key = (start, start + _WINDOW), jax.random.key(seed)
        states, sums = run(forms, "constant", squares, *ends, where, states, key)
        new = [(s.way, s.exact_way) for s in sums]
        ways = new if ways is None else jax.tree.map(jnp.add, ways, new)
        lengths = [of_each(s.rounded[1:]) for s in sums]
        errors = [of_each(s.error[:1]) for s in sums]  # u is 1
        longest, worst = jax.tree.map(jnp.maximum, (longest, worst), (lengths, errors))

    def way(x: jax.Array, k: int) -> float:
        return float(jnp.abs(x[1:, k * n : (k + 1) * n]).sum())

    decays = []
    for k, (b1, b2) in enumerate(BETAS):
        grows = b1**2 > b2
        decays.append(["grows" if grows else way(x, k) / way(y, k) for x, y in ways])

    def table(found: list[jax.Array]) -> list:
        return [[float(x[k]) for x in found] for k in range(len(BETAS))]

    return {
        "decay": decays,
        "longest": table(longest),
        "at the end": table(lengths),
        "neighbour": table(worst),
        "neighbour at the end": table(errors),
    }
