"""The example of a mesh, run as users run it: in a process of its own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
SMALL = "--steps 20 --layers 1 --width 64 --heads 2 --length 32 --batch-size 16"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The example, with whatever devices it finds."""
    command = [sys.executable, str(EXAMPLES / "sharded.py"), *arguments]
    env = os.environ | {"COLUMNS": "140"}
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)


def test_trains_on_eight_devices() -> None:
    done = run(*SMALL.split())
    assert done.returncode == 0, done.stderr
    shown = done.stdout
    assert "a mesh of 4 fsdp x 2 tensor" in shown
    assert "boundaries" not in shown + done.stderr
    for device in range(8):  # of the parameter, its codes and its scales
        assert shown.count(f"CPU {device} ") == 3

    losses = re.search(r"first 2 steps: ([\d.]+), of the last: ([\d.]+)", shown)
    assert losses is not None
    first, last = map(float, losses.groups())
    assert last < first - 0.5

    held = {}
    cells = r"│ (\w[^│]*?) +│ +([\d,]+) │ +([\d,]+) │"
    for name, *numbers in re.findall(cells, shown):
        whole, part = (int(n.replace(",", "")) for n in numbers)
        assert whole / 8 <= part < whole / 7
        held[name] = part
    # A counter, and for each of 13 leaves 20 numbers that say how it is stored.
    others = 4 * (1 + 13 * 20)
    assert held["state, 32-bit"] == 2 * held["parameters"] + others
    assert held["state, 8-bit"] < 0.45 * held["state, 32-bit"]


def test_batches_that_do_not_divide_are_refused() -> None:
    done = run("--batch-size", "6")
    assert done.returncode == 1
    assert "--batch-size must be a multiple of 4" in done.stderr


@pytest.mark.parametrize(
    ("devices", "shape"),
    [(1, (1, 1)), (2, (2, 1)), (4, (2, 2)), (6, (2, 2)), (8, (4, 2)), (64, (32, 2))],
)
def test_mesh_shape(
    devices: int, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    import sharded

    assert sharded.mesh_shape(devices) == shape
