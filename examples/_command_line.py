"""The command line of `train_lm.py`: its options, and the runs that they ask for."""

import argparse
import inspect
import shlex
import signal
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from threading import Event
from typing import Any

from _arguments import count, new_parser, rate, seed
from _runs import FLOAT32, Config

from octavo import optim
from octavo.pallas_kernels import WEIGHTS


def optimizers() -> dict[str, Any]:
    """Octavo's optimizers by name; the likes of adam8bit would overrule --state."""
    functions = {name: f for name, f in vars(optim).items() if inspect.isfunction(f)}
    return {
        name: f
        for name, f in functions.items()
        if next(iter(inspect.signature(f).parameters), None) == "learning_rate"
    }


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options, and what each may be by itself."""
    add, names = parser.add_argument, sorted(optimizers())
    add("--optimizer", choices=names, default="adamw", help="one of octavo.optim's")
    add("--state", default="8bit", help="8bit (default), dynamic8, bf16 or 32bit")
    stored = "float32 (default), or bfloat16 stored so; several: compare with float32"
    names = [FLOAT32, *WEIGHTS]
    add("--weights", nargs="+", choices=names, default=[FLOAT32], help=stored)
    add("--learning-rate", type=rate, default=2e-3, help="its highest, after warmup")
    add("--steps", type=count, default=1400)
    add("--batch-size", type=count, default=8)
    add("--length", type=count, default=128, help="of each text in a batch, in bytes")
    add("--width", type=count, default=128, help="of the model: a multiple of 2 heads")
    add("--layers", type=count, default=3)
    add("--heads", type=count, default=4)
    add("--seed", type=seed, default=0, help="of the parameters and of the batches")
    add("--eval-every", type=count, default=200, metavar="STEPS")
    add("--checkpoint-every", type=count, default=400, metavar="STEPS")
    add("--out", type=Path, default=Path("out/train_lm"), help="replaced, or resumed")
    add("--resume", action="store_true", help="go on from the last checkpoint in --out")
    add("--compare", action="store_true", help="train with 32bit, too, and draw both")
    add("--seeds", type=seed, nargs="+", help="of the runs to compare; default: --seed")


def parse(
    argv: list[str], description: str | None, try_out: Callable[[Config], object]
) -> argparse.Namespace:
    """The command line's options, with errors for what cannot be.

    Args:
      argv: the command line.
      description: what the program does, for its help.
      try_out: raises ValueError if a run cannot be configured so.
    """
    parser = new_parser(description)
    add_options(parser)
    options = parser.parse_args(argv)
    if options.width % (2 * options.heads):
        parser.error("--width must be a multiple of 2 * heads")
    if options.resume and not options.out.exists():
        parser.error(f"--resume: there is no {options.out}")
    if options.compare and options.state == "32bit":
        parser.error("--compare compares --state with 32bit: give it another one")
    options.several = len(options.weights) > 1
    if options.compare and options.weights != [FLOAT32]:
        parser.error("--compare compares states; --weights A B compares weights")
    if options.seeds and not (options.compare or options.several):
        parser.error("--seeds is for comparisons; one run has one --seed")
    try:
        try_out(config_of(options))
    except ValueError as error:
        parser.error(str(error))
    return options


def config_of(options: argparse.Namespace, **changes: Any) -> Config:
    """The options that determine a run."""
    chosen = {**vars(options), "weights": options.weights[0], **changes}
    return Config(**{field.name: chosen[field.name] for field in fields(Config)})


def runs_of(options: argparse.Namespace) -> dict[Path, Config]:
    """Where each run keeps its checkpoints, and its configuration."""
    if options.several:
        key, values = "weights", list(dict.fromkeys([FLOAT32, *options.weights]))
    elif options.compare:
        key, values = "state", ["32bit", options.state]
    else:
        return {options.out: config_of(options)}
    return {
        options.out / f"{value}-seed{seed}": config_of(
            options, seed=seed, **{key: value}
        )
        for seed in options.seeds or [options.seed]
        for value in values
    }


def stopped_by_ctrl_c(stop: Event) -> Event:
    """Have the first interruption set an event; a second one ends the program."""

    def interrupt(*_: Any) -> None:
        stop.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGINT, interrupt)
    return stop


def command_to_resume(argv: list[str], resumed: bool) -> str:
    """The shell command that goes on with what this one began, or resumed."""
    more = [] if resumed else ["--resume"]
    return shlex.join([sys.executable, sys.argv[0], *argv, *more])
