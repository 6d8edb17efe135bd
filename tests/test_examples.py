"""The examples, run as users run them: each in a process of its own."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest

from octavo.optim.checkpoint.__main__ import main as checkpoint_main

EXAMPLES = Path(__file__).parents[1] / "examples"
STEPS = 10
TINY = (
    f"--steps {STEPS} --width 32 --layers 2 --heads 2 --batch-size 4 --length 32 "
    "--eval-every 5 --checkpoint-every 5"
).split()


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Without the compilation cache, most of the time would go to compiling again."""
    cache = tmp_path_factory.mktemp("compiled")
    return {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


def command(*arguments: object) -> list[str]:
    """The example's command line."""
    return [sys.executable, str(EXAMPLES / "train_lm.py"), *map(str, arguments)]


def run(line: list[str], environment: dict[str, str]) -> str:
    """What a command that succeeds prints."""
    done = subprocess.run(line, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def history(out: Path) -> dict[str, list]:
    """The losses in the last checkpoint."""
    return json.loads((out / str(STEPS) / "log" / "metadata").read_text())["history"]


def arrays(out: Path) -> dict[str, np.ndarray]:
    """Everything in the last checkpoint's state, by path."""
    tree = ocp.StandardCheckpointer().restore(out / str(STEPS) / "state")
    leaves = ocp.tree.to_flat_dict(tree, sep="/")
    return {path: np.asarray(leaf) for path, leaf in leaves.items()}


def assert_same_bits(a: Path, b: Path) -> None:
    """Equal losses, parameters, codes, scales and counts."""
    assert history(a) == history(b)
    left, right = arrays(a), arrays(b)
    assert left.keys() == right.keys()
    assert any(leaf.dtype == np.int8 for leaf in left.values())
    for path, leaf in left.items():
        assert leaf.dtype == right[path].dtype
        assert leaf.tobytes() == right[path].tobytes(), path


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]
) -> tuple[Path, str]:
    """A run that nothing interrupts, and what it printed."""
    out = tmp_path_factory.mktemp("trained")
    return out, run(command(*TINY, "--out", out), environment)


def test_trains(trained: tuple[Path, str]) -> None:
    out, printed = trained
    losses = history(out)
    assert len(losses["train"]) == STEPS
    assert [step for step, _ in losses["held_out"]] == [5, STEPS]
    assert np.mean(losses["train"][-3:]) < np.mean(losses["train"][:3]) - 0.5
    assert losses["held_out"][1][1] < losses["held_out"][0][1] < np.log(256)

    final = losses["held_out"][1][1]
    bits = final / np.log(2)
    assert f"held-out loss: {final:.4f} nats, {bits:.4f} bits per byte" in printed
    assert re.search(r"unigram entropy: [23]\.\d+ nats, [34]\.\d+ bits", printed)
    assert re.search(r"10/10 .*loss \d\.\d+, [\d,]+ tokens/s, \d+ ms/step", printed)


