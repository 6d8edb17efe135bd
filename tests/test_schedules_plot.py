"""Pictures of schedules, from Python and from the command line."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import optax
import pytest

from octavo import schedules
from octavo.schedules.__main__ import main

POLYNOMIAL = "PolynomialLR(2e-3, total_steps=10000, warmup_steps=1000)"
PNG = b"\x89PNG"


def test_plot_draws_each_schedule() -> None:
    pytest.importorskip("matplotlib")
    curves = [schedules.StepLR(0.1, 30), optax.linear_schedule(0.1, 0.0, 100)]
    figure = schedules.plot(curves, 100, labels=["steps", "line"])
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "steps",
        "line",
    ]
    where, rates = axes.lines[0].get_data()
    np.testing.assert_array_equal(where, np.arange(101))
    np.testing.assert_allclose(rates, curves[0](np.arange(101)))


def test_plot_of_long_runs_picks_steps(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "lr.png"
    figure = schedules.plot(schedules.parse(POLYNOMIAL), 10_000_000, path=path)
    where, _ = figure.axes[0].lines[0].get_data()
    assert len(where) == 4000 and where[0] == 0 and where[-1] == 10_000_000
    assert path.read_bytes().startswith(PNG)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (([], 10), {}, "no schedule"),
        ((schedules.StepLR(0.1, 3), 0), {}, "steps=0 .*from 1"),
        ((schedules.StepLR(0.1, 3), 9), {"labels": ["a", "b"]}, "1 schedules and 2"),
    ],
    ids=["none", "no-steps", "labels"],
)
def test_plot_refuses(arguments, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        schedules.plot(*arguments, **options)


def test_plot_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="sparkline"):
        schedules.plot(schedules.StepLR(0.1, 3), 10)


def test_sparkline() -> None:
    assert schedules.sparkline(schedules.WarmupLR(0.1, 7), 7) == "▁▂▃▄▅▆▇█"
    assert schedules.sparkline(schedules.WarmupLR(0.1, 0), 100, width=5) == "▁" * 5
    with pytest.raises(ValueError, match="width=0"):
        schedules.sparkline(schedules.WarmupLR(0.1, 7), 7, width=0)


def test_command_prints_a_sparkline(capsys: pytest.CaptureFixture[str]) -> None:
    nested = "SequentialLR([WarmupLR(0.1, 5), StepLR(0.1, 5)], [5])"
    assert main([POLYNOMIAL, nested, "--steps", "10000"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6
    assert lines[0].startswith("PolynomialLR(base_lr=0.002, total_steps=10000")
    assert len(lines[1]) == 60
    assert lines[2] == "step 0: 0   step 10000: 0   highest: 0.002 at step 1000"


def test_command_writes_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "lr.png"
    assert main([POLYNOMIAL, "--steps", "10000", "--out", str(path)]) == 0
    assert path.read_bytes().startswith(PNG)


@pytest.mark.parametrize(
    "arguments",
    [
        ["open('x')", "--steps", "10"],
        ["StepLR(0.1, 0)", "--steps", "10"],
        ["StepLR(0.1, 3)", "--steps", "0"],
        ["StepLR(0.1, 3)", "--steps", "9", "--out", "no/such/folder/lr.png"],
    ],
    ids=["name", "argument", "steps", "folder"],
)
def test_command_reports_errors(arguments, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("error: ")
    assert "Traceback" not in printed.err


def test_command_as_a_program() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "octavo.schedules", POLYNOMIAL, "--steps", "10000"],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert done.stdout.startswith("PolynomialLR(")
