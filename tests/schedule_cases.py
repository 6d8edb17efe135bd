"""Schedules beside the published formulas, and beside the classes of torch."""

import bisect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from schedule_formulas import (
    cyclic,
    half_cosine,
    line,
    one_cycle,
    polynomial,
    product,
    restarts,
    waves,
    wsd,
)

from octavo import schedules as s

Reference = Callable[[int], float]


@dataclass(frozen=True)
class Case:
    """A schedule, its formula, and how many steps make three periods or lengths."""

    schedule: s.Schedule
    reference: Reference
    steps: int
    # Class in torch.optim.lr_scheduler, and its arguments after the optimizer.
    torch: tuple[str, dict[str, Any]] | None = None

    @property
    def id(self) -> str:
        return repr(self.schedule).replace("=", "-")


B = 0.05
FACTORS = [1.0 - 0.3 * math.sin(t) for t in range(1, 151)]

TORCH_CASES = [
    Case(
        s.PolynomialLR(B, total_iters=50, power=power),
        lambda t, power=power: polynomial(t, B, 50, power),
        150,
        ("PolynomialLR", {"total_iters": 50, "power": power}),
    )
    for power in (1.0, 2.0, 0.9)
]
TORCH_CASES += [
    Case(
        s.ConstantLR(B, factor=0.25, total_iters=9),
        lambda t: B * (0.25 if t < 9 else 1.0),
        27,
        ("ConstantLR", {"factor": 0.25, "total_iters": 9}),
    ),
    Case(
        s.LinearLR(B, start_factor=0.3, end_factor=0.9, total_iters=40),
        lambda t: B * line(0.3, 0.9, t / 40),
        120,
        ("LinearLR", {"start_factor": 0.3, "end_factor": 0.9, "total_iters": 40}),
    ),
    Case(
        s.StepLR(B, step_size=7, gamma=0.3),
        lambda t: B * 0.3 ** (t // 7),
        21,
        ("StepLR", {"step_size": 7, "gamma": 0.3}),
    ),
    Case(
        s.MultiStepLR(B, milestones=[5, 6, 40], gamma=0.2),
        lambda t: B * 0.2 ** bisect.bisect_right([5, 6, 40], t),
        120,
        ("MultiStepLR", {"milestones": [5, 6, 40], "gamma": 0.2}),
    ),
    Case(
        s.ExponentialLR(B, gamma=0.97),
        lambda t: B * 0.97**t,
        300,
        ("ExponentialLR", {"gamma": 0.97}),
    ),
    Case(
        s.CosineAnnealingLR(B, T_max=30, eta_min=0.001),
        lambda t: half_cosine(B, 0.001, t / 30),
        180,
        ("CosineAnnealingLR", {"T_max": 30, "eta_min": 0.001}),
    ),
    Case(
        s.CosineAnnealingWarmRestarts(B, T_0=20, eta_min=0.001),
        lambda t: restarts(t, B, 20, 1, 0.001),
        60,
        ("CosineAnnealingWarmRestarts", {"T_0": 20, "eta_min": 0.001}),
    ),
    Case(
        s.CosineAnnealingWarmRestarts(B, T_0=11, T_mult=3),
        lambda t: restarts(t, B, 11, 3, 0.0),
        11 + 33 + 99,
        ("CosineAnnealingWarmRestarts", {"T_0": 11, "T_mult": 3}),
    ),
    Case(
        s.MultiplicativeLR(B, FACTORS),
        lambda t: B * product(FACTORS, t),
        150,
        ("MultiplicativeLR", {"lr_lambda": lambda t: FACTORS[t - 1]}),
    ),
]
TORCH_CASES += [
    Case(
        s.CyclicLR(
            0.01, 0.07, step_size_up=up, step_size_down=down, mode=mode, gamma=0.98
        ),
        lambda t, up=up, down=down, scale=scale: cyclic(
            t, 0.01, 0.07, up, down or up, scale
        ),
        3 * (up + (down or up)),
        (
            "CyclicLR",
            {
                "base_lr": 0.01,
                "max_lr": 0.07,
                "step_size_up": up,
                "step_size_down": down,
                "mode": mode,
                "gamma": 0.98,
                "cycle_momentum": False,
            },
        ),
    )
    for mode, scale in (
        ("triangular", lambda cycle, t: 1.0),
        ("triangular2", lambda cycle, t: 2.0 ** (1 - cycle)),
        ("exp_range", lambda cycle, t: 0.98**t),
    )
    for up, down in ((10, None), (10, 20), (20, 7))
]
TORCH_CASES += [
    Case(
        s.OneCycleLR(
            0.3, total, pct_start=pct, anneal_strategy=strategy, three_phase=three
        ),
        lambda t, total=total, pct=pct, how=how, three=three: one_cycle(
            t, 0.3, total, pct, how, three=three
        ),
        total - 1,
        (
            "OneCycleLR",
            {
                "max_lr": 0.3,
                "total_steps": total,
                "pct_start": pct,
                "anneal_strategy": strategy,
                "three_phase": three,
                "cycle_momentum": False,
            },
        ),
    )
    for strategy, how in (("cos", half_cosine), ("linear", line))
    for total, pct, three in ((100, 0.3, False), (77, 0.3, True), (55, 0.45, False))
]


def sequential(t: int) -> float:
    if t < 10:
        return B * line(0.1, 1.0, t / 10)
    return B * 0.9 ** (t - 10) if t < 40 else B * 0.2 ** ((t - 40) // 8)


def chained(t: int) -> float:
    return B * 0.9**t * (0.25 if t < 9 else 1.0)


OTHER_CASES = [
    Case(
        s.PolynomialLR(2e-3, 90, 1.7, 1e-5, warmup_steps=20, warmup_init=1e-4),
        lambda t: polynomial(t, 2e-3, 90, 1.7, 1e-5, 20, 1e-4),
        270,
    ),
    Case(
        s.ExponentialDecayLR(B, 30, 0.4, transition_begin=5, end_value=0.004),
        lambda t: max(B * 0.4 ** (max(t - 5, 0) / 30), 0.004),
        150,
    ),
    Case(
        s.ExponentialDecayLR(B, 30, 1.4, staircase=True, end_value=0.2),
        lambda t: min(B * 1.4 ** (t // 30), 0.2),
        180,
    ),
    Case(
        s.CosineAnnealingLR(B, T_max=30, clamped=True),
        lambda t: half_cosine(B, 0.0, min(t / 30, 1.0)),
        90,
    ),
    Case(
        s.WarmupLR(B, warmup_steps=20, warmup_init=0.01),
        lambda t: line(0.01, B, t / 20),
        60,
    ),
    Case(
        s.InverseSqrtLR(B, warmup_steps=20),
        lambda t: B * min(t / 20, math.sqrt(20 / max(t, 1))),
        200,
    ),
    Case(
        s.InverseSqrtLR(B, warmup_steps=0, timescale=50),
        lambda t: B * math.sqrt(50 / (t + 50)),
        150,
    ),
    Case(
        s.PiecewiseConstantLR([3, 10], [0.3, 0.0, 0.7]),
        lambda t: [0.3, 0.0, 0.7][bisect.bisect_right([3, 10], t)],
        30,
    ),
    Case(
        s.SequentialLR(
            [
                s.LinearLR(B, start_factor=0.1, total_iters=10),
                s.ExponentialLR(B, gamma=0.9),
                s.StepLR(B, step_size=8, gamma=0.2),
            ],
            milestones=[10, 40],
        ),
        sequential,
        120,
    ),
    Case(
        s.ChainedLR(
            [
                s.ExponentialLR(B, gamma=0.9),
                s.ConstantLR(1.0, factor=0.25, total_iters=9),
            ]
        ),
        chained,
        60,
    ),
    Case(
        s.SWALR(0.1, swa_lr=0.02, anneal_epochs=15),
        lambda t: half_cosine(0.1, 0.02, min(t / 15, 1.0)),
        45,
    ),
    Case(
        s.SWALR(0.1, swa_lr=0.3, anneal_epochs=15, anneal_strategy="linear"),
        lambda t: line(0.1, 0.3, t / 15),
        45,
    ),
    Case(s.SWALR(0.1, swa_lr=0.3, anneal_epochs=0), lambda t: 0.3, 5),
]
OTHER_CASES += [
    Case(
        s.WarmupStableDecayLR(B, 90, 30, warmup_steps=10, end_lr=1e-3, decay=decay),
        lambda t, shape=shape: wsd(t, B, 90, 30, 10, shape, 1e-3),
        270,
    )
    for decay, shape in (
        ("linear", lambda p: 1 - p),
        ("cosine", lambda p: (1 + math.cos(math.pi * p)) / 2),
        ("1-sqrt", lambda p: 1 - math.sqrt(p)),
    )
]
OTHER_CASES += [
    Case(
        s.WarmupCosineLR(B, 90, warmup_steps=10, end_lr=1e-4, num_cycles=cycles),
        lambda t, cycles=cycles: waves(t, B, 90, 10, cycles, 1e-4),
        270,
    )
    for cycles in (0.5, 1.0, 2.5, 0.45)
]

ALL_CASES = TORCH_CASES + OTHER_CASES


# Falls, stalls, rises, jumps and stalls again, through zero and with a NaN.
_STEPS = np.arange(90)
METRIC = np.exp(-_STEPS / 12) + 0.02 * np.sin(_STEPS * 1.7) - 0.3 * (_STEPS > 50)
METRIC[70] = np.nan


def rates_of(base_lr: float, values: np.ndarray, **options) -> np.ndarray:
    """The learning rate after each value, from updates of ones."""
    tx = s.ReduceLROnPlateau(base_lr, **options)

    def step(state: s.PlateauState, value: jax.Array):
        updates, state = tx.update(jnp.full(2, base_lr), state, value=value)
        return state, updates[0]

    values = jnp.asarray(values, jnp.float32)
    return np.asarray(jax.lax.scan(step, tx.init(jnp.ones(2)), values)[1])
