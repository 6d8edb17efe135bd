"""Schedules compute their formulas: everywhere, exactly at the ends, and to the end."""

import dataclasses
import json
import math
import pickle

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from schedule_cases import ALL_CASES, Case, Reference
from schedule_formulas import cyclic, half_cosine, polynomial, restarts, wsd

from octavo import schedules
from octavo.schedules.base import REGISTRY

LONG = 10_000_000
cases = pytest.mark.parametrize("case", ALL_CASES, ids=lambda case: case.id[:80])


def tolerance(case: Case) -> float:
    # Between two waves the rate comes close to zero without an end to measure from.
    waves = getattr(case.schedule, "num_cycles", 0.5)
    return 1e-6 if waves <= 0.5 else 4e-6


@cases
def test_values_follow_the_formula(case: Case) -> None:
    steps = np.arange(case.steps + 1)
    expected = np.array([case.reference(int(step)) for step in steps])
    rates = case.schedule(steps)
    chex.assert_shape(rates, steps.shape)
    chex.assert_type(rates, jnp.float32)
    np.testing.assert_allclose(rates, expected, rtol=tolerance(case), atol=1e-12)


def test_every_class_has_a_case() -> None:
    assert {type(case.schedule).__name__ for case in ALL_CASES} == set(REGISTRY)


@cases
def test_every_kind_of_step_gives_the_same_rate(case: Case) -> None:
    schedule, step = case.schedule, case.steps // 3
    rate = schedule(step)
    chex.assert_shape(rate, ())
    chex.assert_type(rate, jnp.float32)
    assert not rate.weak_type
    for other in (np.int64(step), np.uint8(step), jnp.int32(step), jnp.uint32(step)):
        chex.assert_trees_all_equal(schedule(other), rate)
    chex.assert_trees_all_close(jax.jit(schedule)(jnp.int32(step)), rate, rtol=3e-7)


@cases
def test_scan_vmap_and_arrays_agree(case: Case) -> None:
    steps = jnp.arange(24, dtype=jnp.int32)
    table = case.schedule(steps)
    mapped = jax.vmap(case.schedule)(steps)
    grid = case.schedule(steps.reshape(2, 3, 4))
    _, scanned = jax.lax.scan(lambda t, _: (t + 1, case.schedule(t)), 0, length=24)
    for other in (mapped, grid.ravel(), scanned):
        chex.assert_trees_all_close(other, table, rtol=5e-7, atol=1e-12)


@cases
def test_no_recompilation_for_another_step(case: Case) -> None:
    chex.clear_trace_counter()
    rate = jax.jit(chex.assert_max_traces(case.schedule.__call__, n=1))
    for step in (0, 1, 1000):
        rate(jnp.int32(step))


@cases
def test_configs_copies_and_text_bring_back_the_schedule(case: Case) -> None:
    schedule = case.schedule
    config = json.loads(json.dumps(schedule.to_dict()))
    same = [
        schedules.Schedule.from_dict(config),
        type(schedule).from_dict(config),
        schedules.parse(repr(schedule)),
        pickle.loads(pickle.dumps(schedule)),
        dataclasses.replace(schedule),
    ]
    for other in same:
        assert other == schedule
        assert hash(other) == hash(schedule)
        assert repr(other) == repr(schedule)


def test_schedules_differ_by_fields_and_class() -> None:
    first = schedules.WarmupLR(0.1, 10)
    assert first != schedules.WarmupLR(0.1, 11)
    assert schedules.ExponentialLR(0.1, 0.5) != schedules.ChainedLR([first])
    assert len({first, schedules.WarmupLR(0.1, 10), schedules.WarmupLR(0.2, 10)}) == 2


def test_lists_and_numpy_are_stored_as_python_has_them() -> None:
    from_lists = schedules.MultiStepLR(np.float32(0.5), np.array([3, 7]), gamma=1)
    assert from_lists == schedules.MultiStepLR(0.5, (3, 7), 1.0)
    assert type(from_lists.base_lr) is float
    assert repr(from_lists) == "MultiStepLR(base_lr=0.5, milestones=[3, 7], gamma=1.0)"


@pytest.mark.parametrize("total", [7, 100, 9_999, LONG, 2**31 - 1])
@pytest.mark.parametrize("power", [1.0, 2.0, 0.9, 3.3])
def test_polynomial_meets_its_ends_exactly(total: int, power: float) -> None:
    warmup = total // 3
    schedule = schedules.PolynomialLR(3.1e-4, total, power, 7.7e-6, warmup, 1.3e-5)
    steps = jnp.asarray([0, warmup, total, min(total + 5, 2**31 - 1)], jnp.int32)
    expected = np.float32([1.3e-5, 3.1e-4, 7.7e-6, 7.7e-6])
    for rates in (schedule(steps), jax.jit(schedule)(steps)):
        np.testing.assert_array_equal(rates, expected)


@pytest.mark.parametrize(
    "schedule",
    [
        schedules.WarmupCosineLR(3.1e-4, 999, 77, 1.3e-5, 7.7e-6),
        schedules.WarmupCosineLR(3.1e-4, 999, 77, 1.3e-5, 7.7e-6, num_cycles=2.5),
        schedules.WarmupStableDecayLR(3.1e-4, 999, 300, 77, 1.3e-5, 7.7e-6, "linear"),
        schedules.WarmupStableDecayLR(3.1e-4, 999, 300, 77, 1.3e-5, 7.7e-6, "cosine"),
        schedules.WarmupStableDecayLR(3.1e-4, 999, 300, 77, 1.3e-5, 7.7e-6, "1-sqrt"),
    ],
    ids=lambda schedule: repr(schedule).replace("=", "-"),
)
def test_warmed_schedules_meet_their_ends_exactly(schedule) -> None:
    expected = np.float32([1.3e-5, 3.1e-4, 7.7e-6, 7.7e-6])
    np.testing.assert_array_equal(schedule(np.array([0, 77, 999, 5000])), expected)


