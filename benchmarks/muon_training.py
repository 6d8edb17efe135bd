"""Muon in 8 and in 32 bits, beside AdamW, on the language model of the examples.

    python benchmarks/muon_training.py --out out/muon

Each optimizer has the best of several learning rates, each twice the last (Muon: 2e-3
to 3.2e-2, AdamW: 2e-3 to 8e-3; 32 bits, seed 0). Runs that are there already are not
repeated. A table of losses, and a picture, are made of all.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from _compare import curves
from _progress import progress
from _runs import FLOAT32, Config, History
from _text import Text, read_text
from matplotlib import pyplot as plt
from rich.console import Console
from rich.table import Table
from train_lm import advance, evaluate, start


class Kind(NamedTuple):
    """What is compared."""

    optimizer: str
    state: str
    rate: float
    color: str

    @property
    def name(self) -> str:
        """In tables and files."""
        return f"{self.optimizer}-{self.state}"


KINDS = (
    Kind("adamw", "32bit", 4e-3, "#555555"),
    Kind("adamw", "8bit", 4e-3, "#1b9e77"),
    Kind("muon", "32bit", 1.6e-2, "#1f77b4"),
    Kind("muon", "8bit", 1.6e-2, "#d95f02"),
)


def trained(kind: Kind, steps: int, seed: int, text: Text, out: Path) -> History:
    """A run, or what was kept of it."""
    path = out / f"{kind.name}-{steps}-{seed}.json"
    if path.exists():
        return History(**json.loads(path.read_text()))
    sizes = {"width": 128, "layers": 3, "heads": 4, "length": 128, "batch_size": 8}
    how = (kind.optimizer, kind.state, FLOAT32)
    run = start(Config(*how, steps, seed=seed, learning_rate=kind.rate, **sizes))
    with progress(steps, desc=f"{kind.name}, seed {seed}") as bar:
        while run.step < steps:
            advance(run, text, bar)
            if run.step % 50 == 0 or run.step == steps:
                loss = evaluate(run.state, text.held_out)
                run.history.held_out.append((run.step, loss))
    out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(run.history)))
    return run.history


def show(runs: dict[Kind, list[History]]) -> None:
    """The losses at the end."""
    seeds = [f"seed {h.seed}" for h in next(iter(runs.values()))]
    table = Table("optimizer", "rate", *seeds, "mean", "bytes per parameter")
    for kind, histories in runs.items():
        losses = [h.final for h in histories]
        cells = [f"{x:.4f}" for x in (*losses, np.mean(losses))]
        size = histories[0].state_bytes / histories[0].parameters
        table.add_row(kind.name, f"{kind.rate:g}", *cells, f"{size:.2f}")
    Console(width=110).print(table)


def draw(runs: dict[Kind, list[History]], path: Path) -> None:
    """Training losses, and how far 8 bits are from 32, as one PNG."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    found = {kind: curves(histories) for kind, histories in runs.items()}
    for kind, (steps, losses) in found.items():
        name = f"{kind.optimizer}, {kind.state}"
        end = np.mean([h.final for h in runs[kind]])
        label = f"{name}: {end:.3f}"
        left.plot(steps, losses.mean(0), color=kind.color, lw=1.2, label=label)
        if kind.state == "32bit":
            continue
        twin = next(k for k in found if k != kind and k.optimizer == kind.optimizer)
        for k, (apart, base) in enumerate(zip(losses, found[twin][1], strict=True)):
            style = {"color": kind.color, "lw": 1, "alpha": 1 - 0.25 * k}
            right.plot(steps, apart - base, label=None if k else name, **style)
    lowest = min(losses.mean(0).min() for _, losses in found.values())
    left.set_ylim(lowest - 0.1, lowest + 1.5)
    left.set_title("Training loss (in the legend: held-out loss at the end)")
    left.set_ylabel("nats per byte")
    right.set_ylim(-0.06, 0.06)
    right.axhline(0, color="gray", ls=":")
    right.set_title("8 bits less 32, each seed")
    for ax in (left, right):
        ax.set_xlabel("step")
        ax.grid(alpha=0.3)
        ax.legend()
    size = next(iter(runs.values()))[0].parameters / 1e6
    count = len(next(iter(runs.values())))
    figure.suptitle(f"A transformer of {size:.2f}M parameters; means of {count} seeds")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    """Train what is missing; print and draw."""
    p = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    p.add_argument("--steps", type=int, default=250)
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    p.add_argument("--out", type=Path, default=Path("out/muon"))
    args = p.parse_args(argv)
    text = read_text(128)
    runs = {
        kind: [trained(kind, args.steps, n, text, args.out) for n in args.seeds]
        for kind in KINDS
    }
    show(runs)
    draw(runs, args.out / "muon.png")
    print(f"drawn in {args.out / 'muon.png'}")


if __name__ == "__main__":
    main()
