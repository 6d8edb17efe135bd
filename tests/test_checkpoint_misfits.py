"""What a checkpoint does not fit: refused with a remedy, or converted on request."""

import shutil
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
import pytest
from flax.training import train_state

from octavo import optim
from octavo.optim import checkpoint
from octavo.optim.storage.table import records_of

from bits import assert_same_bits, moments
from runs import (
    MATRICES,
    TX,
    fresh,
    random,
    run,
    saved,
    shapes,
    step,
    trained,
    ulps,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of `run()`."""
    return saved(tmp_path_factory.mktemp("saved"), run())


class Other(NamedTuple):
    """What a checkpoint of `run()` does not fit, and what is said of it.

    Attributes:
      tx: the optimizer.
      message: names the first path that differs, and the remedy.
      params: those of the target.
      converts: whether `convert=True` takes it.
    """

    tx: Any
    message: str
    params: Any = None
    converts: bool = True


def _stored(was: str, wants: str, path: str = "embed") -> str:
    return (
        rf"'opt_state/mu/{path}' is stored as {was}, but the optimizer stores "
        rf"{wants}; make the optimizer with the same options, or pass convert=True"
    )


def _bf16(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree)


RATIO8 = "ratio8 in blocks of 32 along axis 0"
MADE = {  # a state with the same moments that is stored otherwise
    "32 bits": Other(
        optim.adamw(1e-2, state="32bit"), _stored(RATIO8, r"32bit \(float32\)")
    ),
    "bf16": Other(
        optim.adamw(1e-2, state="bf16"), _stored(RATIO8, r"bf16 \(bfloat16\)")
    ),
    "dynamic8": Other(
        optim.adamw(1e-2, state="dynamic8"),
        _stored(RATIO8, "dynamic8 in blocks of 32 along axis 0"),
    ),
    "one leaf": Other(
        optim.adamw(1e-2, state=lambda path: "32bit" if "kernel" in path else "8bit"),
        _stored("ratio8 in blocks of 4 along axis 0", "32bit .*", "layer/kernel"),
    ),
    "block size": Other(
        optim.adamw(1e-2, block_size=16),
        _stored(RATIO8, "ratio8 in blocks of 16 along axis 0"),
    ),
    "block axis": Other(
        optim.adamw(1e-2, block_axis=lambda path: -1 if path == "embed" else None),
        _stored(RATIO8, "ratio8 in blocks of 4 along axis 1"),
    ),
    "options": Other(
        optim.adamw(1e-2, skip_nonfinite=True),
        "'opt_state/extra/skipped' does not fit: .* or convert=True, which starts it",
    ),
    "seed": Other(
        optim.adamw(1e-2, seed=1),
        "was saved with seed=0, but the optimizer has seed=1: .* or convert=True",
    ),
    "chain": Other(
        optax.chain(optax.clip(1.0), optim.adamw(1e-2)),
        "'opt_state/1' has no moments mu, nu, but 'opt_state' has; convert=True takes",
    ),
}
OTHERS = {
    **MADE,
    "types of parameters": Other(
        TX,
        "'params/embed' has type float32, but the target's is bfloat16; convert=True",
        _bf16(random(0)),
    ),
    "another optimizer": Other(
        optim.lars(1e-2),
        "'opt_state' was saved by an optimizer with mu, nu, but this one has trace; "
        r"use that optimizer, or only=\['params'\]",
        converts=False,
    ),
    "optax": Other(
        optax.adamw(1e-2),
        "'opt_state/0/count' is not in the checkpoint",
        converts=False,
    ),
    "a new leaf": Other(
        TX,
        "'params/head' is not in the checkpoint; partial=True keeps",
        {**random(0), "head": jnp.ones((64, 96))},
        converts=False,
    ),
    "a leaf less": Other(
        TX,
        "'params/embed' is not in the target; partial=True leaves it out",
        {"layer": random(0)["layer"]},
        converts=False,
    ),
    "other sizes": Other(
        TX,
        r"'params/embed' has shape \(512, 64\), but the target's is \(500, 64\); .* "
        "another name and pass partial=True",
        {**random(0), "embed": jnp.ones((500, 64))},
        converts=False,
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_does_not_fit_is_refused(name: str, folder: Path) -> None:
    other = OTHERS[name]
    target = fresh(other.tx, other.params)
    with pytest.raises(checkpoint.CheckpointError, match=other.message):
        checkpoint.restore(folder, other.tx, target)
    if not other.converts:
        with pytest.raises(checkpoint.CheckpointError, match=other.message):
            checkpoint.restore(folder, other.tx, target, convert=True)


@pytest.mark.parametrize("name", MADE)
def test_conversion(name: str, folder: Path) -> None:
    tx = MADE[name].tx
    got = checkpoint.restore(folder, tx, shapes(fresh(tx)), convert=True)
    assert_same_bits(got.params, run().params)
    assert got.step == 3
    mine, old = fresh(tx).opt_state, run().opt_state
    if name == "chain":
        assert_same_bits(got.opt_state, (mine[0], old))
        return
    anew = optim.requantize(mine, optim.dequantize(old), old.count)
    for slot in ("mu", "nu"):
        for path, how in records_of(mine).items():
            source = old if how == records_of(old)[path] else anew
            assert_same_bits(
                moment(got.opt_state, slot, path), moment(source, slot, path)
            )
    assert got.opt_state.count == 3
    step(got, random(0))


def moment(state: optim.State, slot: str, path: str) -> tuple[Any, Any]:
    """Codes and scales of one leaf; no scales where they are not used."""
    codes, scales = getattr(state, slot), getattr(state, f"{slot}_scale", None)
    for part in path.split("/"):
        codes, scales = codes[part], None if scales is None else scales[part]
    return codes, scales if codes.dtype == jnp.int8 else None


def test_conversion_of_parameters(folder: Path) -> None:
    with pytest.warns(UserWarning, match="converting 3 .* loses up to half a unit"):
        got = checkpoint.restore(folder, TX, fresh(TX, _bf16(random(0))), convert=True)
    assert_same_bits(got.params, _bf16(run().params))
    assert_same_bits(got.opt_state, run().opt_state)


def test_there_and_back(folder: Path, tmp_path: Path) -> None:
    """From 8 bits to 32 nothing is lost; back, moments are rounded once."""
    tx = MADE["32 bits"].tx
    wide = checkpoint.restore(folder, tx, fresh(tx), convert=True)
    assert_same_bits(moments(wide.opt_state), optim.dequantize(run().opt_state))
    back = checkpoint.restore(saved(tmp_path, wide), TX, fresh(TX), convert=True)
    expected = optim.requantize(run().opt_state, moments(wide.opt_state))
    assert_same_bits(back.opt_state, expected)
    # The next step, too, but that two programs round differently.
    assert ulps(trained(wide, 1).params, trained(run(), 1).params, run().params) <= 2


@pytest.mark.parametrize("slot", ["mu", "nu"])
def test_one_moment_of_two(slot: str, folder: Path) -> None:
    """The first is stored relative to the second, whichever of them is converted."""
    kept = {"mu": "nu", "nu": "mu"}[slot]
    tx = optim.adamw(1e-2, state={slot: "32bit", kept: "8bit"})
    got = checkpoint.restore(folder, tx, fresh(tx), convert=True).opt_state
    old = run().opt_state
    for name in (kept, f"{kept}_scale"):
        assert_same_bits(getattr(got, name), getattr(old, name))
    assert_same_bits(optim.dequantize(got), optim.dequantize(old))


RATE = optax.linear_schedule(1e-2, 0.0, 100)
FROM_OPTAX = {
    "adam": (optax.adam(1e-2), optim.adam(1e-2)),
    "adamw": (optax.adamw(RATE, mask=MATRICES), optim.adamw(RATE, mask=MATRICES)),
    "lamb": (optax.lamb(RATE), optim.lamb(RATE)),
    "lars": (optax.lars(RATE), optim.lars(RATE)),
    "in 32 bits": (optax.lars(RATE), optim.lars(RATE, state="32bit")),
    "chain": (
        optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2)),
        optim.adam(1e-2, grad_clip_norm=1.0),
    ),
    "to a chain": (
        optax.chain(optax.clip(1.0), optax.adam(1e-2)),
        optax.chain(optax.clip(1.0), optim.adam(1e-2)),
    ),
    "masked": (
        optax.masked(optax.adam(1e-2), MATRICES),
        optax.masked(optim.adam(1e-2), MATRICES),
    ),
    "inject_hyperparams": (
        optax.inject_hyperparams(optax.adam)(1e-2),
        optim.adam(1e-2, percentile_clipping=5, record_norms=True),
    ),
}


@pytest.mark.parametrize("name", FROM_OPTAX)
def test_from_optax(name: str, tmp_path: Path) -> None:
    theirs, ours = FROM_OPTAX[name]
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        state = train_state.TrainState.create(
            apply_fn=None, params=random(0), tx=theirs
        )
        for k in range(2):
            state = state.apply_gradients(grads=random(k))
    folder = saved(tmp_path, state)
    for in_part in (False, True):
        with pytest.raises(checkpoint.CheckpointError, match=r"but '.*' has; convert"):
            checkpoint.restore(folder, ours, fresh(ours), partial=in_part)
    got = checkpoint.restore(folder, ours, fresh(ours), convert=True)
    assert_same_bits(got.params, state.params)
    assert got.step == 2

    def own(opt_state: Any) -> optim.State:
        nodes = jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, optim.State))
        return next(x for x in nodes if isinstance(x, optim.State))

    expected = optim.from_optax(own(fresh(ours).opt_state), state.opt_state)
    assert_same_bits(own(got.opt_state), expected)
    step(got, random(2))


def test_nothing_there(tmp_path: Path, folder: Path) -> None:
    def restore(where: Any, **options: Any) -> None:
        checkpoint.restore(where, TX, fresh(TX), **options)

    with pytest.raises(FileNotFoundError, match="gone: there is no such folder"):
        restore(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match="no complete step; save one with"):
        restore(str(tmp_path))
    with (
        ocp.CheckpointManager(tmp_path) as manager,
        pytest.raises(FileNotFoundError, match="no complete step; save one with"),
    ):
        restore(manager)
    with pytest.raises(FileNotFoundError, match=r"no step 4; there are \[3\]"):
        restore(folder, step=4)
    with pytest.raises(ValueError, match=r"only=\['model'\]: the target has opt_state"):
        restore(folder, only=["model"])
    with ocp.CheckpointManager(tmp_path / "items") as manager:
        args = {"model": ocp.args.StandardSave(random(0))}
        manager.save(1, args=ocp.args.Composite(**args))
    with pytest.raises(
        checkpoint.CheckpointError, match=r"no item called state .* but model; give"
    ):
        restore(tmp_path / "items")


@pytest.mark.parametrize("version", [0, 2])
def test_description_of_another_version(
    version: int, folder: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    file = copy / "3" / "octavo" / "metadata"
    text = file.read_text()
    file.write_text(text.replace('"description": 1', f'"description": {version}'))
    with pytest.raises(
        checkpoint.CheckpointError,
        match=rf"version {version} \(of Octavo \d.*\), but this Octavo reads version 1"
        ": restore with that one and save again",
    ):
        checkpoint.restore(copy, TX, fresh(TX))


def test_items_of_this_modules_names(tmp_path: Path) -> None:
    with ocp.CheckpointManager(tmp_path) as manager:
        with pytest.raises(
            ValueError, match="the item 'octavo' is this function's own"
        ):
            checkpoint.save(manager, 1, run(), octavo=ocp.args.JsonSave({}))
        with pytest.raises(ValueError, match="'name' is 'x', not an array"):
            checkpoint.save(manager, 1, {"params": random(0), "name": "x"})
        zeros = jax.tree.map(jnp.zeros_like, run())
        with pytest.raises(ValueError, match="'embed': the state does not say"):
            checkpoint.save(manager, 1, zeros)
        assert not manager.all_steps()


def test_the_manager_decides(tmp_path: Path) -> None:
    """Which steps to save, and to keep, and what their folders are called."""
    options = ocp.CheckpointManagerOptions(
        save_interval_steps=2,
        step_prefix="at",
        step_format_fixed_length=5,
        best_fn=lambda metrics: metrics["accuracy"],
        max_to_keep=1,
    )
    (tmp_path / "notes-2").mkdir()
    with ocp.CheckpointManager(tmp_path, options=options) as manager:
        save = partial(checkpoint.save, manager, train_state=run())
        assert save(2, metrics={"accuracy": 0.9})
        assert not save(3, metrics={"accuracy": 0.8})
        assert save(3, metrics={"accuracy": 0.8}, force=True)
        assert_same_bits(checkpoint.restore(manager, TX, fresh(TX), step=2), run())
        assert manager.all_steps() == [2]
        assert (tmp_path / "at_00002").is_dir()


def test_more_items(tmp_path: Path) -> None:
    saved(tmp_path, run(), log=ocp.args.JsonSave({"loss": [1.0]}))
    with ocp.CheckpointManager(tmp_path) as manager:
        args = ocp.args.Composite(log=ocp.args.JsonRestore())
        assert manager.restore(3, args=args)["log"] == {"loss": [1.0]}
        assert_same_bits(checkpoint.restore(manager, TX, fresh(TX)), run())
