"""Everything that there is to run on a machine with a GPU, in one command.

`pytest tests/test_device.py`, then `benchmarks/step.py` on one leaf of 64M values and
on trees, in float32 and in bfloat16, against all rivals that are installed. Each is a
process with a time limit of its own. What fails or takes too long is listed, and the
rest goes on. Figures are written after each, and what it printed beside them: `.log`.
"""

import argparse
import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

_ROOT = Path(__file__).parents[1]
_SHOWN = 6000  # characters of what a process printed; the rest is in the log
_PACKAGES = (
    *("jax", "jaxlib", "jax-cuda13-plugin", "optax", "octavo"),
    *("torch", "triton", "bitsandbytes", "torchao", "flashoptim", "flashoptim-jax"),
)
# Options of step.py: those of a GPU, and those that take seconds on a CPU.
_WORK = {
    "leaf": ("--size 8192 8192 --tree none", "--size 64 64 --tree none"),
    "1b": ("--size --tree 1b", "--size --tree tiny"),
    "moe": ("--size --tree moe", "--size --tree moe-tiny"),
    "small300": ("--size --tree small300", "--size --tree small12"),
}


class Part(NamedTuple):
    """A process: what it is called, its command, and its limit in seconds."""

    name: str
    command: list[str]
    limit: float


class Ended(NamedTuple):
    """How a process ended, after how many seconds, and all that it printed."""

    status: str
    seconds: float
    output: str


