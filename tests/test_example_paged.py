"""The example of paged state: where it says that the bytes are."""

import re
import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parents[1] / "examples" / "paged.py"


def test_the_state_is_on_the_host() -> None:
    line = [sys.executable, str(EXAMPLE), "--values", "1_048_576", "--steps", "2"]
    line += ["--page-bytes", "500_000"]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^(32 bits|8 bits|paged) +([\d.]+) +([\d.]+)", done.stdout, re.M)
    # Two moments of 2**20 values: of 4 bytes each, or 2.125 together.
    assert rows == [("32 bits", "8.0", "0.0"), ("8 bits", "2.1", "0.0"), *_PAGED]
    (furthest,) = re.findall(r"at most (\S+)", done.stdout)
    assert float(furthest) < 1e-4  # a code here and there: steps are of 1e-3


_PAGED = [("paged", "0.0", "2.1")]
