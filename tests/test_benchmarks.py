"""The benchmarks run, and their figures are those that a few lines of sums give.

In processes of their own: optax's Adam promotes types implicitly, which the tests
forbid in this one.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import pytest
from _optimizers import OPTIMIZERS as PAIRS
from step import parse

from cases import ADAPTING, OPTIMIZERS, RULES

# A counter, and how a leaf with two moments is stored: 18 numbers, for rank 2.
OTHERS = 4 * (1 + 18)
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def run(tmp_path: Path, program: str, *options: str) -> tuple[str, Any]:
    """What a benchmark prints, and the JSON that it writes."""
    out = tmp_path / "out.json"
    command = [sys.executable, str(BENCHMARKS / program), *options, "--json", str(out)]
    env = os.environ | {"COLUMNS": "160"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(out.read_text())


def check_finite(figures: Any) -> None:
    """All numbers of a nested dict are finite and not negative."""
    for value in figures.values():
        if isinstance(value, dict):
            check_finite(value)
        else:
            assert math.isfinite(value) and value >= 0


@pytest.mark.parametrize(
    ("dtype", "wide", "tree"), [("float32", 4, "tiny"), ("bfloat16", 2, "none")]
)
def test_step(tmp_path: Path, dtype: str, wide: int, tree: str) -> None:
    options = f"--size 256 256 --tree {tree} --dtype {dtype} --repeats 2 --seconds 0"
    shown, result = run(tmp_path, "step.py", *options.split(), "--state", "8bit")
    assert set(result["versions"]) == {"jax", "jaxlib", "optax", "octavo"}
    assert len(result["work"]) == (1 if tree == "none" else 2)
    leaf = result["work"]["leaf of [256, 256]"]
    rivals = ["8bit step", "8bit update", "optax", "copy"]
    for rows in result["work"].values():
        check_finite(rows)
        assert list(rows) == rivals
        assert rows["optax"]["time_over_optax"] == 1
        assert rows["copy"]["percent_of_copy"] == pytest.approx(100)
        for name, row in rows.items():
            assert row["median_ms"] >= row["fastest_ms"] > 0
            assert name in shown

    # Blocks of 16 (256 rows in 16 blocks), each with a bf16 scale for m and one for v.
    codes, scales, others = 2 * 1, 2 * 2 / 16, OTHERS / 256**2
    for name in ("8bit step", "8bit update"):
        row = leaf[name]
        assert row["state_bytes_per_parameter"] == pytest.approx(
            codes + scales + others
        )
        assert row["bytes_per_parameter"] == pytest.approx(
            wide + 2 * wide + 2 * (codes + scales), abs=1e-3
        )
    # optax keeps its moments in the parameters' own type.
    assert leaf["optax"]["bytes_per_parameter"] == pytest.approx(
        wide + 2 * wide + 2 * 2 * wide, abs=1e-3
    )
    traffic = leaf["8bit step"]["bytes_per_parameter"] * 256 * 256
    assert leaf["8bit step"]["bandwidth_gb_s"] == pytest.approx(
        traffic / leaf["8bit step"]["median_ms"] / 1e6
    )


def test_step_takes_every_optimizer() -> None:
    """By the name that it has in octavo.optim, next to that of optax."""
    assert {case.ours for case in RULES.values()} == {p.ours for p in PAIRS.values()}
    for name, pair in PAIRS.items():
        assert parse(["--optimizer", name], jax.devices()[0]).optimizer == name
        assert pair.ours.__name__ == name
        pair.optax(1e-3)


@pytest.mark.parametrize("rule", OPTIMIZERS)
def test_step_counts_every_pass(tmp_path: Path, rule: str) -> None:
    """With a ratio, gradient, parameter and, for LAMB, state are read once more.

    A leaf of 2**20 values and more has the blocks of large models.
    """
    make = RULES[rule].ours
    name = make.__name__
    options = f"--optimizer {name} --size 1024 1024 --tree none --repeats 1"
    shown, result = run(tmp_path, "step.py", *options.split(), "--seconds", "0")
    (rows,) = result["work"].values()
    algorithm = make(1e-3).optimizer.rule
    state = 1.0625 * len(algorithm.slots)
    read_twice = 0.0
    if rule in ADAPTING:
        read_twice = 8 + (state if algorithm.scales == "direction" else 0)
    row = rows["8bit step"]
    assert row["bytes_per_parameter"] == pytest.approx(
        read_twice + 12 + 2 * state, abs=0.01
    )
    assert row["bytes_per_parameter"] <= {"lamb": 26.5, "lars": 22.3}.get(name, 17)
    assert f"{name}, leaf of" in shown


def test_step_counts_scales_only_where_codes_are_integers(tmp_path: Path) -> None:
    """Leaves under 4096 values keep 32-bit moments, and scales that nothing reads."""
    options = "--size 64 63 --tree none --repeats 1 --seconds 0 --state 8bit 32bit"
    _, result = run(tmp_path, "step.py", *options.split())
    (rows,) = result["work"].values()
    assert rows["8bit step"]["bytes_per_parameter"] == pytest.approx(28, abs=0.01)
    assert rows["32bit step"]["bytes_per_parameter"] == pytest.approx(28, abs=0.01)
    unused = 2 * 2 / 4  # bf16, blocks of 4
    assert rows["8bit step"]["state_bytes_per_parameter"] == pytest.approx(
        8 + unused + OTHERS / (64 * 63)
    )


def test_formats(tmp_path: Path) -> None:
    shown, rows = run(tmp_path, "formats.py", "--quick")
    check_finite(rows)
    (row,) = rows.values()
    assert "log8 / eighth root" in shown
    assert 0.02 < row["error b2 .999"] < 0.2
    assert 0.02 < row["error b2 .95"] < 0.2
    assert row["drop"] == pytest.approx(1, abs=0.1)
    assert row["1e-03"] == pytest.approx(1, abs=0.2)
    # Below 1.8e-5 of the block's largest, m flushes to zero: the step is too small.
    assert row["1e-06"] < 0.8


def test_compile_time() -> None:
    """One kernel for all leaves is shown elsewhere; here the program runs."""
    command = [sys.executable, str(BENCHMARKS / "compile_time.py"), "--topology"]
    options = ["--cpu-leaves", "12", "--repeat", "1"]
    done = subprocess.run(
        [*command, *options], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    ratio = float(done.stdout.rpartition("octavo to optax: ")[2])
    assert ratio > 0 and "octavo" in done.stdout
