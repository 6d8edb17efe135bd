"""The same rates as torch's schedulers, stepped one by one, where torch is."""

import itertools
import warnings

import numpy as np
import pytest
from schedule_cases import (
    METRIC,
    TORCH_CASES,
    B,
    Case,
    chained,
    rates_of,
    sequential,
)

STEPS = 120


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


def stepped(torch, make, base_lr: float, steps: int) -> list[float]:
    """The learning rate before and after each step, from torch's recursion."""
    weight = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=base_lr)
    scheduler = make(optimizer)
    rates = [float(optimizer.param_groups[0]["lr"])]
    for _ in range(steps):
        optimizer.step()
        scheduler.step()
        rates.append(float(optimizer.param_groups[0]["lr"]))
    return rates


def close(schedule, expected: list[float]) -> None:
    rates = schedule(np.arange(len(expected)))
    np.testing.assert_allclose(rates, expected, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("case", TORCH_CASES, ids=lambda case: case.id[:80])
def test_equal_to_torch(torch, case: Case) -> None:
    name, kwargs = case.torch
    base_lr = getattr(case.schedule, "base_lr", B)

    def make(optimizer):
        return getattr(torch.optim.lr_scheduler, name)(optimizer, **kwargs)

    close(case.schedule, stepped(torch, make, base_lr, case.steps))


def test_sequential_equal_to_torch(torch) -> None:
    scheduler = torch.optim.lr_scheduler

    def make(optimizer):
        parts = [
            scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=10),
            scheduler.ExponentialLR(optimizer, gamma=0.9),
            scheduler.StepLR(optimizer, step_size=8, gamma=0.2),
        ]
        return scheduler.SequentialLR(optimizer, parts, milestones=[10, 40])

    with warnings.catch_warnings():
        # torch warns about the way in which its own class calls its parts.
        warnings.simplefilter("ignore")
        rates = stepped(torch, make, B, STEPS)
    np.testing.assert_allclose(rates, [sequential(t) for t in range(STEPS + 1)], 1e-9)


def test_chained_equal_to_torch(torch) -> None:
    scheduler = torch.optim.lr_scheduler

    def make(optimizer):
        parts = [
            scheduler.ExponentialLR(optimizer, gamma=0.9),
            scheduler.ConstantLR(optimizer, factor=0.25, total_iters=9),
        ]
        return scheduler.ChainedScheduler(parts)

    rates = stepped(torch, make, B, STEPS)
    np.testing.assert_allclose(rates, [chained(t) for t in range(STEPS + 1)], 1e-9)


@pytest.mark.parametrize("strategy", ["cos", "linear"])
@pytest.mark.parametrize("length", [0, 1, 15])
def test_swa_equal_to_torch(torch, strategy: str, length: int) -> None:
    from octavo import schedules

    def make(optimizer):
        return torch.optim.swa_utils.SWALR(
            optimizer, swa_lr=0.02, anneal_epochs=length, anneal_strategy=strategy
        )

    ours = schedules.SWALR(0.1, 0.02, length, strategy)
    close(ours, stepped(torch, make, 0.1, 40))


@pytest.mark.parametrize(
    ("mode", "threshold_mode", "cooldown"),
    list(itertools.product(("min", "max"), ("rel", "abs"), (0, 3))),
)
def test_plateau_equal_to_torch(torch, mode, threshold_mode, cooldown) -> None:
    options = {
        "mode": mode,
        "factor": 0.5,
        "patience": 2,
        "threshold": 0.01,
        "threshold_mode": threshold_mode,
        "cooldown": cooldown,
        "min_lr": 0.004,
    }
    weight = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=0.1)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, **options)
    expected = []
    for value in METRIC:
        scheduler.step(float(value))
        expected.append(optimizer.param_groups[0]["lr"])
    np.testing.assert_allclose(rates_of(0.1, METRIC, **options), expected, rtol=1e-6)
