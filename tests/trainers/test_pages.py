"""What docs/trainers.md shows works, and the doctests that need a trainer."""

import shlex
import subprocess
import sys
from pathlib import Path

from test_docs import check_command

from pages import blocks

ROOT = Path(__file__).parents[2]
BLOCKS = list(blocks(ROOT / "docs" / "trainers.md"))


def test_python_blocks_run() -> None:
    source = [line for b in BLOCKS if b.language == "python" for line in b.lines]
    assert source
    command = [sys.executable, "-c", "\n".join(source)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_console_commands_exist() -> None:
    lines = [line for b in BLOCKS if b.language == "console" for line in b.lines]
    commands = [line for line in lines if line.startswith(("python ", "pytest "))]
    assert commands
    for line in commands:
        check_command(shlex.split(line, comments=True))


def test_doctests() -> None:
    folder = ROOT / "optim" / "integrations"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--doctest-modules", "-o", "addopts=-q"]
        + [str(file) for file in folder.glob("keras*.py")],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout
