"""Accumulators that only grow: what `formats.py --grow` measures."""

from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from _formats_adam import BLOCK, spread
from _formats_candidates import BITS8, F32, Bits
from _formats_sixteen import BF16
from jax import lax

from octavo.optim.adagrad import AdagradNumbers, adagrad_rule
from octavo.optim.adam import AMSGRAD, AdamNumbers
from octavo.pallas_kernels import (
    Blocks,
    Format,
    Leaf,
    Program,
    Rule,
    Scalars,
    Storage,
    StoredSlot,
)
from octavo.pallas_kernels.arithmetic import QUICK, using
from octavo.pallas_kernels.rounding import NOISE_BITS
from octavo.pallas_kernels.step import tile_step

STEPS, QUICK_STEPS = (100, 1_000, 10_000, 30_000), (20, 40)
_TURN = 2_000  # the step in which gradients begin, or end


class Growing(NamedTuple):
    """A rule, its hyperparameters, and a format for each slot; the last one grows."""

    rule: Rule
    numbers: Any
    formats: tuple[Format, ...]

    @property
    def exact(self) -> "Growing":
        """The same in 32 bits."""
        return self._replace(formats=(F32,) * len(self.formats))


def _sums(initial: float) -> dict[str, Growing]:
    forms = {"bits8": BITS8, "bits8, scales of bf16": Bits(9, 7), "bf16": BF16}
    numbers = AdagradNumbers(eps=1e-10, lr_decay=0.0, eps_in_sqrt=True)
    return {
        f"{name}, from {initial}": Growing(adagrad_rule(initial), numbers, (form,))
        for name, form in forms.items()
    }


def _largest() -> dict[str, Growing]:
    *others, kept = AMSGRAD.slots
    noisy = replace(AMSGRAD, slots=(*others, kept._replace(nearest=False)))
    numbers = AdamNumbers(b1=0.9, b2=0.999, eps=1e-8)
    return {
        "v bits8, largest bits8, unbiased": Growing(
            noisy, numbers, (F32, BITS8, BITS8)
        ),
        "v bits8, largest bits8": Growing(AMSGRAD, numbers, (F32, BITS8, BITS8)),
        "v bf16, largest bits8": Growing(AMSGRAD, numbers, (F32, BF16, BITS8)),
        "v bf16, largest bf16": Growing(AMSGRAD, numbers, (F32, BF16, BF16)),
        "v f32, largest bits8": Growing(AMSGRAD, numbers, (F32, F32, BITS8)),
    }


def _storage(case: Growing, shape: tuple[int, ...]) -> Storage:
    pairs = zip(case.rule.slots, case.formats, strict=True)
    slots = [
        StoredSlot(slot.name, form, jnp.dtype(form.dtype), slot.initial)
        for slot, form in pairs
    ]
    return Storage(jnp.dtype("float32"), Blocks(shape, 0, BLOCK), tuple(slots))


def _started(case: Growing, shape: tuple[int, ...]) -> tuple[Any, Any]:
    """Codes and scales."""
    storage = _storage(case, shape)
    pairs = [
        storage.encode(k, jnp.full(shape, slot.initial))
        for k, slot in enumerate(case.rule.slots)
    ]
    codes, scales = zip(*pairs, strict=True)
    return codes, scales


def _stepped(case: Growing, state: Any, g: jax.Array, t: jax.Array, noise: Any) -> Any:
    """The library's own step."""
    program = Program(case.rule, _storage(case, g.shape), in_place=False)
    one = jnp.float32(1.0)
    numbers = case.rule.scalars(jnp.float32(t + 1), one, case.numbers)
    scalars = Scalars(one, numbers, decay=jnp.float32(0.0))
    new = tile_step(
        program,
        Leaf(g, jnp.zeros_like(g), *state),
        scalars,
        largest=lambda x: jnp.max(x, axis=0, keepdims=True),
        random=lambda draw: noise[draw.slot],
    )
    return new.codes, new.scales


