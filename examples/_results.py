"""What the runs of `large_batch.py` came to: numbers and the tables of them."""

import json
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Run:
    """One training; its lists have a value for each evaluation."""

    optimizer: str
    batch: int
    seed: int
    steps: int
    warmup_steps: int
    learning_rate: float
    loss: list[float]
    accuracy: list[float]
    ratios: dict[str, list[float]]


@dataclass(frozen=True)
class Results:
    """Runs of every optimizer at every batch with every seed."""

    runs: list[Run]
    epochs_per_point: float

    @property
    def optimizers(self) -> list[str]:
        """In the order of the runs."""
        return list(dict.fromkeys(run.optimizer for run in self.runs))

    @property
    def batches(self) -> list[int]:
        """In the order of the runs."""
        return list(dict.fromkeys(run.batch for run in self.runs))

    @property
    def leaves(self) -> list[str]:
        """The parameters that have trust ratios."""
        return list(self.runs[0].ratios)

    @property
    def epochs(self) -> np.ndarray:
        """When the evaluations were."""
        return self.epochs_per_point * np.arange(1, len(self.runs[0].loss) + 1)

    def of(self, optimizer: str, batch: int) -> list[Run]:
        """The runs of all seeds."""
        return [r for r in self.runs if (r.optimizer, r.batch) == (optimizer, batch)]

    def ratios(self, optimizer: str, batch: int, leaf: str) -> np.ndarray:
        """Trust ratios (seeds, evaluations)."""
        return np.array([run.ratios[leaf] for run in self.of(optimizer, batch)])

    def save(self, path: Path) -> None:
        """Write everything as JSON."""
        path.write_text(json.dumps(asdict(self)))


def print_accuracies(results: Results) -> None:
    """Test accuracies at the end: means and standard deviations of the seeds."""
    seeds = len(results.of(results.optimizers[0], results.batches[0]))
    spread = f": mean ± standard deviation of {seeds} seeds" if seeds > 1 else ""
    table = Table(title=f"Test accuracy in %{spread}")
    for name in ("batch", "steps", "warmup epochs", *results.optimizers):
        table.add_column(name, justify="right")
    for batch in results.batches:
        cells = []
        for optimizer in results.optimizers:
            runs = results.of(optimizer, batch)
            end = 100 * np.array([run.accuracy[-1] for run in runs])
            cells.append(
                f"{end.mean():.2f}" + (f" ± {end.std(ddof=1):.2f}" if seeds > 1 else "")
            )
        warmup = results.epochs[-1] * runs[0].warmup_steps / runs[0].steps
        table.add_row(str(batch), str(runs[0].steps), f"{warmup:g}", *cells)
    Console().print(table)


def print_ratios(results: Results, name: str, reference: str) -> None:
    """How far trust ratios are from the reference's, and the reference's seeds."""
    table = Table(
        title=f"Trust ratios in %: {name} from {reference} (seed from seed)",
    )
    table.add_column("parameter")
    for batch in results.batches:
        table.add_column(f"batch {batch}", justify="right")
    for leaf in results.leaves:
        cells = []
        for batch in results.batches:
            state, seeds = difference(results, name, reference, batch, leaf)
            between = "" if np.isnan(seeds) else f" ({100 * seeds:.2f})"
            cells.append(f"{100 * state:.2f}{between}")
        table.add_row(leaf, *cells)
    Console().print(table)


def difference(
    results: Results, name: str, reference: str, batch: int, leaf: str
) -> tuple[float, float]:
    """Mean relative difference of trust ratios: from the reference's, seed by seed.

    And between two seeds of the reference, which is NaN if there is but one.
    """
    ours = results.ratios(name, batch, leaf)
    theirs = results.ratios(reference, batch, leaf)
    pairs = [abs(b / a - 1).mean() for a, b in combinations(theirs, 2)]
    return abs(ours / theirs - 1).mean(), np.mean(pairs) if pairs else np.nan
