"""The example of paged state: where it says that the bytes are."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

EXAMPLE = Path(__file__).parents[1] / "examples" / "paged.py"


def test_the_state_is_on_the_host() -> None:
    line = [sys.executable, str(EXAMPLE), "--values", "1_048_576", "--steps", "2"]
    line += ["--page-bytes", "200_000"]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pattern = r"^(\w+(?: bits)?) +" + r"([\d.]+) +" * 3 + r"- +([\d.]+) +[\d.]+$"
    rows = {row[0]: [float(x) for x in row[1:]] for row in _found(pattern, done.stdout)}
    # Two moments of 2**20 values: of 4 bytes each, or 2.125 together, and half of that.
    kept = {name: row[:2] + row[3:] for name, row in rows.items()}
    assert kept == {
        "paged": [0.0, 2.1, 4.2],
        "auto": [1.1, 1.1, 2.1],
        "8 bits": [2.1, 0.0, 0.0],
        "32 bits": [8.0, 0.0, 0.0],
    }
    assert 8 < rows["paged"][2] < rows["auto"][2] < rows["8 bits"][2]
    (furthest,) = _found(r"at most (\S+)", done.stdout)
    assert float(furthest) < 1e-4  # a code here and there: steps are of 1e-3
    assert "float32 moments and weights on the host: 24.0 MiB" in done.stdout


def _found(pattern: str, text: str) -> list[Any]:
    return re.findall(pattern, text, re.MULTILINE)
