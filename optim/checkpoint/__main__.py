"""`python -m octavo.optim.checkpoint inspect PATH`: what a checkpoint holds."""

import argparse
import math
import os
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from ..reports import shown_size
from ..storage.state import REMAINDER, scale_name
from .files import Saved, open_saved
from .sources import join


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 1 if the checkpoint is missing, damaged or too new."""
    parser = argparse.ArgumentParser(prog="python -m octavo.optim.checkpoint")
    commands = parser.add_subparsers(required=True)
    inspect = commands.add_parser("inspect", help="print what a checkpoint holds")
    inspect.add_argument("path", help="the folder of a checkpoint manager")
    inspect.add_argument("--step", type=int, help="default: the newest")
    inspect.add_argument("--no-checksums", action="store_true", help="read no arrays")
    options = parser.parse_args(argv)
    try:
        saved = open_saved(options.path, options.step)
        _print(saved)
        if not options.no_checksums:
            print(_checked(saved))
    except (OSError, ValueError) as error:
        print(*str(error).split(), file=sys.stderr)  # on one line
        return 1
    return 0


def _print(saved: Saved) -> None:
    console = Console(width=100, color_system=None)
    console.print(f"step {saved.step} in {saved.folder}", soft_wrap=True)
    described = saved.description
    if described is None:
        console.print("saved without a description: by Orbax alone")
        return
    console.print(
        f"written by octavo {described['octavo']}, jax {described['jax']}; "
        f"seed {described['seed']}"
    )
    for path, state in described["states"].items():
        console.print(_slots(saved, path, state))


def _slots(saved: Saved, path: str, state: dict[str, Any]) -> Table:
    """A table of an optimizer's moments: how they are stored, and their sizes."""
    name, arrays = path or "the state", saved.arrays
    title = f"{name}: {state['count']} steps, {len(state['leaves'])} leaves"
    table = Table(
        "slot", "format", "blocks", "leaves", "bytes", "in 32 bits", title=title
    )
    for k, slot in enumerate(state["slots"]):
        groups: dict[tuple[str, str], list[tuple[int, int]]] = {}
        for leaf, how in state["leaves"].items():
            form = how["formats"][k]
            dense = form in ("32bit", "bf16")
            blocks = "" if dense else f"{how['block_size']} along {how['block_axis']}"
            codes = join(path, slot, leaf)
            scales = join(path, scale_name(slot), leaf)
            size = sum(_nbytes(arrays.get(p)) for p in (codes, scales))
            full = 4 * math.prod(how["shape"])
            groups.setdefault((form, blocks), []).append((size, full))
        for (form, blocks), sizes in groups.items():
            stored, full = (
                shown_size(sum(column)) for column in zip(*sizes, strict=True)
            )
            table.add_row(slot, form, blocks, str(len(sizes)), stored, full)
    _add_remainders(table, saved, path, state)
    return table


def _add_remainders(
    table: Table, saved: Saved, path: str, state: dict[str, Any]
) -> None:
    """Rows for what is kept of parameters of 16 bits."""
    kinds: dict[str, list[int]] = {}
    for leaf, how in state["leaves"].items():
        if how.get("weights"):
            size = _nbytes(saved.arrays.get(join(path, REMAINDER, leaf)))
            kinds.setdefault(how["weights"], []).append(size)
    for kind, sizes in kinds.items():
        size = shown_size(sum(sizes))
        table.add_row(REMAINDER, kind, "", str(len(sizes)), size, "")


def _nbytes(x: Any) -> int:
    return 0 if x is None else math.prod(x.shape) * np.dtype(x.dtype).itemsize


def _checked(saved: Saved) -> str:
    noted = {} if saved.description is None else saved.description["arrays"]
    with_sums = [path for path, x in noted.items() if "checksum" in x]
    if not with_sums:
        return "no checksums were saved"
    saved.load(dict.fromkeys(with_sums), verify=True)
    return f"all {len(with_sums)} checksums hold"


if __name__ == "__main__":
    # When one of many reads has failed, TensorStore's threads complain of it, too, and
    # go on to do so while the interpreter ends.
    sys.unraisablehook = lambda _: None
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
