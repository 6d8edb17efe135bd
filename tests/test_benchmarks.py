"""The benchmarks run, and their figures are those that a few lines of sums give.

In processes of their own: optax's Adam promotes types implicitly, which the tests
forbid in this one.
"""

import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import _rivals
import device
import jax
import jax.numpy as jnp
import pytest
from _optimizers import OPTIMIZERS as PAIRS
from family import FAMILY
from step import TREES, parse

from cases import ADAPTING, KINDS, RULES

# A counter, and how a leaf with two moments is stored: 20 numbers, for rank 2.
OTHERS = 4 * (1 + 20)
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
    """By the name that it has in octavo.optim, next to that of optax.

    Muon steps matrices by one rule and all else by another's: it is no case of rules.
    """
    assert {*PAIRS} == {case.ours.__name__ for case in RULES.values()} | {"muon"}
    for name, pair in PAIRS.items():
        assert parse(["--optimizer", name], jax.devices()[0]).optimizer == name
        assert pair.ours.__name__ == name
        pair.optax(1e-3)


# Bytes per parameter of those that have two passes, or a third moment.
LIMITS = {"lamb": 26.5, "lars": 22.3, "ademamix": 20.5}


@pytest.mark.parametrize("rule", KINDS)
def test_step_counts_every_pass(tmp_path: Path, rule: str) -> None:
    """With a ratio, gradient, parameter and, for LAMB, state are read once more.

    A leaf of 2**20 values and more has the blocks of large models.
    """
    name = RULES[rule].ours.__name__
    options = f"--optimizer {name} --size 1024 1024 --tree none --repeats 1"
    shown, result = run(tmp_path, "step.py", *options.split(), "--seconds", "0")
    (rows,) = result["work"].values()
    algorithm = PAIRS[name].ours(1e-3).optimizer.rule
    state = sum(2.0625 if slot.slow else 1.0625 for slot in algorithm.slots)
    read_twice = 0.0
    if rule in ADAPTING:
        read_twice = 8 + (state if algorithm.scales == "direction" else 0)
    row = rows["8bit step"]
    assert row["bytes_per_parameter"] == pytest.approx(
        read_twice + 12 + 2 * state, abs=0.01
    )
    assert row["bytes_per_parameter"] <= LIMITS.get(name, 17)
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


def test_step_in_the_whole_phase(tmp_path: Path) -> None:
    """The norm needs every gradient once more; rivals are timed, or it says why not."""
    options = "--tree small12 --phase adam whole --rivals --repeats 1 --seconds 0"
    shown, result = run(tmp_path, "step.py", *options.split(), "--size")
    assert list(result["work"]) == ["small12 tree", "small12 tree, whole phase"]
    alone, whole = result["work"].values()
    for rows, missing in zip((alone, whole), result["missing"].values(), strict=True):
        check_finite(rows)
        assert set(_rivals.RIVALS) == set(missing) | (set(_rivals.RIVALS) & set(rows))
        for name, why in missing.items():
            assert why and re.search(f"without {name}: ", shown)
        if "torch-fused" in rows:  # and a counter of 4 bytes for each leaf
            moments = rows["torch-fused"]["state_bytes_per_parameter"]
            assert moments == pytest.approx(8 + 12 * 4 / (6 * 65 * 128))
    for name in set(alone) - {"copy"}:
        more = whole[name]["bytes_per_parameter"] - alone[name]["bytes_per_parameter"]
        assert more == pytest.approx(4, abs=0.02)


def test_trees() -> None:
    def leaves(name: str) -> list[tuple[int, ...]]:
        return jax.tree.leaves(TREES[name], is_leaf=lambda x: isinstance(x, tuple))

    assert sum(map(math.prod, leaves("1b"))) == pytest.approx(1e9, rel=0.02)
    assert leaves("moe").count((8, 1024, 4096)) == 6
    assert (
        leaves("small300").count((64, 128)) == leaves("small300").count((128,)) == 150
    )


def test_a_contender_that_fails_leaves_the_others() -> None:
    def broken(fixed: Any, carry: Any) -> Any:
        raise ValueError("no kernel\nof that kind")

    x = jnp.zeros(8)
    good = _rivals.Contender("good", lambda fixed, carry: carry + fixed, x, x, 1)
    bad = _rivals.Contender("bad", broken, x, x, 1)
    timed, failed = _rivals.measure([bad, good], 2, 0.0)
    assert [c.name for c in timed] == ["good"] and len(good.times) == 2
    assert failed == {"bad": "ValueError: no kernel"}