def test_resumed_run_equals_uninterrupted(
    trained: tuple[Path, str], environment: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "resumed"
    shutil.copytree(trained[0], out)
    shutil.rmtree(out / str(STEPS))
    printed = run(command(*TINY, "--out", out, "--resume"), environment)
    assert "5/10" in printed and " 4/10" not in printed
    assert_same_bits(trained[0], out)


INTERRUPTED = """
import sys
import train_lm
for steps in (3, 1, 2):
    calls = iter(steps * [False])  # one before each step
    train_lm.Event = type("Stop", (), {"is_set": lambda self: next(calls, True)})
    assert train_lm.main(sys.argv[1:]) == 130
    sys.argv += ["--resume"] * ("--resume" not in sys.argv)
"""


def test_three_interruptions_change_nothing(
    trained: tuple[Path, str], environment: dict[str, str], tmp_path: Path
) -> None:
    """After steps 3, 4 and 6; each time codes, scales and counts are what they were."""
    out = tmp_path / "interrupted"
    program = [sys.executable, "-c", INTERRUPTED, *TINY, "--out", str(out)]
    printed = run(program, environment | {"PYTHONPATH": str(EXAMPLES)})
    assert re.findall(r"stopped at step (\d+)", printed) == ["3", "4", "6"]
    run(command(*TINY, "--out", out, "--resume"), environment)
    assert_same_bits(trained[0], out)
    assert checkpoint_main(["inspect", str(out)]) == 0


def test_ctrl_c_saves_and_says_how_to_resume(
    trained: tuple[Path, str], environment: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "with a space"
    line = command(*TINY, "--out", out)
    pipe = subprocess.PIPE
    with subprocess.Popen(line, env=environment, stdout=pipe, stderr=pipe) as process:
        seen = b""
        while b"0/10" not in seen:
            seen += (byte := process.stderr.read(1))
            assert byte, seen
        process.send_signal(signal.SIGINT)  # just before the first step, or during it
        stdout, stderr = (stream.decode() for stream in process.communicate(timeout=60))
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr
    assert re.search("stopped at step [01], saved in", stdout)
    again = shlex.split(stdout.splitlines()[-1])
    assert again == [*line, "--resume"]
    run(again, environment)
    assert_same_bits(trained[0], out)


def test_resume_refuses_other_options(
    trained: tuple[Path, str], environment: dict[str, str]
) -> None:
    line = command(*TINY, "--out", trained[0], "--resume", "--seed", 1)
    done = subprocess.run(line, env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert "another run's options" in done.stderr


def test_compare_draws_and_prints(environment: dict[str, str], tmp_path: Path) -> None:
    line = command(*TINY, "--out", tmp_path, "--compare", "--seeds", 0, 1)
    printed = run(line, environment)
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")
    row = r"\s+\d\.\d{4}\s+\d\.\d{4}\s+[+-]\d\.\d{4}\n"
    assert re.search(r"seed\s+32bit\s+8bit\s+difference\n", printed)
    assert re.search(rf" 0{row} +1{row} +mean{row}", printed)
    assert "(max - min)" in printed and "(standard deviation)" in printed
    sizes = re.findall(r"optimizer state: .* ([\d.]+) bytes each", printed)
    # A counter, and for each of 22 leaves 18 numbers that say how it is stored.
    others = 4 * (1 + 22 * 18) / 41_760
    assert sizes[0] == f"{8 + others:.2f}"
    assert float(sizes[1]) < 8


def test_weights_are_compared_with_float32(
    environment: dict[str, str], tmp_path: Path
) -> None:
    names = ["nearest", "remainder8"]
    printed = run(command(*TINY, "--out", tmp_path, "--weights", *names), environment)
    assert (tmp_path / "weights.png").read_bytes().startswith(b"\x89PNG")
    losses = r"│ +\d\.\d{4} │ +\d\.\d{4} │ +[+-]\d\.\d{4} │ +"
    sizes = {"float32": "4.00 + 4.00 + 4.08 = 12.08"}
    sizes |= {"nearest": "2.00 + 2.00 + 4.08 = 8.08"}
    sizes |= {"remainder8": "2.00 + 2.00 + 5.08 = 9.08"}
    for name, size in sizes.items():
        assert re.search(rf"│ {name} +{losses}{re.escape(size)} │", printed), printed
    assert "Spread of float32 over 1 seeds" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--optimizer sgdd", r"invalid choice: 'sgdd' \(choose from .*adamw"),
        ("--state 7bit", "unknown state format '7bit'; known are .*'8bit'"),
        ("--steps 0", "0 is not positive"),
        ("--learning-rate nan", "nan is not positive and finite"),
        ("--seed -1", "-1 is negative"),
        ("--width 30", "--width must be a multiple of 2"),
        ("--resume --out does/not/exist", "there is no does/not/exist"),
        ("--compare --state 32bit", "--compare compares --state with 32bit"),
        ("--seeds 0 1", "--seeds is for comparisons"),
        ("--compare --weights nearest", "--weights A B compares weights"),
        ("--weights nearby", r"invalid choice: 'nearby' \(choose from .*stochastic"),
    ],
)
def test_bad_arguments(
    arguments: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    import train_lm

    with pytest.raises(SystemExit) as error:
        train_lm.main(arguments.split())
    assert error.value.code == 2
    assert re.search(message, capsys.readouterr().err)
