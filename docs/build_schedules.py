"""Draws the pictures of docs/schedules.md: ``python docs/build_schedules.py``."""

import argparse
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from octavo import schedules

IMAGES = Path(__file__).parent / "img"
# Dots per inch: sharp in a column of text, and well below 60 kB a picture.
_DPI = 85


class Picture(NamedTuple):
    """Schedules as a reader would write them, and how many steps to show."""

    steps: int
    texts: tuple[str, ...]


PICTURES = {
    "polynomial": Picture(
        120,
        (
            "PolynomialLR(0.1, total_steps=100, warmup_steps=20)",
            "PolynomialLR(0.1, total_steps=100, power=2.0, end_lr=0.01)",
            "PolynomialLR(0.1, total_steps=100, power=0.5)",
            "LinearLR(0.1, start_factor=0.2, total_iters=60)",
        ),
    ),
    "steps": Picture(
        100,
        (
            "ConstantLR(0.09, factor=0.5, total_iters=15)",
            "StepLR(0.1, step_size=20, gamma=0.5)",
            "MultiStepLR(0.08, milestones=[30, 80], gamma=0.25)",
            "PiecewiseConstantLR([25, 70], values=[0.01, 0.06, 0.03])",
            "MultiplicativeLR(0.02, factors=[1.1, 1.1, 1.1, 1.1, 1.1, 1.1, 1.1])",
        ),
    ),
    "exponential": Picture(
        100,
        (
            "ExponentialLR(0.1, gamma=0.95)",
            "ExponentialDecayLR(0.1, 20, decay_rate=0.5, transition_begin=20)",
            "ExponentialDecayLR(0.08, 20, 0.5, staircase=True, end_value=0.01)",
        ),
    ),
    "cosine": Picture(
        150,
        (
            "CosineAnnealingLR(0.1, T_max=40, eta_min=0.01)",
            "CosineAnnealingLR(0.08, T_max=40, clamped=True)",
            "CosineAnnealingWarmRestarts(0.06, T_0=20, T_mult=2)",
        ),
    ),
    "cyclic": Picture(
        120,
        (
            "CyclicLR(0.01, 0.1, step_size_up=10, step_size_down=30)",
            "CyclicLR(0.01, 0.08, step_size_up=20, mode='triangular2')",
            "CyclicLR(0.01, 0.06, step_size_up=20, mode='exp_range', gamma=0.98)",
        ),
    ),
    "onecycle": Picture(
        110,
        (
            "OneCycleLR(0.1, total_steps=100)",
            "OneCycleLR(0.1, total_steps=100, three_phase=True)",
            "OneCycleLR(0.08, total_steps=100, anneal_strategy='linear')",
        ),
    ),
    "warmup": Picture(
        130,
        (
            "WarmupLR(0.1, warmup_steps=20)",
            "WarmupCosineLR(0.09, total_steps=120, warmup_steps=20)",
            "WarmupCosineLR(0.05, total_steps=120, warmup_steps=20, num_cycles=2.5)",
            "InverseSqrtLR(0.08, warmup_steps=20)",
        ),
    ),
    "wsd": Picture(
        110,
        tuple(
            f"WarmupStableDecayLR(0.1, 100, 40, warmup_steps=10, decay='{decay}')"
            for decay in ("linear", "cosine", "1-sqrt")
        ),
    ),
    "compose": Picture(
        120,
        (
            "SequentialLR([WarmupLR(0.1, 20), StepLR(0.1, 30, gamma=0.5)], [20])",
            "ChainedLR([ExponentialLR(0.1, 0.97), ConstantLR(1.0, 0.5, 30)])",
            "SWALR(0.08, swa_lr=0.02, anneal_epochs=40)",
        ),
    ),
}


def plateau_picture(steps: int = 100) -> Figure:
    """A loss that stalls three times, and the rate that follows it."""
    tx = schedules.ReduceLROnPlateau(0.1, factor=0.5, patience=5, threshold=0.01)
    count = np.arange(steps)
    falls = [
        size * -np.expm1(-np.maximum(count - start, 0) / 5)
        for start, size in ((0, 0.6), (32, 0.2), (65, 0.1))
    ]
    loss = jnp.asarray(1.0 - sum(falls), jnp.float32)

    def step(state, value):
        updates, state = tx.update(jnp.ones(()), state, value=value)
        return state, 0.1 * updates

    rates = np.asarray(jax.lax.scan(step, tx.init(None), loss)[1])
    name = "ReduceLROnPlateau(0.1, factor=0.5, patience=5, threshold=0.01)"
    figure = schedules.plot(lambda t: jnp.asarray(rates)[t], steps - 1, labels=[name])
    figure.axes[0].set_ylim(0.0, 0.105)
    axes = figure.axes[0].twinx()
    axes.plot(count, loss, color="0.6", linestyle="--", linewidth=1.2)
    axes.set(ylabel="loss (dashed)", ylim=(0.0, 1.05))
    axes.spines[["top"]].set_visible(False)
    return figure


def build(folder: Path) -> list[Path]:
    """Writes every picture into ``folder``, and returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    figures = {"plateau": plateau_picture()}
    for name, (steps, texts) in PICTURES.items():
        curves = [schedules.parse(text) for text in texts]
        figures[name] = schedules.plot(curves, steps, labels=texts)
    files = []
    for name, figure in figures.items():
        files.append(folder / f"schedules-{name}.png")
        figure.savefig(files[-1], dpi=_DPI)
    return files


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=IMAGES)
    for file in build(parser.parse_args().folder):
        print(f"{file.name}: {file.stat().st_size / 1000:.0f} kB")
