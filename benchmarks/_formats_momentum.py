"""How momentum alone does, SGD's: the second table of `formats.py --slow`."""

import math

import jax
import jax.numpy as jnp
from _formats_adam import (
    BLOCK,
    Forms,
    State,
    World,
    ratio,
    run,
    spread,
    squares,
    started,
    world,
)
from _formats_sixteen import MOMENTA

MOMENTUMS = (0.9, 0.99, 0.999, 0.9999)
_FRACTIONS = (1e-2, 1e-3)
_HALVINGS = 5  # that momentum decays by, without gradients


def momentum(columns: int, steps: int, seed: int) -> tuple[list[str], dict[str, list]]:
    """Labels of the rows, and the columns of the table."""
    forms, n = tuple(MOMENTA.values()), max(columns // 4, 1)
    found: dict[str, list] = {}
    for part in (_errors, _small, _decays):
        found |= part(forms, n, steps, seed)
    labels = [f"{name}, {b}" for name in MOMENTA for b in MOMENTUMS]
    columns_of = {
        name: [row[j] for j in range(len(forms)) for row in rows]
        for name, rows in found.items()
    }
    return labels, columns_of


def _world(sigmas: list[jax.Array]) -> World:
    """Groups of elements, each with every momentum."""
    count = len(MOMENTUMS)
    where = world(jnp.hstack([jnp.tile(x, count) for x in sigmas]), 0, 0)
    b = jnp.repeat(jnp.asarray(MOMENTUMS), sigmas[0].shape[1])
    return where._replace(b1=jnp.tile(b, len(sigmas))[None])


def _parts(group: int, n: int) -> list[slice]:
    """The columns of a group, for each momentum."""
    first = group * len(MOMENTUMS)
    return [slice((first + k) * n, (first + k + 1) * n) for k in range(len(MOMENTUMS))]


def _errors(forms: Forms, n: int, steps: int, seed: int) -> dict[str, list]:
    """Of m beside its block's rms; and its size after a drop."""
    keys = jax.random.split(jax.random.key(seed), 2)
    equal, (before, after) = jnp.ones((BLOCK, n)), spread(n, keys[0])
    states, sums = started(forms, jnp.zeros(_world([equal, before]).sigma.shape)), []
    for half, sigma in enumerate((before, after)):
        where, end = _world([equal, sigma]), (half + 1) * steps
        for ends in ((half * steps, end - steps // 8), (end - steps // 8, end)):
            states, last = run(forms, "normal", squares, *ends, where, states, keys[1])
        sums.append(last)
    table = {
        f"error, {name}": [
            [ratio(s.error[:, part], s.exact[:, part]) for s in sums[0]]
            for part in _parts(group, n)
        ]
        for group, name in enumerate(("equal", "log-normal"))
    }
    table["drop"] = [
        [ratio(s.rounded[::2, part], s.exact[::2, part]) for s in sums[1]]
        for part in _parts(1, n)
    ]
    return table


def _small(forms: Forms, n: int, steps: int, seed: int) -> dict[str, list]:
    """Errors of small elements beside their own size: in each step, and over many."""
    key = jax.random.split(jax.random.key(seed), 2)[1]
    rows = jnp.asarray([1.0] * 4 + [_FRACTIONS[0]] * 14 + [_FRACTIONS[1]] * 14)
    where = _world([rows[:, None] * jnp.ones((1, n))])
    where = where._replace(mean=jnp.ones_like(where.mean))
    states, sums = started(forms, jnp.zeros(where.sigma.shape)), ()
    for ends in ((0, steps - steps // 8), (steps - steps // 8, steps)):
        states, sums = run(forms, "normal", squares, *ends, where, states, key)
    groups = ((slice(4, 18), _FRACTIONS[0]), (slice(18, 32), _FRACTIONS[1]))
    table = {}
    for at, fraction in groups:
        table[f"error {fraction:.0e}"] = [
            [ratio(s.error[at, part], s.exact[at, part]) for s in sums]
            for part in _parts(0, n)
        ]
    for at, fraction in groups:
        table[f"way {fraction:.0e}"] = [
            [
                ratio((s.way - s.exact_way)[at, p] ** 2, s.exact_way[at, p] ** 2)
                for s in sums
            ]
            for p in _parts(0, n)
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
