"""What the documentation shows works.

The convention, for README.md, CONTRIBUTING.md and everything below docs/ (but
docs/schedules.md, whose examples are doctests, and docs/trainers.md, whose blocks
tests/trainers runs):

* Blocks marked `python` are run, in a process of their own: those of one file share
  their names, in order.
* Blocks marked `sh` are run by bash, which stops at the first failure, in a copy of
  the repository. Lines that start with `make`, `pip` or `git clone` are left out.
* Blocks marked `console` show what takes too long here. Of their commands, with or
  without a `$`, those that start with `python` are checked without running: the
  program exists, and its folder knows every option. `pytest` needs existing files.
"""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pages import blocks

ROOT = Path(__file__).parents[1]
_ELSEWHERE = {ROOT / "docs" / "schedules.md", ROOT / "docs" / "trainers.md"}
FILES = sorted({*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")} - _ELSEWHERE)
_LEFT_OUT = re.compile(r"make\b|pip\b|git clone\b")
_IGNORED = shutil.ignore_patterns(".git", ".venv", "build", "out", "__pycache__", ".*")


def marked(language: str) -> list[Path]:
    """The files that have blocks of a language."""
    return [f for f in FILES if any(b.language == language for b in blocks(f))]


def name(path: Path) -> str:
    """A test's name for a file."""
    return str(path.relative_to(ROOT))


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the repository, to run things in."""
    return Path(shutil.copytree(ROOT, tmp_path / "copy", ignore=_IGNORED))


def run(command: list[str], folder: Path) -> None:
    """Run a program, this Python being `python`; show what it says if it fails."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        command,
        cwd=folder,
        env=os.environ | {"PATH": path},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", marked("python"), ids=name)
def test_python_blocks_run(path: Path, copy: Path) -> None:
    # Every line where it is in the file, so that a traceback points to it.
    source: list[str] = []
    for block in blocks(path):
        if block.language == "python":
            source += [""] * (block.line - 1 - len(source)) + block.lines
    script = copy / f"{path.stem}_blocks.py"
    script.write_text("\n".join(source) + "\n")
    run([sys.executable, str(script)], copy)


@pytest.mark.parametrize("path", marked("sh"), ids=name)
def test_sh_blocks_run(path: Path, copy: Path) -> None:
    for block in blocks(path):
        if block.language == "sh":
            kept = [line for line in block.lines if not _LEFT_OUT.match(line)]
            run(["bash", "-euc", "\n".join(kept)], copy)


@pytest.mark.parametrize("path", marked("console"), ids=name)
def test_console_commands_exist(path: Path) -> None:
    for block in blocks(path):
        if block.language == "console":
            for line in block.lines:
                command = line.removeprefix("$ ")
                if command.startswith(("python ", "pytest ")):
                    check_command(shlex.split(command, comments=True))


def check_command(words: list[str]) -> None:
    """A command of a console block, as the module's docstring says."""
    if words[0] == "pytest":
        paths = [w.partition("::")[0] for w in words if w.startswith("tests")]
        assert all((ROOT / p).exists() for p in paths), words
        return
    if words[1] == "-m":
        assert importlib.util.find_spec(words[2]) is not None, words
        return
    program = ROOT / words[1]
    assert program.is_file(), words
    known = "".join(f.read_text() for f in program.parent.glob("*.py"))
    for word in words[2:]:
        if word.startswith("--"):
            assert f'"{word.partition("=")[0]}"' in known, (word, words)


def test_commands_that_do_not_exist_are_found() -> None:
    check_command(shlex.split("python benchmarks/step.py --size 8 8"))
    for wrong in ("python benchmarks/stop.py", "python benchmarks/step.py --sise 8"):
        with pytest.raises(AssertionError):
            check_command(shlex.split(wrong))


# ------------------------------------------------------------------------ how it reads

_LONGEST = 100
_ONE_LINK = re.compile(r"[-* ]*!?\[[^]]*\]\([^)]*\)[.:]?$")


@pytest.mark.parametrize("path", [*FILES, *sorted(_ELSEWHERE)], ids=name)
def test_prose_wraps(path: Path) -> None:
    """But for tables, code, formulas and lines that are one link."""
    fenced = {k for b in blocks(path) for k in range(b.line, b.line + len(b.lines))}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        free = line.startswith(("|", "$$")) or number in fenced
        if not free and not _ONE_LINK.match(line):
            assert len(line) <= _LONGEST, f"{path}:{number}"
