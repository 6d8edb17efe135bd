"""Checkpoints between float32 weights and those of 16 bits, with remainders or not."""

import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from octavo import optim
from octavo.optim import checkpoint
from octavo.optim.checkpoint import CheckpointError
from octavo.optim.checkpoint.__main__ import main

SHAPES = {"embed": (128, 64), "bias": (64,)}
KINDS: dict[str, tuple[str | None, Any]] = {
    "float32": (None, jnp.float32),
    "stochastic": ("stochastic", jnp.bfloat16),
    "remainder8": ("remainder8", jnp.bfloat16),
    "remainder16": ("remainder16", jnp.bfloat16),
    "half": ("remainder16", jnp.float16),
}


def random(seed: int, dtype: Any) -> Any:
    """Parameters or gradients, the same in every type but for rounding."""
    rng = np.random.default_rng(seed)
    return {k: jnp.asarray(rng.normal(size=s), dtype) for k, s in SHAPES.items()}


def fresh(kind: str) -> optim.TrainState:
    """A run before its first step."""
    weights, dtype = KINDS[kind]
    tx = optim.adamw(1e-3, weights=weights)
    return optim.TrainState.create(apply_fn=None, params=random(0, dtype), tx=tx)


def saved(kind: str, folder: Path) -> optim.TrainState:
    """A run of two steps, and its checkpoint."""
    run = fresh(kind)
    for seed in (1, 2):
        run = run.apply_gradients(grads=random(seed, KINDS[kind][1]))
    with ocp.CheckpointManager(folder) as manager:
        checkpoint.save(manager, 2, run)
    return run


def masters(run: optim.TrainState) -> Any:
    """The float32 weights that a run stands for."""
    if run.opt_state.remainders is None:
        return jax.tree.map(lambda p: p.astype(jnp.float32), run.params)
    return optim.masters(run.opt_state, run.params)


def apart(a: Any, b: Any) -> float:
    """The largest difference, in parts of the value."""
    found = jax.tree.map(
        lambda x, y: float(np.max(np.abs(x - y) / np.abs(y))), masters(a), masters(b)
    )
    return max(jax.tree.leaves(found))


# From, to, the largest relative difference, and what a warning says of it.
_NONE, _LESS = "half a unit of each: they are rounded to 16 bits", "1/512 of a unit"
CONVERTED = [
    ("float32", "remainder16", 0.0, None),
    ("float32", "remainder8", 2.0**-16, _LESS),
    ("float32", "stochastic", 2.0**-8, _NONE),
    ("float32", "half", 2.0**-24, None),
    ("remainder16", "float32", 0.0, None),
    ("remainder8", "float32", 0.0, None),
    ("half", "float32", 0.0, None),
    ("remainder16", "remainder8", 2.0**-16, _LESS),
    ("remainder8", "remainder16", 0.0, None),
    ("remainder16", "stochastic", 2.0**-8, _NONE),
    ("stochastic", "remainder8", 0.0, None),
]


@pytest.mark.parametrize(("before", "after", "error", "says"), CONVERTED)
def test_conversions_keep_the_weights_and_say_what_they_lose(
    before: str, after: str, error: float, says: str | None, tmp_path: Path
) -> None:
    """Refused without `convert=True`; what is restored can be stepped."""
    run, target = saved(before, tmp_path), fresh(after)
    with pytest.raises(CheckpointError, match="convert=True") as refused:
        checkpoint.restore(tmp_path, target.tx, target)
    assert "'params/bias'" in str(refused.value)
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        got = checkpoint.restore(tmp_path, target.tx, target, convert=True)
    messages = [str(x.message) for x in given if "converting" in str(x.message)]
    assert len(messages) == (says is not None)
    assert all(str(says) in x and "'params/embed'" in x for x in messages)
    assert apart(got, run) <= error
    if says is not None:
        assert apart(got, run) > error / 8
    jax.tree.map(
        lambda x, y: np.testing.assert_array_equal(x.dtype, y.dtype), got, target
    )
    moments = (got.opt_state.mu, run.opt_state.mu)
    jax.tree.map(np.testing.assert_array_equal, *moments)
    got.apply_gradients(grads=random(3, KINDS[after][1]))


@pytest.mark.parametrize("kind", ["remainder8", "half"])
def test_remainders_are_restored_bit_by_bit(kind: str, tmp_path: Path) -> None:
    run, target = saved(kind, tmp_path), fresh(kind)
    got = checkpoint.restore(tmp_path, target.tx, target)
    jax.tree.map(np.testing.assert_array_equal, got.params, run.params)
    jax.tree.map(np.testing.assert_array_equal, got.opt_state, run.opt_state)
    assert np.asarray(got.opt_state.remainder["embed"]).any()


def test_parameters_alone_can_be_had_in_float32(tmp_path: Path) -> None:
    """For evaluation: from parameters and remainders, without an optimizer's state."""
    run = saved("remainder16", tmp_path)
    target = {"params": random(0, jnp.float32)}
    got = checkpoint.restore(
        tmp_path, run.tx, target, only=["params"], partial=True, convert=True
    )
    jax.tree.map(np.testing.assert_array_equal, got["params"], masters(run))


def test_a_remainder_is_not_converted_without_its_parameter(tmp_path: Path) -> None:
    saved("remainder16", tmp_path)
    target = fresh("remainder8")
    with pytest.raises(CheckpointError, match="restore params, too"):
        checkpoint.restore(
            tmp_path, target.tx, target, only=["opt_state"], convert=True
        )


def test_what_a_checkpoint_holds_shows_remainders(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved("remainder8", tmp_path)
    assert main(["inspect", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    row = next(x for x in printed.splitlines() if "remainder8" in x)
    assert "remainder" in row and f"{8256 / 1024:.2f} KiB" in row


def test_sgd_without_momentum_has_remainders_alone(tmp_path: Path) -> None:
    tx = optim.sgd(1e-3, weights="remainder16")
    run = optim.TrainState.create(apply_fn=None, params=random(0, jnp.bfloat16), tx=tx)
    run = run.apply_gradients(grads=random(1, jnp.bfloat16))
    with ocp.CheckpointManager(tmp_path) as manager:
        checkpoint.save(manager, 1, run)
    target = optim.TrainState.create(
        apply_fn=None, params=random(0, jnp.float32), tx=optim.sgd(1e-3)
    )
    got = checkpoint.restore(tmp_path, target.tx, target, convert=True)
    assert apart(got, run) == 0.0