def run(command: Sequence[str], limit: float, env: dict[str, str]) -> Ended:
    """Run a process; after the limit, end it and all that it started."""
    start = time.monotonic()
    with tempfile.TemporaryFile("w+", errors="replace") as out:
        process = subprocess.Popen(
            command,
            cwd=_ROOT,
            env=env,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(limit)
            status = "ok" if code == 0 else f"failed with exit code {code}"
        except subprocess.TimeoutExpired:
            status = f"stopped after its {limit:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        out.seek(0)
        return Ended(status, time.monotonic() - start, out.read())


def environment(quick: bool) -> dict[str, str]:
    """Of the processes."""
    env = os.environ | {"COLUMNS": "130", "PYTHONUNBUFFERED": "1"}
    # When it starts, JAX would take three quarters of the card. The other processes of
    # pytest, and torch in the process of step.py, would be left with the rest.
    env["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    if quick:
        env["JAX_PLATFORMS"] = "cpu"
    elif card():
        env.setdefault("JAX_PLATFORMS", "cuda")  # the tests' own default is the CPU
    return env


def card() -> dict[str, str]:
    """Name, driver and memory of the first GPU; empty where there is none."""
    if shutil.which("nvidia-smi") is None:
        return {}
    fields = ("name", "driver_version", "memory.total")
    query = f"--query-gpu={','.join(fields)}"
    command = ["nvidia-smi", query, "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    values = done.stdout.partition("\n")[0].split(", ")
    found = done.returncode == 0 and len(values) == len(fields)
    return dict(zip(fields, values, strict=True)) if found else {}


def versions() -> dict[str, str]:
    """Of all packages that may have a part in it."""
    there = {d.name: d.version for d in metadata.distributions()}
    found = {name: there.get(name, "not installed") for name in _PACKAGES}
    return {"python": platform.python_version()} | found


def parts(args: argparse.Namespace) -> Iterator[Part]:
    """All that the command line asks for, in order."""
    if "tests" in args.only:
        command = [sys.executable, "-m", "pytest", "tests/test_device.py", "-vv"]
        # Its plugin, if there is one, warns that it is off where tests run in parallel.
        command += ["-rf", "--tb=short", "--maxfail=30", "-p", "no:benchmark"]
        if not args.quick and importlib.util.find_spec("xdist"):
            command += ["-n", str(min(8, os.cpu_count() or 1))]
        yield Part("tests", command, 240)
    step = [sys.executable, "benchmarks/step.py", "--phase", "adam", "whole"]
    if args.quick:
        step += ["--repeats", "1", "--seconds", "0"]
    for name, options in _WORK.items():
        if name in args.only or "step" in args.only:
            for dtype in ("float32", "bfloat16"):
                command = [*step, "--dtype", dtype, *options[args.quick].split()]
                yield Part(f"{name} {dtype}", [*command, "--rivals"], 120)


def attempt(part: Part, limit: float, env: dict[str, str]) -> tuple[Ended, Any]:
    """Run a part; its figures, as far as it got."""
    if part.name == "tests":
        ended = run(part.command, limit, env)
        last = ended.output.strip().rpartition("\n")[2].strip("= ")
        if ended.status == "ok" and "passed" not in last:
            ended = ended._replace(status="nothing ran")
        return ended, {"summary": last}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "step.json")
        ended = run([*part.command, "--json", str(out)], limit, env)
        figures = json.loads(out.read_text()) if out.exists() else {}
    return ended, figures


def figures_of(part: Part, end: float, env: dict[str, str]) -> tuple[Any, str]:
    """What becomes of a part before `end`, and all that was printed.

    One that ends before it has both phases is tried again without rivals, which may be
    what crashed or took the time.
    """
    left = end - time.monotonic()
    if left < 10:
        return {"status": "not run: no time is left"}, ""
    ended, figures = attempt(part, min(part.limit, left), env)
    result = {"status": ended.status, "seconds": ended.seconds} | figures
    output, left = ended.output, end - time.monotonic()
    if "--rivals" in part.command and len(figures.get("work", {})) < 2 and left >= 10:
        plain = [word for word in part.command if word != "--rivals"]
        again = part._replace(command=plain)
        ended, figures = attempt(again, min(part.limit, left), env)
        alone = {"status": ended.status, "seconds": ended.seconds} | figures
        result["without rivals"] = alone
        output += f"\n--- again, without rivals\n{ended.output}"
    return result, output


def summary(results: dict[str, Any]) -> Table:
    """Time over optax's in the same run, for each work and contender."""
    rows = {}
    for name, result in results.items():
        for found in (result, result.get("without rivals", {})):
            for title, work in found.get("work", {}).items():
                phase = "whole" if title.endswith("whole phase") else "adam"
                rows[f"{name} {phase}"] = work | rows.get(f"{name} {phase}", {})
    names = dict.fromkeys(name for row in rows.values() for name in row)
    table = Table("time / optax", "optax ms", title_justify="left")
    for name in names:
        table.add_column(name, justify="right")
    for title, row in rows.items():
        cells = [
            f"{row[name]['time_over_optax']:.2f}" if name in row else "-"
            for name in names
        ]
        table.add_row(title, f"{row['optax']['median_ms']:.3f}", *cells)
    return table


def problems(results: dict[str, Any]) -> Iterator[str]:
    """Everything that did not run or not as it should, and where."""
    where: dict[str, list[str]] = {}
    timed = 0
    for name, result in results.items():
        if result["status"] != "ok":
            yield f"{name}: {result['status']}"
        for title, absent in result.get("missing", {}).items():
            timed += 1
            for rival, why in absent.items():
                where.setdefault(f"without {rival}: {why}", []).append(
                    f"{name}, {title}"
                )
    for line, places in where.items():
        yield line if len(places) == timed else f"{line} ({'; '.join(places)})"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    everything = ["tests", "step"]
    p = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    p.add_argument(
        "--only", nargs="+", choices=[*everything, *_WORK], default=everything
    )
    p.add_argument("--quick", action="store_true", help="tiny sizes, on the CPU")
    p.add_argument("--seconds", type=float, default=570, help="for all of it")
    p.add_argument("--json", type=Path, default=Path("out/device.json"))
    return p.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; returns 1 if a part of it failed."""
    args, console = parse(argv), Console()
    # So that the process that runs is ended, too: it would disturb what comes next.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    end = time.monotonic() + args.seconds
    console.width = max(console.width, 170)
    about = {"card": card(), "versions": versions()}
    console.print(about, soft_wrap=True)
    env, results = environment(args.quick), {}
    args.json.parent.mkdir(parents=True, exist_ok=True)
    log = args.json.with_suffix(".log")
    log.write_text("")
    for part in parts(args):
        results[part.name], output = figures_of(part, end, env)
        with log.open("a") as file:
            file.write(f"=== {part.name}: {' '.join(part.command)}\n{output}\n")
        args.json.write_text(json.dumps(about | {"parts": results}, indent=2))
        heading = f"=== {part.name}: {results[part.name]['status']}\n"
        print(heading + output[-_SHOWN:], flush=True)
    console.print(summary(results))
    for line in problems(results):
        console.print(line, markup=False, soft_wrap=True)
    expected = ("ok", "nothing ran") if args.quick else ("ok",)
    return 0 if all(r["status"] in expected for r in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
