"""What the documentation shows works.

The convention, for README.md, CONTRIBUTING.md and everything below docs/ (but
docs/schedules.md, whose examples are doctests):

* Blocks marked `python` are run, in a process of their own: those of one file share
  their names, in order.
* Blocks marked `sh` are run by bash, which stops at the first failure, in a copy of
  the repository. Lines that start with `make`, `pip` or `git clone` are left out.
* Blocks marked `console` show what takes too long here. Of their commands, with or
  without a `$`, those that start with `python` are checked without running: the
  program exists, and its folder knows every option. `pytest` needs existing files.

What pages say in tables and figures is compared with the code here: a page shows only
what a reader would copy.
"""

import ast
import importlib.util
import inspect
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from _compiled import collectives
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P

from octavo import optim, schedules
from octavo.pallas_kernels import FORMATS
from octavo.pallas_kernels.formats import widened

from meshes import mesh_of

ROOT = Path(__file__).parents[1]
_ELSEWHERE = {ROOT / "docs" / "schedules.md"}
FILES = sorted({*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")} - _ELSEWHERE)
_LEFT_OUT = re.compile(r"make\b|pip\b|git clone\b")
_IGNORED = shutil.ignore_patterns(".git", ".venv", "build", "out", "__pycache__", ".*")


class Block(NamedTuple):
    """A fenced block: its language, the number of its first line, and its lines."""

    language: str
    line: int
    lines: list[str]


def blocks(path: Path) -> Iterator[Block]:
    """The fenced blocks of a file, without the indent of a list that they are in."""
    opened: Block | None = None
    indent = 0
    for number, line in enumerate(path.read_text().splitlines(), 1):
        fence = re.match(r"( *)```(\w*)$", line)
        if fence is None:
            if opened is not None:
                opened.lines.append(line[indent:])
        elif opened is None:
            opened, indent = Block(fence[2], number + 1, []), len(fence[1])
        else:
            yield opened
            opened = None
    assert opened is None, f"{path}: the block at line {opened.line} is never closed"


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


@pytest.mark.parametrize("path", [*FILES, *_ELSEWHERE], ids=name)
def test_prose_wraps(path: Path) -> None:
    """But for tables, code, formulas and lines that are one link."""
    fenced = {k for b in blocks(path) for k in range(b.line, b.line + len(b.lines))}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        free = line.startswith(("|", "$$")) or number in fenced
        if not free and not _ONE_LINK.match(line):
            assert len(line) <= _LONGEST, f"{path}:{number}"


# ------------------------------------------------------------------------ CONTRIBUTING

_PACKAGES = ("optim", "pallas_kernels", "schedules")
# A format or a backend is one file, and no row of the map.
_UNLISTED = ("pallas_kernels/formats/", "pallas_kernels/backends/")


def rooms() -> dict[str, list[str]]:
    """The map: `optim/storage/tree.py` or `optim/storage/` -> what it may import."""
    found: dict[str, list[str]] = {}
    folder = ""
    for line in (ROOT / "CONTRIBUTING.md").read_text().splitlines():
        if line.startswith("#"):
            folder = next(iter(re.findall(r"`([\w/]+/)`", line)), "")
        elif folder and line.startswith("| `"):
            room, _, imports = (cell.strip() for cell in line.strip("|").split("|"))
            assert folder + room.strip("`") not in found, line
            found[folder + room.strip("`")] = re.findall(r"`([\w/]+)`", imports)
    return found


def test_the_map_names_every_file_and_folder() -> None:
    there = set()
    for package in _PACKAGES:
        files = {f.relative_to(ROOT) for f in (ROOT / package).rglob("*.py")}
        folders = {f"{f.parent}/" for f in files} - {f"{package}/"}
        listed = {str(f) for f in files if f.name != "__init__.py"}
        there |= folders | {f for f in listed if not f.startswith(_UNLISTED)}
    assert set(rooms()) == there


@pytest.mark.parametrize("room", rooms())
def test_a_room_imports_what_the_map_says(room: str) -> None:
    package, folder = room.partition("/")[0] + "/", room.rpartition("/")[0] + "/"
    # A name is that of a neighbour, or of a room directly in the package.
    allowed = [start + x for x in rooms()[room] for start in (folder, package)]
    if package == "optim/":
        allowed.append("octavo/pallas_kernels/")
    if room == folder:
        allowed.append(room)
    for file in (ROOT / room).rglob("*.py") if room == folder else [ROOT / room]:
        for imported in _imports(file):
            inside = tuple(x for x in allowed if x.endswith("/"))
            known = imported in allowed or f"{imported}/".startswith(inside)
            assert known, f"{file} imports {imported}"


def _imports(file: Path) -> Iterator[str]:
    """What a file imports of Octavo: `optim/storage/tree`, or `octavo/...`."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (
                a.name.replace(".", "/") for a in node.names if "octavo" in a.name
            )
        if not isinstance(node, ast.ImportFrom):
            continue
        names = [a.name for a in node.names]
        module = (node.module or "").replace(".", "/")
        if not node.level:
            if module == "octavo":
                yield from (f"octavo/{x}" for x in names)
            elif module.startswith("octavo/"):
                yield module
            continue
        folder = file.parents[node.level - 1]
        if module:
            yield str((folder / module).relative_to(ROOT))
        else:
            for x in names:
                known = (folder / f"{x}.py").exists() or (folder / x).is_dir()
                yield str((folder / (x if known else "__init__")).relative_to(ROOT))


# ------------------------------------------------------------------ tables and figures


def rows_of(page: str, start: str) -> list[list[str]]:
    """The cells of a page's table rows that start so."""
    lines = (ROOT / page).read_text().splitlines()
    rows = [line for line in lines if line.startswith(f"| {start}")]
    return [[cell.strip(" `") for cell in row.split("|")[1:-1]] for row in rows]


def test_the_table_of_options_is_complete() -> None:
    names = [row[0] for row in rows_of("docs/options.md", "`")]
    assert names == list(optim.Options.__annotations__)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lamb", "lars"])
def test_the_table_of_arguments_is_complete(optimizer: str) -> None:
    page = f"docs/optimizers/{optimizer.removesuffix('w')}.md"
    rows = [(re.findall(r"\w+", row[0]), row[1]) for row in rows_of(page, "`")]
    parameters = inspect.signature(getattr(optim, optimizer)).parameters
    own = [name for name in parameters if name not in optim.Options.__annotations__]
    shown = [name for names, _ in rows for name in names]
    assert sorted(shown) == sorted(own)
    for names, default in rows:
        for name, value in zip(names, re.split(r", (?=\d)", default), strict=False):
            known = parameters[name].default
            said = value.partition(" (")[0].partition(":")[0].strip('`"')
            expected = "" if known is inspect.Parameter.empty else known
            if isinstance(known, float):
                assert float(said) == known, name
            else:
                assert said == str(expected), name


def test_the_tables_of_presets_say_what_the_code_does() -> None:
    """The calls, and in the other tables eps and the weight decay."""
    rows = [r for kind in ("lamb", "lars") for r in rows_of(_BATCHES, f"`{kind}-")]
    calls = {row[0]: row[2].split("`")[0] for row in rows if len(row) == 3}
    shown = {row[0]: row[1:3] for row in rows if len(row) > 3}
    assert sorted(calls) == sorted(shown) == sorted(optim.PRESETS)
    for preset_name, preset in optim.PRESETS.items():
        call, function = calls[preset_name], preset.optimizer
        assert call.partition("(")[0] == function.__name__
        assert eval(call, {function.__name__: dict}) == preset.arguments
        parameters = inspect.signature(function).parameters
        used = {k: p.default for k, p in parameters.items()} | preset.arguments
        known = [used.get("eps", 0.0), used["weight_decay"]]
        assert [float(cell) for cell in shown[preset_name]] == known


_BATCHES = "docs/large_batch.md"


def test_the_rates_of_the_lamb_paper_follow_its_rules() -> None:
    rows = [row for row in rows_of(_BATCHES, "") if row[2].startswith("5e-3")]
    assert len(rows) == 7
    for batch, steps, rate, warmup, _ in rows:
        samples, count = int(batch.replace(",", "")), int(steps.replace(",", ""))
        assert count == 512_000_000 // samples
        scaled = schedules.scale_lr(5e-3, samples, 32_768, rule="sqrt")
        assert scaled == pytest.approx(eval(rate.replace("^", "**")))
        assert eval(warmup) == 3_125 / count


def worst(
    form: str,
    signed: bool,
    low: float,
    high: float = 1.0,
    power: int = 1,
    noise: float = 0.5,
) -> float:
    """Largest relative error of x**(1 / power), from low to high of the scale."""
    root = np.geomspace(low, high, 200_001)[:-1]
    x = jnp.asarray(root**power, jnp.float32)
    made = FORMATS[form](signed)
    scale = made.scale(made.magnitude(jnp.ones(1)))
    codes = widened(made.encode(x, scale, noise).astype(made.dtype))
    got = np.asarray(made.decode(codes, scale), float) ** (1 / power)
    return float(np.abs(got / root - 1).max())


# The noise that rounds up furthest.
_UP = 1 - 2**-24


@pytest.mark.parametrize(
    ("form", "signed", "low", "noise", "error"),
    [
        ("bf16", True, 1e-6, 0.5, 1 / 257),
        ("bf16", False, 1e-6, _UP, 1 / 128),
        ("8bit", True, 1.1876 * 2**-16, 0.5, 1 / 17),
    ],
)
def test_worst_errors_of_bf16_and_log8(
    form: str, signed: bool, low: float, noise: float, error: float
) -> None:
    # Noise below 1 rounds up less than a whole unit.
    assert worst(form, signed, low, noise=noise) == pytest.approx(error, abs=3e-5)


def percent(cells: list[str]) -> list[float]:
    """The numbers of cells like `6.2 %`."""
    return [float(cell.removesuffix("%")) / 100 for cell in cells]


def test_worst_errors_of_root8_are_those_of_the_table() -> None:
    (lows,) = rows_of("docs/formats.md", "√v down to")
    (errors,) = rows_of("docs/formats.md", "worst relative error of √v")
    for low, error in zip(lows[2:], percent(errors[2:]), strict=True):
        found = worst("8bit", False, float(low), power=2, noise=_UP)
        assert found == pytest.approx(error, rel=0.03)  # two digits


@pytest.mark.parametrize("signed", [True, False])
def test_worst_errors_of_dynamic8_are_those_of_the_table(signed: bool) -> None:
    (errors,) = rows_of("docs/formats.md", f"{'first' if signed else 'second'} moments")
    for j, error in enumerate(percent(errors[1:7])):
        found = worst("dynamic8", signed, 10.0 ** (-j - 1), 10.0**-j)
        assert found == pytest.approx(error, rel=0.03)  # two digits


def test_the_picture_of_formats_shows_these_errors() -> None:
    pytest.importorskip("matplotlib")
    drawn = runpy.run_path(str(ROOT / "docs/build_formats.py"))["worst_errors"]
    sizes = np.geomspace(1e-4, 1, 20_001)[:-1]
    for form, error in (("8bit", 1 / 17), ("bf16", 1 / 257)):
        found = drawn(FORMATS[form](True), sizes, True).max()
        assert found == pytest.approx(error, rel=3e-3)  # sizes are 5e-4 apart
    assert drawn(FORMATS["8bit"](False), sizes, False)[-1] < 0.028  # of down to 1e-1


# ---------------------------------------------------------------------------- sharding


def test_the_explanation_that_is_shown() -> None:
    page = ROOT / "docs/sharding.md"
    shown = [b for b in blocks(page) if b.lines[0].startswith("┏")]
    pod = AbstractMesh((16, 16), ("fsdp", "tensor"))
    vocabulary = {"embedding": jax.ShapeDtypeStruct((128256, 4096), jnp.float32)}
    sharded = NamedSharding(pod, P("tensor", "fsdp"))
    report = optim.explain(optim.adamw(1e-3), vocabulary, sharded, "tpu")
    assert ["\n".join(b.lines) for b in shown] == [str(report)]


@pytest.mark.parametrize(
    "remedy", [row[0] for row in rows_of("docs/sharding.md", "`block_")]
)
def test_the_advice_for_crossing_blocks_fits(remedy: str) -> None:
    pod = AbstractMesh((16, 16), ("fsdp", "tensor"))
    vocabulary = {"embedding": jax.ShapeDtypeStruct((128256, 4096), jnp.float32)}
    tx = eval(f"adamw(1e-3, {remedy})", {"adamw": optim.adamw})
    sharded = NamedSharding(pod, P("tensor", "fsdp"))
    (row,) = optim.explain(tx, vocabulary, sharded, "tpu").rows
    assert row.aligned


@pytest.mark.parametrize(
    ("optimizer", "options", "reductions"),
    [
        ("adamw", {}, 0),
        ("adamw", {"grad_clip_norm": 1.0, "skip_nonfinite": True}, 1),
        ("adamw", {"percentile_clipping": 5}, 1),
        ("adamw", {"max_unorm": 1.0, "record_norms": True}, 1),
        ("lamb", {}, 1),
        ("lars", {"skip_nonfinite": True}, 1),
        ("lamb", {"grad_clip_norm": 1.0}, 2),
        ("adamw", {"max_unorm": 1.0, "percentile_clipping": 5}, 2),
    ],
)
def test_collectives_are_those_of_the_table(
    optimizer: str, options: dict[str, Any], reductions: int
) -> None:
    mesh = mesh_of("4x2", "auto")
    placed = {
        "up": NamedSharding(mesh, P("d", "m")),
        "norm": NamedSharding(mesh, P("d")),
    }
    params = {"up": jnp.ones((512, 256)), "norm": jnp.ones(512)}
    params = jax.device_put(params, placed)
    tx = getattr(optim, optimizer)(1e-3, sharding=placed, **options)
    step = jax.jit(lambda params, state, grads: tx.step(grads, state, params))
    text = step.lower(params, tx.init(params), params).compile().as_text()
    found = {"all-reduce": reductions} if reductions else {}
    assert collectives(text) == found
