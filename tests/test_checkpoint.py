"""Checkpoints through Orbax alone and through Octavo: whole, in part, inspected."""

import json
import re
import runpy
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
import pytest
from flax import linen as nn
from flax import nnx
from flax.training import train_state
from orbax.checkpoint.experimental import v1

from octavo import optim
from octavo.optim import checkpoint
from octavo.optim.checkpoint.__main__ import main

from bits import assert_same_bits
from runs import MATRICES, TX, fresh, random, run, saved, shapes, step


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of `run()`."""
    return saved(tmp_path_factory.mktemp("saved"), run())


# ------------------------------------------------------------------------- Orbax alone


def _manager(folder: Path, tree: Any, target: Any, save: Any, restore: Any) -> Any:
    with ocp.CheckpointManager(folder) as manager:
        manager.save(3, args=save(tree))
        manager.wait_until_finished()
        return manager.restore(3, args=restore(target))


def _pytrees(folder: Path, tree: Any, target: Any) -> Any:
    args = ocp.checkpoint_utils.construct_restore_args(target)
    restore = partial(ocp.args.PyTreeRestore, restore_args=args)
    return _manager(folder, tree, target, ocp.args.PyTreeSave, restore)


def _item(folder: Path, tree: Any, target: Any) -> Any:
    with ocp.CheckpointManager(folder) as manager:
        manager.save(3, args=ocp.args.Composite(state=ocp.args.StandardSave(tree)))
        manager.wait_until_finished()
        args = ocp.args.Composite(state=ocp.args.StandardRestore(target))
        return manager.restore(3, args=args)["state"]


def _checkpointer(folder: Path, tree: Any, target: Any) -> Any:
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "3", tree)
        checkpointer.wait_until_finished()
        return checkpointer.restore(folder / "3", target)


def _pytree(folder: Path, tree: Any, target: Any) -> Any:
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(folder / "3", tree)
        args = ocp.checkpoint_utils.construct_restore_args(target)
        return checkpointer.restore(folder / "3", item=target, restore_args=args)


def _v1(folder: Path, tree: Any, target: Any) -> Any:
    v1.save(folder / "3", tree)
    return v1.load(folder / "3", target)


def _v1_training(folder: Path, tree: Any, target: Any) -> Any:
    with v1.training.Checkpointer(folder) as checkpointer:
        checkpointer.save_async(3, tree).result()
        return checkpointer.load(3, target)


ORBAX = {
    "manager": partial(
        _manager, save=ocp.args.StandardSave, restore=ocp.args.StandardRestore
    ),
    "manager, PyTree": _pytrees,
    "manager, item": _item,
    "StandardCheckpointer": _checkpointer,
    "PyTreeCheckpointer": _pytree,
    "v1": _v1,
    "v1, training": _v1_training,
}


@pytest.mark.parametrize("how", ORBAX)
def test_orbax_alone(how: str, tmp_path: Path) -> None:
    """Also where Octavo restores it then, without checks."""
    restored = ORBAX[how](tmp_path, run(), shapes(run()))
    assert_same_bits(restored, run())
    if "manager" in how or "training" in how:
        assert_same_bits(checkpoint.restore(tmp_path, TX, fresh(TX)), run())


# ------------------------------------------------------------------- targets and parts


def test_targets(folder: Path) -> None:
    """Arrays of any values, or shapes; parameters alone make a TrainState."""
    zeros = jax.tree.map(jnp.zeros_like, run())
    for target in (fresh(TX), zeros, shapes(run()), random(1), shapes(random(1))):
        restored = checkpoint.restore(folder, TX, target)
        assert isinstance(restored, optim.TrainState)
        assert_same_bits(restored.replace(tx=TX), run())
    with ocp.CheckpointManager(folder) as manager:
        for place in (manager, manager.directory, str(folder)):
            assert_same_bits(checkpoint.restore(place, TX, fresh(TX)), run())


def test_parameters_or_state_alone(folder: Path, tmp_path: Path) -> None:
    target = fresh(TX, random(7))
    got = checkpoint.restore(folder, TX, target, only=["params"])
    assert_same_bits(got, target.replace(params=run().params))
    got = checkpoint.restore(folder, TX, target, only=["opt_state", "step"])
    assert_same_bits(got, run().replace(params=target.params))
    # The other way round: what was saved alone.
    state = saved(tmp_path / "state", run().opt_state, tx=TX)
    assert_same_bits(checkpoint.restore(state, TX, TX.init(random(0))), run().opt_state)
    params = saved(tmp_path / "params", {"params": run().params})
    got = checkpoint.restore(params, TX, fresh(TX), only=["params"])
    assert_same_bits(got, fresh(TX).replace(params=run().params))


def test_fine_tuning_with_a_fresh_state(folder: Path) -> None:
    """Of another optimizer, with another seed; also where the target is shapes."""
    tx = optim.lars(0.1, seed=5)
    got = checkpoint.restore(folder, tx, fresh(tx), only=["params"])
    assert_same_bits(got.params, run().params)
    assert_same_bits(got.opt_state, tx.init(random(0)))
    target = shapes(fresh(tx)).replace(opt_state=fresh(tx).opt_state, step=0)
    got = checkpoint.restore(folder, tx, target, only=["params"])
    assert_same_bits(got.params, run().params) and got.step == 0


def test_a_new_leaf_and_one_that_is_gone(tmp_path: Path) -> None:
    tx = optim.adamw(1e-2, percentile_clipping=50)
    start = random(0)
    params = {"embed": start["embed"], "old": start["embed"], "z": start["layer"]}
    before = fresh(tx, params)
    before = step(before, before.params)
    folder = saved(tmp_path, before)
    changed = {"embed": start["embed"], "new": jnp.ones((64, 96)), "z": start["layer"]}
    target = fresh(tx, changed)
    got = checkpoint.restore(folder, tx, target, partial=True)

    for kept in ("embed", "z"):
        assert_same_bits(got.params[kept], before.params[kept])
        mine, theirs = got.opt_state.trees, before.opt_state.trees
        for field in mine:
            assert_same_bits(mine[field][kept], theirs[field][kept])
    assert_same_bits(got.params["new"], changed["new"])
    assert_same_bits(got.opt_state.mu["new"], target.opt_state.mu["new"])
    assert got.step == got.opt_state.count == 1
    history = got.opt_state.extra["clip_history"]  # embed, new, z/bias, z/kernel
    old = before.opt_state.extra["clip_history"]  # embed, old, z/bias, z/kernel
    assert_same_bits(history[jnp.array([0, 2, 3])], old[jnp.array([0, 2, 3])])
    assert (history[1] == jnp.inf).all()  # a norm that is not known limits nothing
    moved = step(got, got.params).params["new"] - changed["new"]
    assert (jnp.abs(moved) > 1e-3).all()


# --------------------------------------------------------------------- other libraries


class Model(nn.Module):
    """With metadata of shardings around its kernel."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
        return nn.Dense(128, kernel_init=init)(x)


