"""What `train_lm.py --weights` shows of several: a table, and a picture of losses."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from _compare import curves
from _runs import History
from matplotlib import pyplot as plt
from rich.console import Console
from rich.table import Table

COLORS = ("#555555", "#d95f02", "#1f77b4", "#7570b3", "#1b9e77")


def compare_weights(histories: Sequence[History], out: Path) -> None:
    """A table and a picture of runs with several kinds of weights."""
    print_weights(histories)
    draw_weights(histories, out / "weights.png")
    print(f"drawn in {out / 'weights.png'}")


def by_weights(histories: Sequence[History]) -> dict[str, list[History]]:
    """The runs of each kind of weights, those of all seeds in the same order."""
    names = dict.fromkeys(history.weights for history in histories)
    return {name: [h for h in histories if h.weights == name] for name in names}


def bytes_of(history: History) -> tuple[float, float, float]:
    """Per parameter: of weights, of gradients, which have their type, and of state."""
    weights, state = history.weight_bytes, history.state_bytes
    return tuple(x / history.parameters for x in (weights, weights, state))


def print_weights(histories: Sequence[History]) -> None:
    """Final losses by weights and seed, and the bytes of each parameter."""
    kinds = by_weights(histories)
    reference = next(iter(kinds.values()))
    table = Table("weights", title="Held-out loss at the end, nats per byte")
    columns = [f"seed {h.seed}" for h in reference]
    for name in (*columns, "mean", "- float32", "bytes per parameter"):
        table.add_column(name, justify="right")
    base = np.mean([h.final for h in reference])
    for name, runs in kinds.items():
        losses = [h.final for h in runs]
        parts = bytes_of(runs[0])
        shown = " + ".join(f"{x:.2f}" for x in parts) + f" = {sum(parts):.2f}"
        cells = [f"{x:.4f}" for x in (*losses, np.mean(losses))]
        table.add_row(name, *cells, f"{np.mean(losses) - base:+.4f}", shown)
    Console(width=120).print(table)
    spread = np.ptp([h.final for h in reference])
    print(f"Spread of float32 over {len(reference)} seeds: {spread:.4f} (max - min).")


def draw_weights(histories: Sequence[History], path: Path) -> None:
    """Training losses of all kinds, and how far each is from float32, as one PNG."""
    kinds = by_weights(histories)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    base = None
    for (name, runs), color in zip(kinds.items(), COLORS, strict=False):
        steps, losses = curves(runs)
        base = losses if base is None else base
        label = f"{name}: {np.mean([h.final for h in runs]):.4f}"
        left.plot(steps, losses.mean(0), color=color, lw=1.2, label=label)
        apart = losses - base
        right.plot(steps, apart.mean(0), color=color, lw=1.2, label=name)
        right.fill_between(steps, apart.min(0), apart.max(0), color=color, alpha=0.15)
    end = base.mean(0)[-1]
    left.set_ylim(end - 0.1, end + 1.2)
    left.set_title("Training loss (in the legend: held-out loss at the end)")
    left.set_ylabel("nats per byte")
    right.set_title("Less that of float32 weights, seed by seed")
    for ax in (left, right):
        ax.set_xlabel("step")
        ax.grid(alpha=0.3)
        ax.legend()
    runs = len(next(iter(kinds.values())))
    figure.suptitle(
        f"A transformer of {histories[0].parameters / 1e6:.2f}M weights in bfloat16, "
        f"and in float32, with {histories[0].state} state"
        + (f"; means and ranges of {runs} seeds" if runs > 1 else "")
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)
