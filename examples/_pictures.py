"""The pictures of `large_batch.py`."""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from _results import Results, difference

matplotlib.use("Agg")  # there may be no screen
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullLocator, PercentFormatter

# Different to color-blind readers, too. Curves may coincide: the first is broad and
# pale, to be seen under the others.
STYLES: tuple[dict[str, Any], ...] = (
    {"color": "#1f77b4", "lw": 5, "alpha": 0.4},
    {"color": "#d95f02", "lw": 1.3},
    {"color": "#333333", "lw": 1.3, "ls": (0, (4, 2))},
)


def draw_curves(results: Results, path: Path) -> None:
    """Training loss and test accuracy of each optimizer at each batch, as a PNG."""
    figure, rows = plt.subplots(
        2,
        len(results.batches),
        figsize=(11, 6.4),
        sharex=True,
        sharey="row",
        squeeze=False,
        layout="constrained",
    )
    for batch, top, bottom in zip(results.batches, *rows, strict=True):
        for optimizer, style in zip(results.optimizers, STYLES, strict=True):
            runs = results.of(optimizer, batch)
            accuracy = np.array([run.accuracy for run in runs])
            label = f"{optimizer}: {100 * accuracy[:, -1].mean():.1f} %"
            _draw(top, results, np.array([run.loss for run in runs]), style)
            _draw(bottom, results, accuracy, style, label)
        top.set_title(f"batch {batch}: {runs[0].steps:,} steps")
        top.set_yscale("log")
        bottom.set_xlabel("epoch")
        bottom.legend(loc="lower right", title="test accuracy at the end")
        for ax in (top, bottom):
            ax.grid(alpha=0.3)
    rows[0, 0].set_ylabel("training loss [nats]")
    rows[1, 0].set_ylabel("test accuracy")
    rows[1, 0].yaxis.set_major_formatter(PercentFormatter(1, 0, " %"))
    _limit_accuracy(rows[1, 0], results)
    figure.suptitle(_title("The same epochs in fewer, larger batches", results))
    figure.savefig(path, dpi=100)
    plt.close(figure)


def draw_ratios(results: Results, name: str, reference: str, path: Path) -> None:
    """Trust ratios over time: a row for each batch, a column for each parameter."""
    batches, leaves = results.batches, results.leaves
    figure, axes = plt.subplots(
        len(batches),
        len(leaves),
        figsize=(11, 1 + 2 * len(batches)),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for batch, row in zip(batches, axes, strict=True):
        row[0].set_ylabel(f"batch {batch}\ntrust ratio")
        for leaf, ax in zip(leaves, row, strict=True):
            for optimizer, style in zip((reference, name), STYLES, strict=False):
                ratios = results.ratios(optimizer, batch, leaf)
                _draw(ax, results, ratios, style, optimizer)
            _note_difference(ax, *difference(results, name, reference, batch, leaf))
            ax.grid(alpha=0.3)
    axes[0, 0].set_yscale("log")
    axes[0, 0].yaxis.set_major_locator(LogLocator(subs=(1, 3)))
    axes[0, 0].yaxis.set_major_formatter(lambda y, _: f"{y:g}")
    axes[0, 0].yaxis.set_minor_locator(NullLocator())
    axes[0, 0].set_ylim(bottom=axes[0, 0].get_ylim()[0] / 2)  # the notes' place
    for leaf, top, bottom in zip(leaves, axes[0], axes[-1], strict=True):
        top.set_title(leaf)
        bottom.set_xlabel("epoch")
    figure.suptitle(_title("LAMB's trust ratios and their mean differences", results))
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2
    )
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _draw(
    ax: Axes,
    results: Results,
    seeds: np.ndarray,
    style: dict[str, Any],
    label: str = "",
) -> None:
    ax.plot(results.epochs, seeds.mean(0), label=label, **style)
    ends = seeds.min(0), seeds.max(0)
    ax.fill_between(results.epochs, *ends, color=style["color"], alpha=0.12, lw=0)


def _note_difference(ax: Axes, states: float, seeds: float) -> None:
    lines = [f"8-bit from 32-bit: {100 * states:.1f} %"]
    if not np.isnan(seeds):
        lines.append(f"seed from seed: {100 * seeds:.1f} %")
    style = {"size": "small", "ha": "right", "va": "bottom"}
    ax.text(0.97, 0.03, "\n".join(lines), transform=ax.transAxes, **style)


def _limit_accuracy(ax: Axes, results: Results) -> None:
    lowest = min(run.accuracy[-1] for run in results.runs)
    ax.set_ylim(max(0.0, 1 - 4 * (1 - lowest)), 1.002)


def _title(text: str, results: Results) -> str:
    seeds = len({run.seed for run in results.runs})
    return text + (f"; means and ranges of {seeds} seeds" if seeds > 1 else "")
