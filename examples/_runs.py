"""A run of `train_lm.py`: what determines it, what it came to, and its checkpoints."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import jax
import orbax.checkpoint as ocp

from octavo import optim
from octavo.optim import checkpoint

FLOAT32 = "float32"  # in the place of weights of 16 bits


@dataclass(frozen=True)
class Config:
    """What determines a run. Two runs with the same one end with the same bits."""

    optimizer: str
    state: str
    weights: str
    steps: int
    batch_size: int
    seed: int
    learning_rate: float
    width: int
    layers: int
    heads: int
    length: int


@dataclass
class History:
    """The losses of a run, one for each training step and one for each evaluation."""

    state: str
    seed: int
    state_bytes: int = 0
    parameters: int = 0
    weights: str = FLOAT32
    weight_bytes: int = 0
    train: list[float] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)

    @property
    def final(self) -> float:
        """Held-out loss at the end."""
        return self.held_out[-1][1]


@dataclass
class Run:
    """A run so far."""

    config: Config
    state: optim.TrainState
    history: History

    @property
    def step(self) -> int:
        """How many steps it took."""
        return len(self.history.train)


def run_of(config: Config, state: optim.TrainState) -> Run:
    """A run of no steps."""
    leaves = jax.tree.leaves(state.params)
    history = History(
        state=config.state,
        seed=config.seed,
        weights=config.weights,
        weight_bytes=sum(x.nbytes for x in leaves),
        state_bytes=sum(x.nbytes for x in jax.tree.leaves(state.opt_state)),
        parameters=sum(x.size for x in leaves),
    )
    return Run(config, state, history)


@contextmanager
def checkpoints_of(out: Path, resume: bool) -> Iterator[ocp.CheckpointManager]:
    """The last two checkpoints in a folder, emptied unless a run is resumed.

    The files are written while training goes on. The next step overwrites the state's
    memory, but saving has copied it before it returns.
    """
    kept = ocp.CheckpointManagerOptions(max_to_keep=2)
    with ocp.CheckpointManager(out.absolute(), options=kept) as checkpoints:
        if not resume:
            for step in checkpoints.all_steps():
                checkpoints.delete(step)
        yield checkpoints


def save(checkpoints: ocp.CheckpointManager, run: Run) -> None:
    """Write a checkpoint, unless this step has one."""
    if checkpoints.latest_step() != run.step:
        log = {"config": asdict(run.config), "history": asdict(run.history)}
        log = ocp.args.JsonSave(log)
        checkpoint.save(checkpoints, run.step, run.state, log=log)


def restore(checkpoints: ocp.CheckpointManager, fresh: Run) -> Run:
    """The run of the latest checkpoint, or the fresh one if there is none."""
    step = checkpoints.latest_step()
    if step is None:
        return fresh
    args = ocp.args.Composite(log=ocp.args.JsonRestore())
    log = checkpoints.restore(step, args=args)["log"]
    if log["config"] != asdict(fresh.config):
        sys.exit(f"{checkpoints.directory} has another run's options: {log['config']}")
    state = checkpoint.restore(checkpoints, fresh.state.tx, fresh.state, step=step)
    return Run(fresh.config, state, History(**log["history"]))