def test_rivals_that_are_not_here_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(name: str, task: _rivals.Task) -> _rivals.Contender:
        raise RuntimeError("needs a device")

    absent = _rivals.Rival("octavo_absent", "octavo-absent", build)
    unfit = _rivals.Rival("octavo", "octavo", build)
    monkeypatch.setattr(_rivals, "RIVALS", {"absent": absent, "unfit": unfit})
    found, missing = _rivals.installed(_rivals.Task({}, {}, False), ["absent", "unfit"])
    assert not found
    assert missing == {
        "absent": "octavo-absent is not installed",
        "unfit": "RuntimeError: needs a device",
    }


def test_device(tmp_path: Path) -> None:
    options = "--quick --only tests leaf --seconds 110"
    shown, result = run(tmp_path, "device.py", *options.split())
    assert set(result["versions"]) >= {"python", "jax", "jaxlib", "octavo", "torch"}
    assert list(result["parts"]) == ["tests", "leaf float32", "leaf bfloat16"]
    tests, *timed = result["parts"].values()
    # On a CPU.
    assert tests["status"] == "nothing ran" and "skipped" in tests["summary"]
    for part in timed:
        assert part["status"] == "ok" and len(part["work"]) == 2
        for rows in part["work"].values():
            check_finite(rows)
    assert "nothing ran" in shown and "time / optax" in shown
    assert "torch-fused" in (tmp_path / "out.log").read_text()


def test_device_ends_what_takes_too_long() -> None:
    program = "import time; print('begun', flush=True); time.sleep(60)"
    ended = device.run([sys.executable, "-c", program], 3, dict(os.environ))
    assert ended.status == "stopped after its 3 s" and ended.seconds < 30
    ended = device.run([sys.executable, "-c", "exit(3)"], 30, dict(os.environ))
    assert ended.status == "failed with exit code 3"


def test_device_tries_again_without_rivals(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the process ends before it has figures of both phases."""
    work = {"a": {}, "b": {}}

    def run(command: list[str], limit: float, env: dict[str, str]) -> device.Ended:
        if "--rivals" in command:
            return device.Ended("failed with exit code -6", 1.0, "crashed")
        out = Path(command[command.index("--json") + 1])
        out.write_text(json.dumps({"work": work}))
        return device.Ended("ok", 1.0, "fine")

    monkeypatch.setattr(device, "run", run)
    part = device.Part("leaf float32", ["step.py", "--rivals"], 5)
    result, output = device.figures_of(part, time.monotonic() + 60, {})
    assert result["status"] == "failed with exit code -6" and "work" not in result
    assert result["without rivals"]["work"] == work
    assert "crashed" in output and "fine" in output
    late, _ = device.figures_of(part, time.monotonic(), {})
    assert late == {"status": "not run: no time is left"}


def test_device_says_what_is_missing() -> None:
    everywhere = {"torchao": "torchao is not installed"}
    once = everywhere | {"torch-fused": "too large"}
    ok = {"status": "ok", "missing": {"a": everywhere, "b": once}}
    late = {"status": "stopped after its 5 s"}
    assert list(device.problems({"x": ok, "y": late})) == [
        "y: stopped after its 5 s",
        "without torchao: torchao is not installed",
        "without torch-fused: too large (x, b)",
    ]


def test_formats(tmp_path: Path) -> None:
    shown, rows = run(tmp_path, "formats.py", "--quick")
    check_finite(rows)
    (row,) = rows.values()
    assert "ratio8 / bits8: 8bit" in shown
    assert 0.02 < row["error b2 .999"] < 0.2
    assert 0.02 < row["error b2 .95"] < 0.2
    assert row["drop"] == pytest.approx(1, abs=0.1)
    assert row["1e-03"] == pytest.approx(1, abs=0.2)
    # Below 1.4e-6 of the block's largest, sqrt(v) is clamped up: the step is too small.
    assert row["1e-06"] < 0.8


def test_family(tmp_path: Path) -> None:
    """Bytes are counted by hand; the page has the table of this program."""
    options = "--steps 30 --size 512 16 --optimizers ademamix lion"
    shown, rows = run(tmp_path, "family.py", *options.split())
    check_finite(rows)
    scale = 2 / 32  # bf16, for 32 codes
    known = {
        "ademamix": {"32bit": 12, "8bit": 4 + 3 * scale, "bf16": 6},
        "lion": {"32bit": 4, "8bit": 1 + scale, "bf16": 2, "dynamic8": 1 + scale},
    }
    for name, row in rows.items():
        for state, number in known[name].items():
            assert row[f"bytes {state}"] == number
        assert 0 < row["error bf16"] < row["error 8bit"] < 1
        assert 0 < row["way bf16"] < row["way 8bit"] < row["way other"]
    page = (BENCHMARKS.parent / "docs" / "optimizers" / "README.md").read_text()
    assert all(line in page for line in shown.splitlines()[:2])
    measured = re.findall(r"^\| ([a-z][^|]*?) \| \d", page, re.MULTILINE)
    assert measured == list(FAMILY)


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
