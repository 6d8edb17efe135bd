"""Everything that docs/schedules.md shows runs, and gives what it shows."""

import ast
import doctest
import importlib
import inspect
import pkgutil
import re
import runpy
import shlex
from pathlib import Path

import pytest

from octavo import schedules
from octavo.schedules.__main__ import main
from octavo.schedules.base import REGISTRY

DOCS = Path(__file__).parent.parent / "docs"
TEXT = (DOCS / "schedules.md").read_text(encoding="utf-8")
IMAGES = re.findall(r"\]\((img/[^)]+)\)", TEXT)
BUILD = "python docs/build_schedules.py"
LARGEST = 60_000


def commands() -> list[tuple[str, str]]:
    """The commands of the console blocks, each with what it prints."""
    blocks = re.findall(r"```console\n(.*?)```", TEXT, re.DOTALL)
    parts = "".join(blocks).split("$ ")[1:]
    return [tuple(part.split("\n", maxsplit=1)) for part in parts]


def test_snippets_run() -> None:
    path = str(DOCS / "schedules.md")
    failed, tried = doctest.testfile(path, module_relative=False, encoding="utf-8")
    assert tried > 20 and failed == 0


def test_there_are_commands() -> None:
    assert len(commands()) == 3


@pytest.mark.parametrize(
    ("command", "printed"),
    [pair for pair in commands() if pair[0] != BUILD],
    ids=["sparkline", "picture"],
)
def test_commands_print_what_is_shown(
    command: str,
    printed: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    program, module, name, *arguments = shlex.split(command)
    assert [program, module, name] == ["python", "-m", "octavo.schedules"]
    assert main(arguments) == 0
    assert capsys.readouterr().out == printed


def test_the_build_draws_the_pictures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert BUILD in [command for command, _ in commands()]
    files = runpy.run_path(str(DOCS / "build_schedules.py"))["build"](tmp_path)
    assert {f"img/{file.name}" for file in files} == set(IMAGES)
    for file in files:
        assert 5_000 < file.stat().st_size < LARGEST


def test_pictures_are_there_and_small() -> None:
    present = {f"img/{file.name}" for file in (DOCS / "img").glob("schedules-*")}
    assert present == set(IMAGES)
    assert all((DOCS / image).stat().st_size < LARGEST for image in IMAGES)


@pytest.mark.parametrize("name", [*REGISTRY, "ReduceLROnPlateau", "scale_lr"])
def test_every_signature_is_the_one_shown(name: str) -> None:
    shown = re.search(rf"`({name}\([^`]*\))`", TEXT)
    assert shown, f"{name} is missing"
    call = ast.parse(shown[1], mode="eval").body
    assert isinstance(call, ast.Call)
    required = {
        ast.unparse(argument): inspect.Parameter.empty for argument in call.args
    }
    defaults = {key.arg: eval(ast.unparse(key.value)) for key in call.keywords}
    parameters = inspect.signature(getattr(schedules, name)).parameters
    actual = {key: parameter.default for key, parameter in parameters.items()}
    if name == "PolynomialLR":
        # Either of two names, so that neither is required by itself.
        assert actual.pop("total_iters") is actual["total_steps"] is None
        actual["total_steps"] = inspect.Parameter.empty
    assert list({**required, **defaults}.items()) == list(actual.items())


def test_docstrings_run() -> None:
    for module in pkgutil.iter_modules(schedules.__path__, "octavo.schedules."):
        failed, _ = doctest.testmod(importlib.import_module(module.name))
        assert failed == 0, module.name


def test_every_public_object_has_an_example() -> None:
    public = [getattr(schedules, name) for name in dir(schedules) if name[0] != "_"]
    for item in public:
        if callable(item) and item is not schedules.PlateauState:
            assert ">>> " in (item.__doc__ or ""), item
