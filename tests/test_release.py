"""The wheel and the sdist: what is in them, and how they work without the repository.

They are built from a copy of the repository and installed where nothing but their
declared requirements can be imported.
"""

import json
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
FOLDERS = {
    "": "package",
    "optim/": "optim",
    "pallas_kernels/": "pallas_kernels",
    "schedules/": "schedules",
}
_IGNORED = shutil.ignore_patterns(".*", "build", "dist", "out", "*.egg-info")


def run(*command: object, cwd: Path) -> str:
    """What a program that succeeds prints."""
    line = list(map(str, command))
    done = subprocess.run(line, cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def python(module: str, *arguments: object, cwd: Path) -> str:
    """What a module of the tests' own Python prints."""
    return run(sys.executable, "-m", module, *arguments, cwd=cwd)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository: what building writes stays out of the real one."""
    return Path(
        shutil.copytree(ROOT, tmp_path_factory.mktemp("a") / "copy", ignore=_IGNORED)
    )


@pytest.fixture(scope="module")
def built(source: Path) -> Path:
    """A folder with the sdist and the wheel that is made of it."""
    python("build", "--no-isolation", "--outdir", "dist", cwd=source)
    return source / "dist"


# ------------------------------------------------------------------------ what is in it


def names_in(wheel: Path) -> set[str]:
    """The files of a wheel, but those about it."""
    with zipfile.ZipFile(wheel) as files:
        names = set(files.namelist())
    about = {name for name in names if ".dist-info/" in name}
    assert any(name.endswith("/licenses/LICENSE") for name in about)
    return names - about


def only(folder: Path, pattern: str) -> Path:
    """The one file of a folder with such a name."""
    (file,) = folder.glob(pattern)
    return file


def test_wheels_have_every_file_of_the_packages_and_no_other(built: Path) -> None:
    expected = {"octavo/py.typed"}
    for name, folder in FOLDERS.items():
        files = (
            file.relative_to(ROOT / folder) for file in (ROOT / folder).rglob("*.py")
        )
        expected |= {f"octavo/{name}{file.as_posix()}" for file in files}
    assert names_in(only(built, "*.whl")) == expected
    source = built.parent
    python("build", "--no-isolation", "--wheel", "--outdir", "direct", cwd=source)
    assert names_in(only(source / "direct", "*.whl")) == expected


def test_the_sdist_builds_by_itself_and_has_no_tests(built: Path) -> None:
    with tarfile.open(only(built, "*.tar.gz")) as files:
        names = {name.partition("/")[2] for name in files.getnames()}
    assert {"LICENSE", "README.md", "pyproject.toml", "package/py.typed"} <= names
    assert not {name.partition("/")[0] for name in names} & {"tests", "examples"}


def test_every_folder_is_a_listed_package() -> None:
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    there = {"octavo"}
    for name in ("optim", "pallas_kernels", "schedules"):
        files = (file.relative_to(ROOT) for file in (ROOT / name).rglob("*.py"))
        there |= {"octavo." + ".".join(file.parent.parts) for file in files}
    assert set(table["packages"]) == there


# --------------------------------------------------------------------------- installed


def declared(site: Path) -> Iterator[metadata.Distribution]:
    """The requirements of the Octavo installed in a folder, and theirs."""
    (octavo,) = metadata.distributions(name="octavo", path=[str(site)])
    waiting, seen = [(octavo, "")], set()
    while waiting:
        needing, extra = waiting.pop()
        for text in needing.requires or ():
            needed = Requirement(text)
            if needed.marker and not needed.marker.evaluate({"extra": extra}):
                continue
            for wanted in ("", *needed.extras):
                if (needed.name, wanted) not in seen:
                    seen.add((needed.name, wanted))
                    found = metadata.distribution(needed.name)
                    waiting.append((found, wanted))
                    yield found


def link(found: metadata.Distribution, folder: Path) -> None:
    """Make an installed distribution importable from a folder."""
    for name in {file.parts[0] for file in found.files or ()} - {"..", "__pycache__"}:
        if not (folder / name).exists():
            (folder / name).symlink_to(Path(found.locate_file(name)))


def environment(folder: Path) -> Path:
    """The Python of a virtual environment with nothing in it."""
    python("venv", "--without-pip", folder, cwd=folder.parent)
    return folder / "bin" / "python"


def install(python: Path, *project: object) -> None:
    """Install a project in an environment, without what it requires."""
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--quiet")
    line = (sys.executable, "-m", "pip", "--python", python, "install", *options)
    run(*line, *project, cwd=python.parent)


def site_of(python: Path) -> Path:
    """Where an environment has its packages."""
    return only(python.parents[1] / "lib", "*/site-packages")


@pytest.fixture(scope="module")
def installed(built: Path) -> Path:
    """A Python that has the wheel, and its requirements as they are here."""
    python = environment(built / "env")
    install(python, only(built, "*.whl"))
    site = site_of(python)
    for found in declared(site):
        link(found, site)
    return python


def test_works_where_nothing_else_is_installed(installed: Path, tmp_path: Path) -> None:
    program, folder = ROOT / "tests" / "first_steps.py", tmp_path / "checkpoints"
    printed = json.loads(run(installed, "-P", program, folder, cwd=tmp_path))
    assert "octavo.optim.checkpoint.saving" in printed["files"]
    for name in printed["absent"]:  # Keras is no requirement
        assert name.startswith("octavo.optim.integrations.keras"), name
    for file in printed["files"].values():
        assert Path(file).is_relative_to(site_of(installed)), file
    assert printed["version"] == metadata.version("octavo")
    changes = (ROOT / "CHANGELOG.md").read_text()
    assert re.findall(r"^## (\S+)", changes, re.M)[0] == printed["version"]


WHERE = """
import json, octavo
from importlib.util import find_spec
names = "octavo", "octavo.optim", "octavo.pallas_kernels", "octavo.schedules"
print(json.dumps([find_spec(name).origin for name in names]))
"""


@pytest.mark.parametrize("mode", ["lenient", "strict"])
def test_is_found_when_it_is_editable(mode: str, source: Path, tmp_path: Path) -> None:
    """From any folder, the repository's own included."""
    python = environment(tmp_path / "env")
    link(metadata.distribution("setuptools"), site_of(python))
    settings = ("--config-settings", f"editable_mode={mode}")
    install(python, *settings, "--editable", source)
    for folder in (tmp_path, source):
        found = json.loads(run(python, "-c", WHERE, cwd=folder))
        inits = [source / name / "__init__.py" for name in FOLDERS.values()]
        assert [Path(file).resolve() for file in found] == inits


# ------------------------------------------------------------------------------- types

RIGHT = """
from typing import Any

import jax.numpy as jnp
import octavo
from octavo import optim, schedules

version: str = octavo.__version__
rate = schedules.PolynomialLR(1e-3, total_steps=10)
params: Any = {"kernel": jnp.ones((64, 64))}
tx: optim.Transformation = optim.adamw(rate, weight_decay=0.1, state="8bit")
params, state = tx.step(params, tx.init(params), params)
report: optim.MemoryReport = optim.memory_report(optim.lion8bit(1e-3), params)
train_state = optim.TrainState.create(apply_fn=None, params=params, tx=tx)
"""
WRONG = """
from octavo import optim, schedules

optim.adamw(1e-3, weight_decay="much")
optim.adamw(1e-3, min_quantized_sizes=8)
optim.adamm(1e-3)
optim.lion8bit(1e-3, seed="one")
optim.adamw(1e-3).step(1)
schedules.PolynomialLR(1e-3, total_step=10)
"""


# What follows from the types of others is not looked at: mypy takes most of a minute
# for those of JAX.
MYPY = """
[mypy]

[mypy-jax.*,jaxlib.*,numpy.*,flax.*,optax.*,orbax.*,rich.*]
follow_imports = skip
"""


@pytest.mark.parametrize(
    "checker", [("mypy", "--python-executable"), ("basedpyright", "--pythonpath")]
)
def test_types_are_known(
    checker: tuple[str, str], installed: Path, tmp_path: Path
) -> None:
    files = {"right.py": RIGHT, "wrong.py": WRONG}
    for name, text in (files | {"mypy.ini": MYPY}).items():
        (tmp_path / name).write_text(text)
    program, option = checker
    line = [sys.executable, "-m", program, option, str(installed), *files]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True)
    found = re.findall(r"(\w+\.py):(\d+).*\berror\b", done.stdout)
    calls = [n for n, text in enumerate(WRONG.splitlines(), 1) if "(" in text]
    assert found == [("wrong.py", str(n)) for n in calls], done.stdout + done.stderr
