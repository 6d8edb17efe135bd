"""What `train_lm.py` shows of its runs; of those to compare, a table and a picture."""

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from _runs import History

matplotlib.use("Agg")  # there may be no screen
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

COLORS = ("#1f77b4", "#d95f02")  # different to color-blind readers, too


def report(history: History, unigram_entropy: float) -> None:
    """What a run came to."""
    losses = {"held-out loss": history.final, "unigram entropy": unigram_entropy}
    for name, nats in losses.items():
        print(f"{name:>16}: {nats:.4f} nats, {nats / math.log(2):.4f} bits per byte")
    size = history.state_bytes
    print(
        f" optimizer state: {size / 1e6:.2f} MB for {history.parameters / 1e6:.2f}M "
        f"parameters, {size / history.parameters:.2f} bytes each"
    )


def compare_states(
    histories: Sequence[History], unigram_entropy: float, out: Path
) -> None:
    """A table and a picture of runs that take turns in 32 bits and in fewer."""
    reference, other = histories[::2], histories[1::2]
    print_table(reference, other)
    draw(reference, other, unigram_entropy, out / "compare.png")
    print(f"drawn in {out / 'compare.png'}")


def print_table(reference: Sequence[History], other: Sequence[History]) -> None:
    """Final losses by seed and state, and whether the states differ more than seeds."""
    names = reference[0].state, other[0].state
    a = np.array([history.final for history in reference])
    b = np.array([history.final for history in other])
    print("\nfinal held-out loss, nats per byte")
    print(f"{'seed':>6} {names[0]:>10} {names[1]:>10} {'difference':>12}")
    for history, x, y in zip(reference, a, b, strict=True):
        print(f"{history.seed:>6} {x:>10.4f} {y:>10.4f} {y - x:>+12.4f}")
    difference = b.mean() - a.mean()
    print(f"{'mean':>6} {a.mean():>10.4f} {b.mean():>10.4f} {difference:>+12.4f}")
    if len(a) == 1:
        print("One seed has no spread to compare with: try --seeds 0 1 2.")
        return
    spread, verdict = np.ptp(a), "smaller" if abs(difference) < np.ptp(a) else "LARGER"
    print(
        f"Spread of {names[0]} over {len(a)} seeds: {spread:.4f} (max - min), "
        f"{a.std(ddof=1):.4f} (standard deviation).\n"
        f"The difference of the means, {abs(difference):.4f}, is {verdict} than the "
        f"spread (max - min)."
    )


def draw(
    reference: Sequence[History],
    other: Sequence[History],
    unigram_entropy: float,
    path: Path,
) -> None:
    """Both states' loss curves and the memory that each takes, as one PNG."""
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(11, 4.6), width_ratios=(3, 1), layout="constrained"
    )
    for histories, color in zip((reference, other), COLORS, strict=True):
        _draw_losses(left, histories, color)
    _label_losses(left, reference, unigram_entropy)
    _draw_memory(right, (reference[0], other[0]))
    seeds = len(reference)
    figure.suptitle(
        f"A transformer of {reference[0].parameters / 1e6:.2f}M parameters, trained "
        f"with {reference[0].state} and with {other[0].state} optimizer state"
        + (f"; means of {seeds} seeds" if seeds > 1 else "")
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _draw_losses(ax: Axes, histories: Sequence[History], color: str) -> None:
    name, under = histories[0].state, color == COLORS[0]
    steps, train = curves(histories)
    # The curves may coincide: the first is broad and pale, to be seen under the second.
    style = {"lw": 4, "alpha": 0.4} if under else {"lw": 1}
    ax.plot(steps, train.mean(0), color=color, label=f"{name}, train", **style)
    if under and len(histories) > 1:
        label = f"{name}, train, range of seeds"
        ends = train.min(0), train.max(0)
        ax.fill_between(steps, *ends, color=color, alpha=0.15, lw=0, label=label)

    held_out = np.array([history.held_out for history in histories])
    at, losses = held_out[0, :, 0], held_out[:, :, 1].mean(0)
    label = f"{name}, held out: {losses[-1]:.3f} at the end"
    marker = {"marker": "o", "ms": 9, "mfc": "none"} if under else {"marker": "x"}
    ax.plot(at, losses, color=color, ls="none", mew=1.5, label=label, **marker)


def curves(histories: Sequence[History]) -> tuple[np.ndarray, np.ndarray]:
    """Steps, and the smoothed training losses (runs, steps)."""
    train = np.array([smoothed(history) for history in histories])
    steps = np.arange(train.shape[1]) + len(histories[0].train) - train.shape[1] + 1
    return steps, train


def smoothed(history: History) -> np.ndarray:
    """Training losses, each the mean of a fortieth of the run."""
    window = max(1, len(history.train) // 40)
    return np.convolve(history.train, np.ones(window) / window, mode="valid")


def _label_losses(ax: Axes, histories: Sequence[History], entropy: float) -> None:
    ax.axhline(entropy, color="gray", ls=":", label=f"unigram entropy: {entropy:.3f}")
    lowest = min(smoothed(history).min() for history in histories)
    ax.set_ylim(lowest - 0.1, max(entropy, lowest) + 0.15)
    ax.set_title(f"Loss (train: mean of {max(1, len(histories[0].train) // 40)} steps)")
    ax.set_xlabel("step")
    ax.set_ylabel("loss [nats per byte]")
    ax.grid(alpha=0.3)
    ax.legend(loc="upper right", bbox_to_anchor=(1, 0.88))


def _draw_memory(ax: Axes, histories: Sequence[History]) -> None:
    sizes = [history.state_bytes / 1e6 for history in histories]
    bars = ax.bar([history.state for history in histories], sizes, color=COLORS)
    labels = [
        f"{size:.2f} MB\n{history.state_bytes / history.parameters:.2f} B/param"
        for size, history in zip(sizes, histories, strict=True)
    ]
    ax.bar_label(bars, labels, padding=3)
    ax.set_ylim(0, max(sizes) * 1.2)
    ax.set_title("Optimizer memory")
    ax.set_ylabel("state [MB]")
    ax.grid(axis="y", alpha=0.3)
    ax.set_axisbelow(True)
