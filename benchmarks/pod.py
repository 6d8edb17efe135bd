"""What a step is on a pod that is not here: compiled for it, and checked.

Llama 3 8B on a mesh of FSDP and tensor parallelism, from shapes alone: which
collectives the compiled step has, what state each device holds, and how much memory
the step takes beside its arguments. Exits with 1 where a promise is broken.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

from _compiled import Case, Figures, figures_of, mesh_of
from _optimizers import OPTIMIZERS
from _topologies import platform_of, prepare
from rich.console import Console
from rich.table import Table

_MATRICES, _NORMS = 7, 2  # of a layer
_SCRATCH = 2**18  # for each kernel: TPUs' compiler gives each scalar 16 KiB


def faults(case: Case, f: Figures) -> list[str]:
    """Promises that a step breaks."""
    deep = 1 if case.stacked else case.layers
    matrices, norms = deep * _MATRICES + 2, deep * _NORMS + 1
    # The kernels for TPU take no vectors.
    stepped = matrices + (norms if platform_of(case.topology) == "cuda" else 0)
    measured = matrices if f.sums else 0
    ratios = case.layers * _MATRICES + 2
    promises = {
        "no collective, but one all-reduce for ratios": f.collectives
        == ({"all-reduce": 1} if f.sums else {}),
        "which adds up the sums of each matrix": f.reduced == f.sums * ratios,
        "a kernel for each matrix and pass": f.kernels == stepped + measured,
        "all state is sharded": not f.replicated,
        "results are sharded like arguments": not f.moved,
        "bytes of state as expected": f.state_bytes == f.expected_state_bytes,
        "results overwrite arguments": f.unaliased_bytes <= 2**16,
        # XLA copies scales whose order in memory is not that of their codes.
        "no temporaries but scales": f.temporary_bytes
        <= f.scale_bytes + _SCRATCH * f.kernels,
    }
    return [name for name, kept in promises.items() if not kept]


def show(rows: list[tuple[Case, Figures]], console: Console) -> None:
    """Print a table."""
    table = Table(
        title="A step: MB and kernels are those of one device", title_justify="left"
    )
    for name in ("topology", "optimizer", "layers", "collectives"):
        table.add_column(name)
    numbers = ("kernels", "state MB", "32-bit", "arguments", "temporary")
    for name in (*numbers, "lower s", "compile s"):
        table.add_column(name, justify="right")
    for case, f in rows:
        kinds = [f"{n} {name} ({f.reduced})" for name, n in f.collectives.items()]
        table.add_row(
            case.topology,
            case.optimizer,
            f"{case.layers}{' stacked' if case.stacked else ''}",
            ", ".join(kinds) or "none",
            str(f.kernels),
            f"{(f.state_bytes + f.other_state_bytes) / 1e6:.1f}",
            f"{f.slots * f.parameter_bytes / 1e6:.1f}",
            f"{f.argument_bytes / 1e6:.1f}",
            f"{f.temporary_bytes / 1e6:.1f}",
            f"{f.lower_seconds:.1f}",
            f"{f.compile_seconds:.1f}",
        )
    console.print(table)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    pods = ["v5e:16x16", "v6e:16x16"]
    machines = "chips of a TPU, or hosts and GPUs of each, as h200:1x8"
    p.add_argument("--topology", nargs="+", default=pods, help=machines)
    p.add_argument("--layers", type=int, default=32)
    compared = ["adamw", "lamb"]
    rules = [name for name in OPTIMIZERS if name != "muon"]  # benchmarks/muon.py has it
    p.add_argument("--optimizer", nargs="+", choices=rules, default=compared)
    both = ["separate", "stacked"]
    p.add_argument("--tree", nargs="+", choices=both, default=both, help="the layers")
    p.add_argument("--axes", choices=["explicit", "auto"], default="explicit")
    p.add_argument("--json", type=Path, help="also write the figures here")
    return p.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Compile what the command line asks for; returns the exit code."""
    args, console = parse(argv), Console()
    console.width = max(console.width, 130)
    prepare()
    versions = {name: metadata.version(name) for name in ("jax", "jaxlib", "octavo")}
    if any(platform_of(topology) == "tpu" for topology in args.topology):
        versions["libtpu"] = metadata.version("libtpu")
    rows, advice, broken = [], {}, []
    for topology in args.topology:
        mesh = mesh_of(topology, args.axes)
        sizes = " x ".join(f"{n} {axis}" for axis, n in mesh.shape.items())
        for tree in args.tree:
            for optimizer in args.optimizer:
                stacked = tree == "stacked"
                case = Case(topology, optimizer, args.layers, stacked, args.axes)
                figures = figures_of(case, mesh)
                rows.append((case, figures))
                advice.update(dict.fromkeys(f"{sizes}: {s}" for s in figures.advice))
                broken += [(case, fault) for fault in faults(case, figures)]
    console.print(", ".join(f"{name} {version}" for name, version in versions.items()))
    for line in advice:
        console.print(f"{line}: taken with 16", soft_wrap=True)
    show(rows, console)
    for case, fault in broken:
        console.print(f"broken by {case}: {fault}")
    if args.json:
        found = [asdict(case) | asdict(figures) for case, figures in rows]
        args.json.write_text(
            json.dumps({"versions": versions, "rows": found}, indent=2)
        )
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
