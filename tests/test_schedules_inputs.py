"""What is not allowed says so: what was given, what may be, what to write."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from octavo import schedules as s

NAN, INF = float("nan"), float("inf")
STEP = s.StepLR(0.1, 30)

# A constructor, its arguments, and what the message has to contain.
REFUSED = [
    (s.PolynomialLR, {"base_lr": -0.1, "total_steps": 9}, "base_lr=-0.1 .*at least 0"),
    (s.PolynomialLR, {"base_lr": NAN, "total_steps": 9}, "base_lr=nan .*finite"),
    (s.PolynomialLR, {"base_lr": INF, "total_steps": 9}, "base_lr=inf .*finite"),
    (s.PolynomialLR, {"base_lr": "1", "total_steps": 9}, "base_lr='1' .*not str"),
    (s.PolynomialLR, {"base_lr": True, "total_steps": 9}, "base_lr=True .*not bool"),
    (s.PolynomialLR, {"base_lr": np.ones(2), "total_steps": 9}, "arrays into floats"),
    (s.PolynomialLR, {"base_lr": 0.1}, "total_steps=None .*from 1"),
    (s.PolynomialLR, {"base_lr": 0.1, "total_steps": 0}, "total_steps=0 .*from 1"),
    (s.PolynomialLR, {"base_lr": 0.1, "total_steps": -5}, "total_steps=-5 .*from 1"),
    (s.PolynomialLR, {"base_lr": 0.1, "total_iters": 0}, "total_steps=0 .*from 1"),
    (s.PolynomialLR, {"base_lr": 0.1, "total_steps": 1e4}, "write 10000"),
    (s.PolynomialLR, {"base_lr": 0.1, "total_steps": 2**31}, "to 2147483647"),
    (
        s.PolynomialLR,
        {"base_lr": 0.1, "total_steps": 9, "total_iters": 8},
        "total_steps=9 and total_iters=8; write one",
    ),
    (s.PolynomialLR, {"base_lr": 0.1, "total_steps": 9, "power": 0}, "power=0 .*above"),
    (
        s.PolynomialLR,
        {"base_lr": 0.1, "total_steps": 9, "warmup_steps": 9},
        "warmup_steps=9 must be below total_steps=9",
    ),
    (
        s.WarmupCosineLR,
        {"base_lr": 0.1, "total_steps": 9, "warmup_steps": 20},
        "warmup_steps=20 must be below total_steps=9",
    ),
    (
        s.WarmupCosineLR,
        {"base_lr": 0.1, "total_steps": 9, "num_cycles": 0.0},
        "num_cycles=0.0 .*above 0",
    ),
    (
        s.WarmupStableDecayLR,
        {"base_lr": 0.1, "total_steps": 9, "decay_steps": 5, "warmup_steps": 5},
        "decay_steps=5 must be at most 4",
    ),
    (
        s.WarmupStableDecayLR,
        {"base_lr": 0.1, "total_steps": 9, "decay_steps": 5, "decay": "sqrt"},
        "decay='sqrt' .*'1-sqrt'",
    ),
    (s.WarmupLR, {"base_lr": 0.1, "warmup_steps": -1}, "warmup_steps=-1 .*from 0"),
    (s.InverseSqrtLR, {"base_lr": 0.1, "warmup_steps": 5, "timescale": 0}, "from 1"),
    (s.ConstantLR, {"base_lr": 0.1, "total_iters": -1}, "total_iters=-1 .*from 0"),
    (s.LinearLR, {"base_lr": 0.1, "total_iters": 0}, "total_iters=0 .*from 1"),
    (s.StepLR, {"base_lr": 0.1, "step_size": 0}, "step_size=0 .*from 1"),
    (s.StepLR, {"base_lr": 0.1, "step_size": True}, "step_size=True .*whole"),
    (s.StepLR, {"base_lr": 0.1, "step_size": 3, "gamma": -1}, "gamma=-1 .*at least 0"),
    (s.MultiStepLR, {"base_lr": 0.1, "milestones": [3, 3]}, "must increase"),
    (s.MultiStepLR, {"base_lr": 0.1, "milestones": [5, 3]}, "must increase"),
    (s.MultiStepLR, {"base_lr": 0.1, "milestones": []}, "at least 1 item"),
    (s.MultiStepLR, {"base_lr": 0.1, "milestones": [0]}, "item 0 .*from 1"),
    (s.MultiStepLR, {"base_lr": 0.1, "milestones": 30}, "list or a tuple"),
    (s.MultiStepLR, {"base_lr": 0.1, "milestones": "30"}, "list or a tuple"),
    (s.PiecewiseConstantLR, {"boundaries": [3], "values": [1.0]}, "one item more"),
    (s.PiecewiseConstantLR, {"boundaries": [3], "values": [1.0, -1.0]}, "item 1"),
    (s.MultiplicativeLR, {"base_lr": 0.1, "factors": []}, "at least 1 item"),
    (s.ExponentialLR, {"base_lr": 0.1, "gamma": None}, "gamma=None .*NoneType"),
    (s.ExponentialDecayLR, {"base_lr": 0.1, "decay_steps": 0}, "decay_steps=0"),
    (s.ExponentialDecayLR, {"base_lr": 0.1, "decay_rate": 0.0}, "above 0"),
    (s.ExponentialDecayLR, {"base_lr": 0.1, "staircase": 1}, "True or False"),
    (s.CosineAnnealingLR, {"base_lr": 0.1, "T_max": 0}, "T_max=0 .*from 1"),
    (s.CosineAnnealingWarmRestarts, {"base_lr": 0.1, "T_0": 0}, "T_0=0 .*from 1"),
    (
        s.CosineAnnealingWarmRestarts,
        {"base_lr": 0.1, "T_0": 5, "T_mult": 1.5},
        "T_mult=1.5 .*whole",
    ),
    (s.CyclicLR, {"base_lr": 0.1, "max_lr": 1, "mode": "square"}, "'triangular2'"),
    (s.CyclicLR, {"base_lr": 0.1, "max_lr": 1, "step_size_down": 0}, "from 1"),
    (s.CyclicLR, {"base_lr": 0.1, "max_lr": 1, "step_size_up": 2**30}, "a cycle of"),
    (s.OneCycleLR, {"max_lr": 0.1, "total_steps": 0}, "total_steps=0 .*from 1"),
    (s.OneCycleLR, {"max_lr": 0.1, "total_steps": 9, "pct_start": 1.5}, "at most 1"),
    (s.OneCycleLR, {"max_lr": 0.1, "total_steps": 9, "anneal_strategy": ""}, "'cos'"),
    (
        s.OneCycleLR,
        {"max_lr": 0.1, "total_steps": 9, "pct_start": 0.6, "three_phase": True},
        "at most 0.5",
    ),
    (s.SWALR, {"base_lr": 0.1, "swa_lr": -1.0}, "swa_lr=-1.0 .*at least 0"),
    (s.SequentialLR, {"schedules": [STEP], "milestones": [3]}, "at least 2"),
    (s.SequentialLR, {"schedules": [STEP] * 3, "milestones": [5, 3]}, "must increase"),
    (
        s.SequentialLR,
        {"schedules": [STEP] * 3, "milestones": [5]},
        "one item less than",
    ),
    (s.ChainedLR, {"schedules": [STEP, 0.1]}, "item 1 is 0.1, .*optax.join_schedules"),
    (s.ChainedLR, {"schedules": STEP}, "list or a tuple"),
]


@pytest.mark.parametrize(
    ("make", "kwargs", "message"),
    REFUSED,
    ids=[f"{make.__name__}-{number}" for number, (make, *_) in enumerate(REFUSED)],
)
def test_refused_at_construction(make, kwargs, message) -> None:
    with pytest.raises(ValueError, match=f"^{make.__name__}: .*{message}"):
        make(**kwargs)


def test_edges_that_are_allowed() -> None:
    assert s.PolynomialLR(0.0, 1)(0) == 0.0
    assert s.OneCycleLR(0.1, 1, pct_start=1.0)(5) == np.float32(0.1)
    assert s.OneCycleLR(0.1, 10, pct_start=0.1)(0) == np.float32(0.1)
    assert s.OneCycleLR(0.1, 10, pct_start=0.0)(0) < np.float32(0.1)
    assert s.ChainedLR([STEP])(30) == STEP(30)
    assert s.WarmupStableDecayLR(0.1, 10, 10)(10) == 0.0


@pytest.mark.parametrize("step", [-1, np.int64(-3), np.array([2, -1]), 2**31, [-1]])
def test_steps_on_the_host_are_checked(step) -> None:
    with pytest.raises(ValueError, match="counts from 0 to 2147483647"):
        STEP(step)


def test_steps_on_the_device_are_clamped() -> None:
    steps = jnp.asarray([-5, 0, 30])
    expected = STEP(np.array([0, 0, 30]))
    np.testing.assert_array_equal(STEP(steps), expected)
    np.testing.assert_array_equal(jax.jit(STEP)(steps), expected)
    np.testing.assert_array_equal(jax.vmap(STEP)(steps), expected)


@pytest.mark.parametrize("step", [1.0, True, "1", None, np.float32(2), jnp.ones(2)])
def test_steps_have_to_be_integers(step) -> None:
    with pytest.raises(TypeError, match="a step has to be an integer"):
        STEP(step)


def test_schedules_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        STEP.base_lr = 0.2


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"name": "PolyLR"}, "no schedule is called 'PolyLR'; there are ChainedLR"),
        ({"base_lr": 0.1}, "no schedule is called 'Schedule'"),
        ({"name": ["StepLR"]}, "no schedule is called"),
        ({"name": "StepLR", "base_lr": 0.1}, "missing .*'step_size'"),
        ({"name": "ExponentialLR", "base_lr": 1, "gamma": 1, "lr": 1}, "'lr'.*base_lr"),
        ({"name": "StepLR", "base_lr": 0.1, "step_size": "3"}, "step_size='3'"),
    ],
    ids=str,
)
def test_bad_configs(config, message) -> None:
    with pytest.raises(ValueError, match=message):
        s.Schedule.from_dict(config)


def test_from_dict_of_another_class() -> None:
    with pytest.raises(ValueError, match=r"Schedule\.from_dict"):
        s.WarmupLR.from_dict(STEP.to_dict())
    assert s.StepLR.from_dict({"base_lr": 0.1, "step_size": 30}) == STEP


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot read"),
        ("StepLR(0.1", "cannot read"),
        ("x = 1", "cannot read"),
        ("0.1", "is not a schedule"),
        ("[StepLR(0.1, 30)]", "is not a schedule"),
        ("StepLR", "'StepLR' is not allowed"),
        ("open('x')", "no schedule is called 'open'"),
        ("StepLR(__import__('os').getpid(), 3)", "is not allowed"),
        ("schedules.StepLR(0.1, 3)", "is not allowed"),
        ("StepLR(0.1, 10 ** 9)", "is not allowed"),
        ("StepLR(*[0.1, 3])", "is not allowed"),
        ("StepLR(**{'base_lr': 0.1})", r"\*\* is not allowed"),
        ("StepLR(0.1, 3).kind", "is not allowed"),
        ("(lambda: StepLR(0.1, 3))()", "is not allowed"),
        ("StepLR(0.1, step_size=3 if 1 else 2)", "is not allowed"),
        ("StepLR(0.1, f'{3}')", "is not allowed"),
        ("StepLR(0.1, 3j)", "is not allowed"),
        ("StepLR(0.1)", "missing .*'step_size'"),
        ("StepLR(-0.1, 3)", "base_lr=-0.1"),
        ("(" * 5000 + ")" * 5000, "cannot read"),
        ("StepLR(0.1, " + " " * 10_000 + "3)", "10000 are allowed"),
    ],
    ids=lambda value: value[:40].replace("=", "-"),
)
def test_text_that_is_refused(text, message) -> None:
    with pytest.raises(ValueError, match=message):
        s.parse(text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1.0, 8, 8), "base_lr=-1.0"),
        ((1.0, 0, 8), "batch=0 .*above 0"),
        ((1.0, 8, -8), "base_batch=-8"),
        ((1.0, 8, 8, "cube"), "rule='cube' must be one of 'sqrt', 'linear'"),
    ],
    ids=str,
)
def test_scale_lr_refuses(arguments, message) -> None:
    with pytest.raises(ValueError, match=f"^scale_lr: {message}"):
        s.scale_lr(*arguments)
