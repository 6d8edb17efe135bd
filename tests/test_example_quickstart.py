"""The first example, its length, and the table that leads to it and to the others."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_learns() -> None:
    line = [sys.executable, str(EXAMPLES / "quickstart.py")]
    environment = os.environ | {"PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(line, env=environment, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    shown = re.findall(r"epoch (\d+): loss ([\d.]+), .* ([\d.]+)%", done.stdout)
    assert [int(epoch) for epoch, _, _ in shown] == list(range(1, 11))
    losses = [float(loss) for _, loss, _ in shown]
    assert losses[-1] < 0.1 < losses[0]
    assert float(shown[-1][2]) > 85
    assert "ratio8/bits8" in done.stdout


@pytest.mark.parametrize(("name", "lines"), [("quickstart", 60), ("train_lm", 149)])
def test_is_short(name: str, lines: int) -> None:
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) <= lines


def test_the_table_has_every_program() -> None:
    table = re.findall(
        r"^\| `(\w+\.py)` \|", (EXAMPLES / "README.md").read_text(), re.M
    )
    programs = {file.name for file in EXAMPLES.glob("*.py")}
    assert set(table) == {name for name in programs if not name.startswith("_")}
    assert table[0] == "quickstart.py"
