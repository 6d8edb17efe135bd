"""What the compilers' own schedules say of the kernels of a step, without a device.

For TPUs: bundles, the instructions of one cycle, for each 1,024 values. For an H200
(sm_90): instructions of a thread for each value. Loops count as often as they run.
`memory` is how many would take as long as the memory needs for the bytes that the
kernel moves: a kernel with fewer waits for memory, one with more for its own work.
`ratio` is that of the two. `aside` is what only runs where something is rare, such as a
value that is not finite, if it always were.

`--record` writes the counts, and 3 % more, to `ceilings.json`, and a test holds the
kernels against them.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from _machines import MACHINES, missing
from _sass import missing_tool, ptxas_version
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
CEILINGS = HERE / "ceilings.json"
_CASES = HERE / "_static_cases.py"
SHORT = ("adamw-nearest", "adamw-remainder8", "adamw-remainder16")  # of 16 bits alone
RULES = ("adamw", "adamw-dynamic8", "adamw-clipped", "lamb", "lars", "sgd", *SHORT)
DTYPES = ("float32", "bfloat16")
_AIR = 1.03


def measure(cases: Sequence[str], program: str | Path = _CASES) -> Any:
    """Rows of `machine:rule:dtype`, compiled in a process of its own.

    Args:
      cases: what to compile.
      program: what compiles them: it gets a file to write JSON to, the folder that the
        compilers write to, and the cases.

    Returns:
      The JSON that it writes: a list of rows.

    Raises:
      RuntimeError: that process failed.
    """
    with tempfile.TemporaryDirectory() as name:
        dump, out = Path(name, "dump"), Path(name, "out.json")
        dump.mkdir()
        options = {
            "JAX_PLATFORMS": "cpu",
            "LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true",
            "XLA_FLAGS": f"--xla_dump_to={dump}",
        }
        paths = [str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
        options["PYTHONPATH"] = os.pathsep.join(paths)
        command = [sys.executable, str(program), str(out), str(dump), *cases]
        done = subprocess.run(
            command, capture_output=True, text=True, env=os.environ | options
        )
        if done.returncode != 0:
            raise RuntimeError(done.stderr)
        return json.loads(out.read_text())


def versions(machine: str) -> dict[str, str]:
    """Of what the counts of a machine depend on, beside the kernels."""
    packages = ["jax", "jaxlib"]
    packages += ["jax-cuda13-plugin"] if machine == "sm_90" else ["libtpu"]
    found = {name: metadata.version(name) for name in packages}
    if machine == "sm_90" and missing_tool() is None:
        found["ptxas"] = ptxas_version()
    return found


def key(row: dict[str, Any]) -> str:
    """The name of a row in the ceilings."""
    return " ".join(row[name] for name in ("rule", "part", "dtype"))


def record(rows: Sequence[dict[str, Any]]) -> None:
    """Write ceilings of one machine; what else the same compilers gave stays."""
    known = json.loads(CEILINGS.read_text()) if CEILINGS.exists() else {}
    machine = rows[0]["machine"]
    now, before = versions(machine), known.get(machine, {})
    kept = before.get("ceilings", {}) if before.get("versions") == now else {}
    found = {key(row): round(row["count"] * _AIR, 1) for row in rows}
    known[machine] = {"versions": now, "ceilings": dict(sorted((kept | found).items()))}
    ordered = {name: known[name] for name in MACHINES if name in known}
    CEILINGS.write_text(json.dumps(ordered, indent=2) + "\n")


def show(console: Console, machine: str, rows: Sequence[dict[str, Any]]) -> None:
    """Print the table of one machine."""
    table = Table(title=f"{machine}: {MACHINES[machine].unit}", title_justify="left")
    for name in ("rule", "pass", "type"):
        table.add_column(name, no_wrap=True)
    gpu = machine == "sm_90"
    last = ["registers", "barriers"] if gpu else ["busiest"]
    figures = ["count", "memory", "ratio", "aside", "spills", *last]
    for name in (*figures, "temporaries"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            row["rule"],
            row["part"],
            row["dtype"],
            *(f"{row[name]:.1f}" for name in ("count", "memory")),
            f"{row['count'] / row['memory']:.2f}",
            *(f"{row[name]:.1f}" for name in ("aside", "spills")),
            *(str(row[name]) for name in last),
            f"{row['temporaries']:,}",
        )
    console.print(table)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    p.add_argument("--machine", nargs="+", choices=MACHINES, default=list(MACHINES))
    p.add_argument("--rule", nargs="+", choices=RULES, default=list(RULES))
    p.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    p.add_argument("--quick", action="store_true", help="AdamW in float32 only")
    p.add_argument("--json", type=Path, help="also write the numbers here")
    p.add_argument("--record", action="store_true", help="rewrite ceilings.json")
    args = p.parse_args(argv)
    if args.quick:
        args.rule, args.dtype = ["adamw"], ["float32"]
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Count, and print a table for each machine."""
    args, console = parse(argv), Console(width=max(Console().width, 120))
    found: list[dict[str, Any]] = []
    for machine in args.machine:
        if what := missing(machine):
            console.print(f"{machine}: needs {what}")
            continue
        pairs = [(r, d) for r in args.rule for d in args.dtype]
        pairs = [(r, d) for r, d in pairs if r not in SHORT or d != "float32"]
        rows = measure([f"{machine}:{r}:{d}" for r, d in pairs])
        show(console, machine, rows)
        found += rows
        if args.record:
            record(rows)
    if args.json:
        args.json.write_text(json.dumps(found, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
