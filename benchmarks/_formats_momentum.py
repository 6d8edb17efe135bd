"""How momentum alone does, SGD's: the second table of `formats.py --slow`."""

import math

import jax
import jax.numpy as jnp
from _formats_adam import (
    BLOCK,
    Forms,
    State,
    ratio,
    run,
    spread,
    squares,
    started,
    world,
)
from _formats_candidates import MOMENTA

MOMENTUMS = (0.9, 0.99, 0.999, 0.9999)
_FRACTIONS = (1e-2, 1e-3)
_HALVINGS = 5  # that momentum decays by, without gradients


def momentum(columns: int, steps: int, seed: int) -> tuple[list[str], dict[str, list]]:
    """Labels of the rows, and the columns of the table."""
    forms, n = tuple(MOMENTA.values()), max(columns // 4, 1)
    found = {**_errors(forms, n, steps, seed), **_decays(forms, n, steps, seed)}
    labels = [f"{name}, {b}" for name in MOMENTA for b in MOMENTUMS]
    columns_of = {
        name: [row[j] for j in range(len(forms)) for row in rows]
        for name, rows in found.items()
    }
    return labels, columns_of


def _errors(forms: Forms, n: int, steps: int, seed: int) -> dict[str, list]:
    """Of m beside its block's rms, and of small elements beside their own."""
    keys = jax.random.split(jax.random.key(seed), 2)
    rows = jnp.asarray([1.0] * 4 + [_FRACTIONS[0]] * 14 + [_FRACTIONS[1]] * 14)
    small = rows[:, None] * jnp.ones((1, n))
    b = jnp.repeat(jnp.asarray(MOMENTUMS), n)
    groups = {
        "normal": [jnp.ones((BLOCK, n)), spread(n, keys[0])[0]],
        "drift": [small],
    }
    sums = {}
    for kind, sigmas in groups.items():
        where = world(jnp.hstack([jnp.tile(x, len(MOMENTUMS)) for x in sigmas]), 0, 0)
        where = where._replace(b1=jnp.tile(b, len(sigmas))[None])
        states = started(forms, jnp.zeros(where.sigma.shape))
        for ends in ((0, steps - steps // 8), (steps - steps // 8, steps)):
            states, sums[kind] = run(
                forms, kind, squares, *ends, where, states, keys[1]
            )
    table = {}
    for j, name in enumerate(("equal", "log-normal")):
        parts = [slice((j * 4 + k) * n, (j * 4 + k + 1) * n) for k in range(4)]
        table[f"error, {name}"] = [
            [ratio(s.error[:, part], s.exact[:, part]) for s in sums["normal"]]
            for part in parts
        ]
    parts = [slice(k * n, (k + 1) * n) for k in range(4)]
    groups = ((slice(4, 18), _FRACTIONS[0]), (slice(18, 32), _FRACTIONS[1]))
    for at, fraction in groups:
        table[f"error {fraction:.0e}"] = [
            [ratio(s.error[at, part], s.exact[at, part]) for s in sums["drift"]]
            for part in parts
        ]
    for at, fraction in groups:
        table[f"way {fraction:.0e}"] = [
            [
                ratio((s.way - s.exact_way)[at, p] ** 2, s.exact_way[at, p] ** 2)
                for s in sums["drift"]
            ]
            for p in parts
        ]
    return table


def _decays(forms: Forms, n: int, steps: int, seed: int) -> dict[str, list]:
    """The norm of moments that get no more gradients, over the exact one's."""
    shape = (BLOCK, n)
    size = jax.random.normal(jax.random.key(seed), shape)
    found = []
    for b in MOMENTUMS:
        states: tuple[State, ...] = started(forms, size)
        where = world(jnp.zeros(shape), b, 0)
        end = min(steps, int(_HALVINGS * math.log(2) / (1 - b)))
        for ends in ((0, end), (end, end + 1)):
            key = jax.random.key(seed)
            states, sums = run(forms, "normal", squares, *ends, where, states, key)
        found.append([ratio(s.rounded, s.exact) for s in sums])
    return {"decay": found}