def _linen(tx: Any) -> Any:
    params = Model().init(jax.random.key(0), jnp.ones((4, 64)))["params"]
    return fresh(tx, params)


def _flax(tx: Any) -> Any:
    return train_state.TrainState.create(apply_fn=None, params=random(0), tx=tx)


def _nnx(tx: Any) -> Any:
    model = nnx.Linear(64, 128, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    return {
        "params": nnx.to_pure_dict(nnx.state(model)),
        "opt_state": nnx.as_pure(optimizer.opt_state),
    }


def _nnx_state(tx: Any) -> Any:
    model = nnx.Linear(64, 128, rngs=nnx.Rngs(0))
    return nnx.state(nnx.Optimizer(model, tx, wrt=nnx.Param))


def _stacked(tx: Any) -> Any:
    params = jax.tree.map(lambda p: jnp.stack([p, p]), random(0))
    return {"params": params, "opt_state": jax.vmap(tx.init)(params)}


TREES = {
    "linen, partitioned": _linen,
    "flax' own TrainState": _flax,
    "nnx, pure": _nnx,
    "nnx": _nnx_state,
    "stacked": _stacked,
    "one array": lambda tx: fresh(tx, jnp.ones((64, 128))),
    "no array": lambda tx: fresh(tx, {}),
    "wrapped": lambda tx: fresh(
        optax.MultiSteps(optax.chain(optax.clip(1.0), optax.masked(tx, MATRICES)), 2)
    ),
}


@pytest.mark.parametrize("name", TREES)
def test_trees(name: str, tmp_path: Path) -> None:
    tree = (
        jax.tree.map(jnp.asarray, TREES[name](TX)) if "flax" not in name else _flax(TX)
    )
    folder = saved(tmp_path, tree)
    assert_same_bits(checkpoint.restore(folder, TX, tree), tree)
    assert main(["inspect", str(folder)]) == 0


# ------------------------------------------------------------------------ command line


def test_inspect(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert f"step 3 in {folder / '3'}" in printed
    assert re.search(r"written by octavo \d.*, jax \d.*; seed 0", printed)
    assert "opt_state: 3 steps, 3 leaves" in printed
    # 512 x 64 codes and a bf16 scale for 32 of them, against 4 bytes each.
    row = r"mu +│ ratio8 +│ 32 along 0 +│ 1 +│ 34.00 KiB +│ 128.00 KiB"
    assert re.search(row, printed)
    assert re.search(r"nu +│ 32bit +│ +│ 1 +│ 1.\d+ KiB +│ 1.00 KiB", printed)
    assert "checksums hold" in printed
    assert main(["inspect", str(folder), "--step", "3", "--no-checksums"]) == 0
    assert "checksums" not in capsys.readouterr().out


def test_sizes_on_disk(folder: Path, tmp_path: Path) -> None:
    """The benchmark that says how large the parts of a checkpoint are."""
    program = Path(__file__).parents[1] / "benchmarks" / "checkpoints.py"
    figures = tmp_path / "figures.json"
    runpy.run_path(str(program))["main"]([str(folder), "--json", str(figures)])
    sizes = json.loads(figures.read_text())
    size = sum(x.nbytes for x in jax.tree.leaves(run().opt_state))
    assert sizes[f"{folder.name} opt_state"]["bytes"] == size
    assert 0 < sizes[f"{folder.name} opt_state"]["on_disk"] < 1.2 * size


def test_inspect_without_a_description(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _item(tmp_path, run(), shapes(run()))
    assert main(["inspect", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "without a description: by Orbax alone" in printed
    assert "no checksums were saved" in printed


def test_inspect_as_a_program(folder: Path, tmp_path: Path) -> None:
    """One line for an error, and no warnings."""
    damaged = shutil.copytree(folder, tmp_path / "damaged")
    for file in damaged.glob("3/state/ocdbt.process_0/d/*"):
        file.write_bytes(bytes(len(file.read_bytes())))
    program = [sys.executable, "-W", "error", "-m", "octavo.optim.checkpoint"]
    for place, code, message in (
        (folder, 0, ""),
        (tmp_path / "gone", 1, "there is no such folder"),
        (damaged, 1, r"is damaged \(there is no other step\): "),
    ):
        done = subprocess.run(
            [*program, "inspect", str(place)], capture_output=True, text=True
        )
        assert done.returncode == code, done.stderr
        assert len(done.stderr.splitlines()) == code
        assert re.search(message, done.stderr)
