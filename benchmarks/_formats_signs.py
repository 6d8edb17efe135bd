"""How Lion does, which steps by the sign of a momentum: `formats.py --signs`."""

import jax
import jax.numpy as jnp
from _formats_adam import (
    BLOCK,
    Squares,
    ratio,
    run,
    spread,
    squares,
    started,
    world,
)
from _formats_sixteen import MOMENTA

_NAMES = ("mulaw8: 8bit", "mulaw16: 16bit", "bf16: bf16", "dynamic8: dynamic8")
FORMS = {name: MOMENTA[name]._replace(signs=True) for name in (*_NAMES, "linear8")}
MEANS = (0.0, 0.1, 0.3)
_BETAS = (0.9, 0.99)
_SETTLE = 5  # the steps over those before, when m has forgotten that it was zero


def signs(columns: int, steps: int, seed: int) -> tuple[list[str], dict[str, list]]:
    """Labels of the rows, and the columns of the table."""
    forms, n = tuple(FORMS.values()), max(columns // 4, 1)
    keys = jax.random.split(jax.random.key(seed), 2)
    sizes = _sizes(n, keys[0])
    every = jnp.hstack([sigma for sigma in sizes.values() for _ in MEANS])
    mean = jnp.tile(jnp.repeat(jnp.asarray(MEANS), n), len(sizes))[None]
    where = world(every, *_BETAS)._replace(mean=mean)
    states, sums = started(forms, jnp.zeros(every.shape)), ()
    for ends in ((0, steps // _SETTLE), (steps // _SETTLE, steps)):
        states, sums = run(forms, "normal", squares, *ends, where, states, keys[1])
    table: dict[str, list] = {}
    for title in ("wrong", "way"):
        for group, name in enumerate(sizes):
            first = group * len(MEANS)
            parts = [
                slice((first + k) * n, (first + k + 1) * n) for k in range(len(MEANS))
            ]
            table[f"{title}, {name}"] = [
                _share(s, part) if title == "wrong" else _way(s, part)
                for s in sums
                for part in parts
            ]
    return [f"{name}, mean {mean}" for name in FORMS for mean in MEANS], table


def _sizes(n: int, key: jax.Array) -> dict[str, jax.Array]:
    """Standard deviations of the gradients of a block."""
    ones, first = jnp.ones((BLOCK, n)), jnp.arange(BLOCK)[:, None] == 0
    return {
        "equal": ones,
        "log-normal": spread(n, key)[0],
        "100": jnp.where(first, 100.0, ones),
        "1,000": jnp.where(first, 1_000.0, ones),
    }


def _share(s: Squares, part: slice) -> float:
    """Of signs that are wrong; a step that should have one and is 0 counts a fourth."""
    return ratio(s.error[:, part], 4 * s.exact[:, part]) ** 2


def _way(s: Squares, part: slice) -> float:
    """The error of the way, beside the way."""
    off = (s.way - s.exact_way)[:, part] ** 2
    return ratio(off, s.exact_way[:, part] ** 2)
