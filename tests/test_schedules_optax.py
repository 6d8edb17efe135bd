"""Schedules beside optax's own, and inside everything of optax that takes one."""

import inspect
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from octavo import optim, schedules

STEPS = 200
SCHEDULE = schedules.PolynomialLR(0.1, total_steps=12, warmup_steps=4)


def _one_cycle(total: int, pct: float, **options) -> schedules.OneCycleLR:
    """The cycle whose phases end where optax's do, one step after torch's."""
    share = (pct * total + 1) / (total + 1)
    return schedules.OneCycleLR(0.3, total + 1, pct_start=share, **options)


_cosine = {"init_value": 0.3, "peak_value": 0.3, "warmup_steps": 0}
PAIRS = [
    (schedules.PolynomialLR(0.3, 60, 2.5), optax.polynomial_schedule(0.3, 0, 2.5, 60)),
    (
        schedules.PolynomialLR(0.3, 60, 1.5, 0.01, warmup_steps=20),
        optax.join_schedules(
            [
                optax.linear_schedule(0.0, 0.3, 20),
                optax.polynomial_schedule(0.3, 0.01, 1.5, 40),
            ],
            [20],
        ),
    ),
    (
        schedules.LinearLR(0.3, 0.2, 0.7, 60),
        optax.linear_schedule(0.3 * 0.2, 0.3 * 0.7, 60),
    ),
    (
        schedules.StepLR(0.3, 25, 0.4),
        optax.exponential_decay(0.3, 25, 0.4, staircase=True),
    ),
    (schedules.ExponentialLR(0.3, 0.98), optax.exponential_decay(0.3, 1, 0.98)),
    (
        schedules.ExponentialDecayLR(0.3, 25, 0.4, 10, end_value=0.02),
        optax.exponential_decay(0.3, 25, 0.4, 10, end_value=0.02),
    ),
    (
        schedules.MultiStepLR(0.3, [20, 50], 0.2),
        optax.piecewise_constant_schedule(0.3, {20: 0.2, 50: 0.2}),
    ),
    (
        schedules.PiecewiseConstantLR([20, 50], [0.3, 0.6, 0.15]),
        optax.piecewise_constant_schedule(0.3, {20: 2.0, 50: 0.25}),
    ),
    (
        schedules.CosineAnnealingLR(0.3, 60, 0.03, clamped=True),
        optax.cosine_decay_schedule(0.3, 60, alpha=0.1),
    ),
    (
        schedules.CosineAnnealingWarmRestarts(0.3, 20, 2),
        optax.sgdr_schedule([{**_cosine, "decay_steps": 20 * 2**n} for n in range(4)]),
    ),
    (_one_cycle(100, 0.3), optax.cosine_onecycle_schedule(100, 0.3, 0.3)),
    (
        _one_cycle(100, 0.3, anneal_strategy="linear", three_phase=True),
        optax.linear_onecycle_schedule(100, 0.3, 0.3, 0.6),
    ),
    (
        schedules.WarmupLR(0.3, 20, 0.1),
        optax.warmup_constant_schedule(0.1, 0.3, 20),
    ),
    (
        schedules.WarmupCosineLR(0.3, 80, 20, 0.1, 0.03),
        optax.warmup_cosine_decay_schedule(0.1, 0.3, 20, 80, 0.03),
    ),
    (
        schedules.SequentialLR(
            [schedules.WarmupLR(0.3, 20), schedules.ExponentialLR(0.3, 0.98)], [20]
        ),
        optax.warmup_exponential_decay_schedule(0.0, 0.3, 20, 1, 0.98),
    ),
]


@pytest.mark.parametrize(
    ("ours", "theirs"),
    PAIRS,
    ids=[f"{type(ours).__name__}-{k}" for k, (ours, _) in enumerate(PAIRS)],
)
def test_equal_to_optax(ours: schedules.Schedule, theirs: optax.Schedule) -> None:
    steps = jnp.arange(STEPS, dtype=jnp.int32)
    # Many of optax's schedules mix int32 and floats, which strict promotion forbids.
    with jax.numpy_dtype_promotion("standard"):
        expected = jax.vmap(lambda step: jnp.asarray(theirs(step)))(steps)
    # optax rounds 1 - t / T, so its error is absolute, of the size of the peak.
    np.testing.assert_allclose(ours(steps), expected, rtol=1e-6, atol=2e-7 * 0.3)


OPTIMIZERS: list[Callable[..., optax.GradientTransformation]] = [
    make
    for name, make in sorted(vars(optim).items())
    if not name.startswith("_")
    and inspect.isfunction(make)
    and next(iter(inspect.signature(make).parameters), "") == "learning_rate"
]
# optax.adamw itself fails under strict promotion.
OPTIMIZERS += [optax.sgd, optax.lion]
everywhere = pytest.mark.parametrize(
    "make", OPTIMIZERS, ids=lambda make: f"{make.__module__}.{make.__name__}"
)


