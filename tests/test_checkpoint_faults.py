"""What happens to checkpoints when processes die and files change."""

import gc
import json
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from octavo import optim
from octavo.optim import checkpoint
from octavo.optim.checkpoint.__main__ import main

from bits import assert_same_bits

pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)
KILLED = Path(__file__).parent / "killed.py"
KILLS = CORRUPTIONS = 20


@pytest.fixture(autouse=True)
def collected() -> Iterator[None]:
    """The reads that Orbax abandons when one fails complain when they are collected."""
    yield
    gc.collect()


def last(folder: Path) -> dict[str, Any]:
    """The arrays of the newest step, as Orbax reads them."""
    with ocp.CheckpointManager(folder) as manager:
        step = manager.latest_step()
        args = ocp.args.Composite(state=ocp.args.StandardRestore())
        return {"step": step, **manager.restore(step, args=args)["state"]}


@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_killed_twenty_times(tmp_path: Path) -> None:
    """Every restart finds the newest complete step; the end is that of a quiet run."""
    command = [sys.executable, str(KILLED), str(tmp_path), str(KILLS), "0"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kills = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(kills) == KILLS
    restarts = [kill for kill in kills if kill["restored"] is not None]
    assert len(restarts) >= KILLS / 2  # others were killed before
    assert all(kill["restored"] == kill["found"] for kill in restarts)
    assert len({kill["found"] for kill in kills}) > 3  # it gets on, all the same
    assert sum(kill["unfinished"] > 0 for kill in kills) > 3  # some while it saves
    assert_same_bits(last(tmp_path / "killed"), last(tmp_path / "whole"))


@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_killed_with_state_in_host_memory(tmp_path: Path) -> None:
    """It resumes there, with one program, and ends where a quiet run does."""
    command = [sys.executable, str(KILLED), str(tmp_path), "1", "0", "paged"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kill, end = (json.loads(line) for line in done.stdout.splitlines())
    assert kill["restored"] == 0
    assert 2 <= end["resumed"] < 100
    assert_same_bits(last(tmp_path / "killed"), last(tmp_path / "whole"))


@pytest.fixture(scope="module")
def state() -> optim.TrainState:
    """Something to save, and the target to restore it into."""
    rng = np.random.default_rng(0)
    shapes = {"kernel": (128, 64), "bias": (64,)}
    params = {k: jnp.asarray(rng.normal(size=s), "float32") for k, s in shapes.items()}
    fresh = optim.TrainState.create(
        apply_fn=None, params=params, tx=optim.adamw(1e-2, skip_nonfinite=True)
    )
    return jax.jit(lambda s: s.apply_gradients(grads=s.params))(fresh)


@pytest.fixture(scope="module")
def saved(state: optim.TrainState, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with steps 1 and 2."""
    folder = tmp_path_factory.mktemp("saved")
    with ocp.CheckpointManager(folder) as manager:
        for step in (1, 2):
            checkpoint.save(manager, step, state)
    return folder


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    """A copy of it, to damage."""
    return shutil.copytree(saved, tmp_path / "copy")


def corrupt(folder: Path, chance: random.Random) -> None:
    """Flip bytes of a random file, or cut it off."""
    file = chance.choice(sorted(f for f in folder.rglob("*") if f.is_file()))
    content = bytearray(file.read_bytes())
    if chance.random() < 0.3:
        del content[chance.randrange(len(content)) :]
    else:
        for _ in range(chance.choice([1, 1, 4])):
            content[chance.randrange(len(content))] ^= chance.randrange(1, 256)
    file.write_bytes(content)


@pytest.mark.parametrize("seed", range(CORRUPTIONS))
def test_corruption_is_found_or_harmless(
    seed: int, state: optim.TrainState, copy: Path
) -> None:
    corrupt(copy / "2", random.Random(seed))
    try:
        restored = checkpoint.restore(copy, state.tx, state)
    except checkpoint.CheckpointError as error:
        # Once in some 10,000 times it is the version that changes.
        assert re.search("step=1 is the newest other one|has version", str(error))
        assert main(["inspect", str(copy)]) == 1
        restored = checkpoint.restore(copy, state.tx, state, step=1)
    assert_same_bits(restored, state)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("octavo/metadata", "its description cannot be read"),
        ("state/_METADATA", "its metadata cannot be read"),
        ("state/manifest.ocdbt", "its metadata cannot be read"),
        ("state", "its arrays are gone"),
    ],
)
def test_what_is_gone_is_found(
    file: str, message: str, state: optim.TrainState, copy: Path
) -> None:
    gone = copy / "2" / file
    shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    with pytest.raises(checkpoint.DamagedCheckpointError, match=message):
        checkpoint.restore(copy, state.tx, state)


def test_checksums_find_what_the_files_do_not_tell(
    state: optim.TrainState, copy: Path
) -> None:
    """Arrays of another run, whole and well, in the place of this one's."""
    other = state.replace(params=jax.tree.map(jnp.negative, state.params))
    with ocp.CheckpointManager(copy.parent / "other") as manager:
        checkpoint.save(manager, 2, other)
    shutil.rmtree(copy / "2" / "state")
    shutil.copytree(copy.parent / "other" / "2" / "state", copy / "2" / "state")
    with pytest.raises(checkpoint.DamagedCheckpointError, match="'params/bias' is not"):
        checkpoint.restore(copy, state.tx, state)
    restored = checkpoint.restore(copy, state.tx, state, verify=False)
    assert_same_bits(restored, other)


def test_changed_description_is_found(state: optim.TrainState, copy: Path) -> None:
    file = copy / "2" / "octavo" / "metadata"
    file.write_text(file.read_text().replace('"seed": 0', '"seed": 1'))
    assert '"seed": 1' in file.read_text()
    with pytest.raises(
        checkpoint.DamagedCheckpointError, match="its description is not the one"
    ):
        checkpoint.restore(copy, state.tx, state)