def test_total_iters_is_total_steps() -> None:
    schedule = schedules.PolynomialLR(0.1, total_iters=50)
    assert schedule == schedules.PolynomialLR(0.1, 50)
    assert schedule == schedules.PolynomialLR(0.1, 50, total_iters=50)
    assert schedule.total_iters == schedule.total_steps == 50


def wave(t: int) -> float:
    # The plain formula, with the half of it that keeps its digits near zero.
    return 1e-3 * math.sin(math.pi / 2 * (LONG - t) / LONG) ** 2


LONG_CASES: list[tuple[schedules.Schedule, Reference]] = [
    (
        schedules.PolynomialLR(1e-3, LONG, power, warmup_steps=1000),
        lambda t, power=power: polynomial(t, 1e-3, LONG, power, warmup=1000),
    )
    for power in (1.0, 2.0, 0.9)
]
LONG_CASES += [
    (schedules.ExponentialLR(1e-3, 0.999999), lambda t: 1e-3 * 0.999999**t),
    (schedules.StepLR(1e-3, 1000, 0.9995), lambda t: 1e-3 * 0.9995 ** (t // 1000)),
    (
        schedules.ExponentialDecayLR(1e-3, 100_000, 0.9),
        lambda t: 1e-3 * 0.9 ** (t / 100_000),
    ),
    (schedules.CosineAnnealingLR(1e-3, LONG), wave),
    (
        schedules.CosineAnnealingLR(1e-3, 777, 1e-4),
        lambda t: half_cosine(1e-3, 1e-4, t % 1554 / 777),
    ),
    (
        schedules.CosineAnnealingWarmRestarts(1e-3, 1000, 2, 1e-5),
        lambda t: restarts(t, 1e-3, 1000, 2, 1e-5),
    ),
    (
        schedules.CyclicLR(1e-4, 1e-3, 3000, 500, "exp_range", 0.9999995),
        lambda t: cyclic(t, 1e-4, 1e-3, 3000, 500, lambda _, t: 0.9999995**t),
    ),
    (
        schedules.WarmupStableDecayLR(1e-3, LONG, LONG // 5, 1000, decay="1-sqrt"),
        lambda t: wsd(t, 1e-3, LONG, LONG // 5, 1000, lambda p: 1 - math.sqrt(p)),
    ),
    (
        schedules.InverseSqrtLR(1e-3, 1000),
        lambda t: 1e-3 * min(t / 1000, math.sqrt(1000 / max(t, 1))),
    ),
]


@pytest.mark.parametrize(
    ("schedule", "reference"),
    LONG_CASES,
    ids=[f"{type(ours).__name__}-{k}" for k, (ours, _) in enumerate(LONG_CASES)],
)
def test_f32_holds_at_step_ten_million(
    schedule: schedules.Schedule, reference: Reference
) -> None:
    anywhere = np.random.default_rng(0).integers(0, LONG, 200)
    steps = np.concatenate([anywhere, np.arange(20), LONG - np.arange(20)])
    expected = [reference(int(step)) for step in steps]
    np.testing.assert_allclose(schedule(steps), expected, rtol=1e-6, atol=1e-15)


def test_cycles_longer_than_int32_keep_their_shape() -> None:
    schedule = schedules.CosineAnnealingWarmRestarts(1.0, T_0=7, T_mult=10)
    steps = [10**9, 2 * 10**9, 2**31 - 1]
    expected = [restarts(step, 1.0, 7, 10, 0.0) for step in steps]
    np.testing.assert_allclose(schedule(np.array(steps)), expected, rtol=1e-6)


def test_extreme_factors_vanish_or_overflow_without_nan() -> None:
    steps = np.array([0, 1, 2, 100, 2**31 - 1])
    for gamma, after in ((0.0, 0.0), (1e-300, 0.0), (1e300, np.inf)):
        rates = schedules.ExponentialLR(1.0, gamma)(steps)
        np.testing.assert_array_equal(rates, [1.0] + [after] * 4)


def test_x64_mode_changes_nothing() -> None:
    schedule = schedules.PolynomialLR(1e-3, 1000, power=0.9, warmup_steps=10)
    steps = np.arange(1100)
    expected = np.asarray(schedule(steps))
    with jax.enable_x64(True):
        chex.assert_type(schedule(steps), jnp.float32)
        long_steps = jnp.asarray(steps, jnp.int64)
        rates = np.asarray(schedule(long_steps))
        beyond = schedule(jnp.int64(2**40))
        chex.assert_type(beyond, jnp.float32)
        assert beyond == 0.0
    np.testing.assert_array_equal(rates, expected)


def test_steps_can_be_static_arguments_and_closures() -> None:
    @jax.jit
    def closed(step: jax.Array) -> jax.Array:
        return schedules.StepLR(0.1, 30)(step)

    passed_in = jax.jit(lambda schedule, t: schedule(t), static_argnums=0)
    schedule = schedules.StepLR(0.1, 30)
    assert closed(jnp.int32(31)) == passed_in(schedule, jnp.int32(31)) == schedule(31)


def test_multiplicative_from_function_tabulates() -> None:
    made = schedules.MultiplicativeLR.from_function(0.1, lambda t: 1 / t, 4)
    assert made == schedules.MultiplicativeLR(0.1, [1.0, 1 / 2, 1 / 3, 1 / 4])


def test_scale_lr() -> None:
    assert schedules.scale_lr(1e-3, 4096, 256) == 4e-3
    assert schedules.scale_lr(1e-3, 64, 256, rule="linear") == 2.5e-4