def _trained(tx: optax.GradientTransformation, state, params, steps: int):
    """Parameters before and after ``steps`` updates with a gradient of their own."""

    @jax.jit
    def step(params, state):
        grads = jax.tree.map(lambda p: p * p - 0.1, params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    history = []
    for _ in range(steps):
        params, state = step(params, state)
        history.append(params)
    assert step._cache_size() == 1
    return history, state


def _params() -> dict[str, jax.Array]:
    return {"w": jnp.linspace(-1.0, 1.0, 32 * 128).reshape(32, 128), "b": jnp.ones(3)}


def test_the_optimizers_are_found() -> None:
    assert {optim.adam, optim.adamw} <= set(OPTIMIZERS)


@everywhere
def test_as_learning_rate(make: Callable[..., optax.GradientTransformation]) -> None:
    params = _params()
    tx = make(SCHEDULE)
    first, state = _trained(tx, tx.init(params), params, 1)
    chex.assert_trees_all_equal(first[0], params)  # The warmup starts at 0.
    after, state = _trained(tx, state, params, 11)
    late, _ = _trained(tx, state, after[-1], 2)
    if make is optim.lars:  # Its momentum holds earlier rates, and so it coasts on.
        coasting = jax.tree.map(lambda a, b: 0.9 * (a - b), after[-1], after[-2])
        moved = jax.tree.map(jnp.subtract, late[0], after[-1])
        # mulaw8 is within a step, a 32nd of a value and of 1/14.75 of the scale, which
        # is within 1/128 of the largest; each p of size 1 within 6e-8.
        for x, y in zip(*map(jax.tree.leaves, (moved, coasting)), strict=True):
            off = (jnp.abs(y) + jnp.abs(y).max() / 14.6) / 32 + 2.4e-7
            assert (jnp.abs(x - y) <= off).all()
    else:
        chex.assert_trees_all_equal(late[0], after[-1])  # The decay has ended at 0.
    for leaf in jax.tree.leaves(jax.tree.map(jnp.subtract, after[-1], params)):
        assert jnp.abs(leaf).max() > 0.0


@everywhere
def test_interrupted_and_resumed(make) -> None:
    params = _params()
    tx = make(SCHEDULE)
    straight, _ = _trained(tx, tx.init(params), params, 9)
    head, state = _trained(tx, tx.init(params), params, 5)
    stored = jax.tree.map(np.asarray, (head[-1], state))
    again, state = jax.tree.map(jnp.asarray, stored)
    config = SCHEDULE.to_dict()
    tail, _ = _trained(make(schedules.Schedule.from_dict(config)), state, again, 4)
    chex.assert_trees_all_equal(straight, head + tail)


@pytest.mark.parametrize("make", [optim.adamw, optax.lion], ids=["ours", "optax"])
def test_injected_as_hyperparameter(make) -> None:
    chex.clear_trace_counter()
    params = _params()
    tx = optax.inject_hyperparams(make)(learning_rate=SCHEDULE)
    state = tx.init(params)
    chex.assert_type(state.hyperparams["learning_rate"], jnp.float32)
    step = jax.jit(chex.assert_max_traces(tx.update, n=1))
    for count in range(14):
        _, state = step(params, state, params)
        np.testing.assert_allclose(
            state.hyperparams["learning_rate"], SCHEDULE(count), rtol=3e-7
        )


def test_injected_resumes_at_the_same_rates() -> None:
    params = jnp.ones(4)
    tx = optax.inject_hyperparams(optax.sgd)(SCHEDULE)

    def rates(state, steps: int):
        seen = []
        for _ in range(steps):
            _, state = tx.update(params, state, params)
            seen.append(float(state.hyperparams["learning_rate"]))
        return seen, state

    straight, _ = rates(tx.init(params), 14)
    head, state = rates(tx.init(params), 6)
    tail, _ = rates(jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), state), 8)
    assert straight == head + tail == [float(SCHEDULE(step)) for step in range(14)]


def test_a_plateau_behind_a_scheduled_optimizer() -> None:
    params = _params()
    alone = optim.adamw(SCHEDULE)
    plateau = schedules.ReduceLROnPlateau(0.1, patience=0)
    tx = optax.chain(optim.adamw(SCHEDULE), plateau)
    states = alone.init(params), tx.init(params)
    step = jax.jit(lambda g, s, p, value: tx.update(g, s, p, value=value))
    for factor in (1.0, 0.1, 0.01):
        full, first = jax.jit(alone.update)(params, states[0], params)
        scaled, second = step(params, states[1], params, jnp.float32(2.0))
        states = first, second
        expected = jax.tree.map(lambda leaf, factor=factor: factor * leaf, full)
        chex.assert_trees_all_close(scaled, expected, rtol=1e-5)


def test_inside_join_schedules_and_multi_steps() -> None:
    joined = optax.join_schedules([SCHEDULE, schedules.StepLR(0.1, 5)], [12])
    for step in (jnp.int32(3), jnp.int32(12), jnp.int32(17)):
        part = SCHEDULE(step) if step < 12 else schedules.StepLR(0.1, 5)(step - 12)
        assert joined(step) == part
    tx = optax.MultiSteps(optax.sgd(SCHEDULE), every_k_schedule=2)
    params = jnp.ones(2)
    with jax.numpy_dtype_promotion("standard"):
        state = tx.init(params)
        for _ in range(4):
            updates, state = tx.update(jnp.ones(2), state, params)
    # Two accumulated steps were taken, the second one at count 1.
    np.testing.assert_allclose(updates, -SCHEDULE(1) * jnp.ones(2), rtol=1e-6)
