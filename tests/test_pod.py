"""The benchmark of pods, for two layers of its model, and its sums once more."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

POD = Path(__file__).parents[1] / "benchmarks" / "pod.py"
LAYERS, DEVICES = 2, 256
WIDTH, HIDDEN, KEYS, VOCABULARY = 4096, 14336, 1024, 128256
LAYER = 2 * WIDTH * WIDTH + 2 * WIDTH * KEYS + 3 * WIDTH * HIDDEN
NORMS = (2 * LAYERS + 1) * WIDTH


def compiled(tmp_path: Path, *options: str) -> tuple[str, list[dict[str, Any]]]:
    """What the program prints, and its figures; it fails if a promise is broken."""
    out = tmp_path / "pod.json"
    command = [sys.executable, str(POD), "--layers", str(LAYERS), *options]
    done = subprocess.run(
        [*command, "--json", str(out)],
        capture_output=True,
        text=True,
        env=os.environ | {"COLUMNS": "160"},
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, json.loads(out.read_text())["rows"]


@pytest.mark.parametrize(
    ("tree", "axes"), [("separate", "explicit"), ("stacked", "auto")]
)
def test_step_on_256_chips(tree: str, axes: str, tmp_path: Path) -> None:
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed (extra 'aot', Linux x86-64 only)")
    options = f"--topology v6e:16x16 --tree {tree} --axes {axes}"
    shown, (adamw, lamb) = compiled(tmp_path, *options.split())

    # Shards of the vocabulary are 8016 long, and take blocks of 16: scales of 1/8 byte.
    assert "'embedding'" in shown and "'head'" in shown
    assert "block_size=16 or block_axis=" in shown
    blocks = {32: LAYERS * LAYER, 16: 2 * WIDTH * VOCABULARY}
    state = sum(2 * n * (1 + 2 / size) / DEVICES for size, n in blocks.items())
    state += 2 * NORMS * (1 + 2 / 32) / 16
    leaves = 9 if tree == "stacked" else 7 * LAYERS + 2
    vectors = 3 if tree == "stacked" else 2 * LAYERS + 1
    # Of each leaf: type, rank, shape and blocks, and for two slots 4 numbers and none.
    rank = 3 if tree == "stacked" else 2
    table = 4 * (4 + rank + 2 * (5 + rank)) * (leaves + vectors)
    for row, passes in ((adamw, 1), (lamb, 2)):
        assert row["parameters"] == LAYERS * LAYER + 2 * WIDTH * VOCABULARY + NORMS
        assert row["state_bytes"] == state
        assert row["other_state_bytes"] == table + 4
        held = 8 * (row["parameters"] - NORMS) / DEVICES + 8 * NORMS / 16 + state
        assert held <= row["argument_bytes"] <= 1.01 * held
        assert row["kernels"] == passes * leaves
        assert row["replicated"] == row["moved"] == []
    assert adamw["collectives"] == {}
    assert lamb["collectives"] == {"all-reduce": 1}
    assert lamb["reduced"] == 2 * (7 * LAYERS + 2)
    # Of a leaf, the smallest shard takes 64 KiB.
    assert adamw["temporary_bytes"] < 2**16


def test_step_on_8_gpus(tmp_path: Path) -> None:
    if importlib.util.find_spec("jax_plugins.xla_cuda13") is None:
        pytest.skip("no CUDA plugin (extra 'aot', Linux x86-64 only)")
    options = "--topology h200:1x8 --tree stacked"
    shown, (adamw, lamb) = compiled(tmp_path, *options.split())
    assert "boundaries" not in shown  # 2 shards of the vocabulary, 64128 rows each
    matrices, vectors = 9, 3
    assert adamw["kernels"] == matrices + vectors
    assert lamb["kernels"] == adamw["kernels"] + matrices
    assert adamw["temporary_bytes"] < 2**16
    # Two sums of each 4,096 values, which XLA copies twice: 24 bytes for 16,384.
    assert lamb["temporary_bytes"] < lamb["parameter_bytes"] * 24 / 16384 + 2**16