def _gradients(sigma: jax.Array, t: jax.Array, key: jax.Array) -> jax.Array:
    """Of the last group, a quarter begins late, and another one ends."""
    row = jnp.arange(BLOCK)[:, None] % 4
    alive = jnp.where(row == 0, t >= _TURN, jnp.where(row == 1, t < _TURN, True))
    turns = jnp.arange(sigma.shape[1]) >= sigma.shape[1] * 2 // 3
    return jnp.where(alive | ~turns, sigma * jax.random.normal(key, sigma.shape), 0.0)


@partial(jax.jit, static_argnums=(0,))
def _run(
    cases: tuple[Growing, ...],
    states: tuple[Any, ...],
    ends: tuple[int, int],
    sigma: jax.Array,
    seed: jax.Array,
) -> tuple[Any, ...]:
    """All cases, with the same gradients and random numbers."""

    def step(t: jax.Array, states: tuple[Any, ...]) -> tuple[Any, ...]:
        keys = jax.random.split(jax.random.fold_in(seed, t))
        g = _gradients(sigma, t, keys[0])
        noise = jax.random.randint(keys[1], (3, *g.shape), 0, 1 << NOISE_BITS)
        pairs = zip(cases, states, strict=True)
        return tuple(_stepped(case, state, g, t, noise) for case, state in pairs)

    with using(QUICK):
        return lax.fori_loop(*ends, step, states)


def _root(case: Growing, state: Any, shape: tuple[int, ...]) -> jax.Array:
    """Of what grows."""
    codes, scales = state
    return jnp.sqrt(_storage(case, shape).decode(-1, codes[-1], scales[-1]))


def _gradient_sizes(columns: int, key: jax.Array) -> jax.Array:
    """Three groups: log-normal, small ones beside large ones, log-normal again."""
    n = max(columns // 4, 1)
    small = jnp.asarray([1.0] * 4 + [1e-2] * 14 + [1e-3] * 14)[:, None]
    equal = spread(n, key)[0]
    return jnp.hstack([equal, small * jnp.ones((1, n)), equal])


def _measured(
    cases: dict[str, Growing], steps: tuple[int, ...], columns: int, seed: int
) -> tuple[list[str], dict[str, list[str]]]:
    """Labels of the rows, and the columns of a table."""
    keys = jax.random.split(jax.random.key(seed))
    sigma = _gradient_sizes(columns, keys[0])
    n = sigma.shape[1] // 3
    groups = {
        "all": (slice(None), slice(0, n)),
        "1e-2": (slice(4, 18), slice(n, 2 * n)),
        "1e-3": (slice(18, 32), slice(n, 2 * n)),
        "late": (slice(0, None, 4), slice(2 * n, None)),
        "ended": (slice(1, None, 4), slice(2 * n, None)),
    }
    every = (next(iter(cases.values())).exact, *cases.values())
    states = tuple(_started(case, sigma.shape) for case in every)
    labels: list[str] = []
    found: dict[str, list[str]] = {name: [] for name in groups}
    for start, end in zip((0, *steps), steps, strict=False):
        states = _run(every, states, (start, end), sigma, keys[1])
        pairs = zip(every, states, strict=True)
        exact, *roots = [_root(case, state, sigma.shape) for case, state in pairs]
        labels += [f"{name}, {end:,} steps" for name in cases]
        for name, at in groups.items():
            begun = name != "late" or end > _TURN
            errors = [(x / exact - 1)[at] for x in roots]
            found[name] += [_mean_and_rms(x) if begun else "" for x in errors]
    return labels, found


def _mean_and_rms(x: jax.Array) -> str:
    return f"{float(x.mean()):.3f} / {float((x**2).mean() ** 0.5):.3f}"


def growing(
    columns: int, seed: int, quick: bool
) -> list[tuple[str, list[str], dict[str, list[str]]]]:
    """Title, labels of rows and columns of each table."""
    steps = QUICK_STEPS if quick else STEPS
    groups = (("Adagrad's sum", _sums(0.0)), ("Adagrad's sum", _sums(0.1)))
    tables = (*groups, ("AMSGrad's largest v", _largest()))
    return [(title, *_measured(c, steps, columns, seed)) for title, c in tables]
