"""The large-batch example, run as users run it: in a process of its own."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib import image

EXAMPLES = Path(__file__).parents[1] / "examples"
EPOCHS, BATCHES = 2, (64, 128)
KERNELS = {f"Dense_{i}/kernel" for i in range(4)}


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A tiny comparison's folder, and what it printed."""
    out = tmp_path_factory.mktemp("large_batch") / "new"
    arguments = f"--epochs {EPOCHS} --batches 128 64 --seeds 3 --out".split()
    line = [sys.executable, str(EXAMPLES / "large_batch.py"), *arguments, str(out)]
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(line, env=environment, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    return out, done.stdout


@pytest.fixture(scope="module")
def runs(example: tuple[Path, str]) -> dict[tuple[str, int], dict]:
    """The numbers that it wrote, by optimizer and batch."""
    results = json.loads((example[0] / "results.json").read_text())
    return {(run["optimizer"], run["batch"]): run for run in results["runs"]}


def test_prints_what_it_wrote(
    example: tuple[Path, str], runs: dict[tuple[str, int], dict]
) -> None:
    names = ("LAMB 32-bit", "LAMB 8-bit", "AdamW 8-bit")
    head = r"\s+.\s+".join(("batch", "steps", "warmup epochs", *names))
    assert re.search(head, example[1])
    for batch, steps, warmup in ((64, 40, "0"), (128, 20, "0")):
        end = [f"{100 * runs[name, batch]['accuracy'][-1]:.2f}" for name in names]
        row = (str(batch), str(steps), warmup, *map(re.escape, end))
        assert re.search(r"│\s+" + r"\s+│\s+".join(row) + r"\s+│", example[1])
    for kernel in KERNELS:
        assert re.search(rf"│ {kernel} +│ +\d+\.\d\d │ +\d+\.\d\d │", example[1])


def test_every_run_is_complete(runs: dict[tuple[str, int], dict]) -> None:
    assert len(runs) == 3 * len(BATCHES)
    points = EPOCHS * 1280 // max(BATCHES)
    for (optimizer, batch), run in runs.items():
        assert run["seed"] == 3
        assert run["steps"] == EPOCHS * 1280 // batch
        assert len(run["loss"]) == len(run["accuracy"]) == points
        assert run["loss"][-1] < run["loss"][0]
        assert run["ratios"].keys() == KERNELS
        ratios = np.array(list(run["ratios"].values()))
        assert ratios.shape == (4, points)
        assert np.all(ratios > 0)
        assert np.all(ratios == 1) == (optimizer == "AdamW 8-bit")


def test_rate_follows_the_root_of_the_batch(
    runs: dict[tuple[str, int], dict],
) -> None:
    for optimizer in {optimizer for optimizer, _ in runs}:
        small, large = (runs[optimizer, batch]["learning_rate"] for batch in BATCHES)
        assert large == pytest.approx(small * 2**0.5)


def test_batches_start_alike(runs: dict[tuple[str, int], dict]) -> None:
    """Same seed, same parameters; and both states have equal first steps.

    The first point of batch 128 is its first step, before which nothing is quantized.
    """
    eight, full = (runs[f"LAMB {bits}-bit", 128] for bits in (8, 32))
    assert eight["loss"][0] == pytest.approx(full["loss"][0], rel=1e-6)
    for kernel in KERNELS:
        a, b = (run["ratios"][kernel][0] for run in (eight, full))
        assert a == pytest.approx(b, rel=1e-5)


@pytest.mark.parametrize("name", ["accuracy.png", "ratios.png"])
def test_draws(example: tuple[Path, str], name: str) -> None:
    pixels = image.imread(example[0] / name)[..., :3]
    height, width, _ = pixels.shape
    assert height > 300 and width > 800
    blue = pixels[..., 2] - pixels[..., 0] > 0.15
    orange = pixels[..., 0] - pixels[..., 2] > 0.5
    for color in (blue, orange):  # curves in the left and in the right half
        assert color[:, : width // 2].sum() > 100 < color[:, width // 2 :].sum()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--epochs 0", "0 is not positive"),
        ("--seeds -1", "-1 is not between 0 and"),
        ("--batches 48 64", "each must divide the largest, 64"),
        ("--epochs 1 --batches 1024", "two batches of 1024 take more examples"),
    ],
)
def test_bad_arguments(
    arguments: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    import large_batch

    with pytest.raises(SystemExit) as error:
        large_batch.main(arguments.split())
    assert error.value.code == 2
    assert re.search(message, capsys.readouterr().err)
