"""Muon in what surrounds an optimizer: wrappers, checkpoints, conversions, weights."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from matrices import expect_near

from octavo import optim
from octavo.optim import checkpoint
from octavo.optim.integrations.nnx import Optimizer

from bits import assert_same_bits
from meshes import mesh_of
from runs import fresh, saved, trained

Tree = dict[str, Any]

SHAPES = {"w": (256, 64), "embed": (128, 64), "b": (64,)}
RATE = 1e-2


def values(seed: int, dtype: Any = "float32") -> Tree:
    rng = np.random.default_rng(seed)
    scale = 0.125 if seed == 0 else 1.0  # small parameters, whose rounding is small
    made = {k: scale * rng.normal(size=shape) for k, shape in SHAPES.items()}
    return {k: jnp.asarray(x, "bfloat16").astype(dtype) for k, x in made.items()}


def stepped(tx: Any, params: Tree, state: Any = None, seeds: Any = (1, 2)) -> Any:
    """Parameters and state after steps with the gradients of these seeds."""
    state = tx.init(params) if state is None else state
    step = jax.jit(lambda p, s, g: optim.step(tx, g, s, p))
    for seed in seeds:
        grads = {k: values(seed)[k] for k in params}
        grads = jax.device_put(grads, jax.tree.map(lambda p: p.sharding, params))
        params, state = step(params, state, grads)
    return params, state


# ------------------------------------------------------------------------- wrappers


def _in_train_state(tx: Any) -> Tree:
    state = optim.TrainState.create(apply_fn=None, params=values(0), tx=tx)
    step = jax.jit(lambda state, grads: state.apply_gradients(grads=grads))
    for seed in (1, 2):
        state = step(state, values(seed))
    return state.params


class _Model(nnx.Module):
    def __init__(self, params: Tree) -> None:
        for name, x in params.items():
            setattr(self, name, nnx.Param(x))


def _in_nnx(make: Any, tx: Any) -> Tree:
    model = _Model(values(0))
    optimizer = make(model, tx, wrt=nnx.Param)
    update = nnx.jit(lambda model, optimizer, grads: optimizer.update(model, grads))
    for seed in (1, 2):
        update(model, optimizer, nnx.state(_Model(values(seed)), nnx.Param))
    return {name: getattr(model, name)[...] for name in SHAPES}


def _in_smaller_shards(tx: Any) -> Tree:
    mesh = mesh_of("4x2", "auto")
    params = jax.device_put(values(0), NamedSharding(mesh, P()))
    tx = optim.muon(RATE, state_sharding="d").bind(params)
    state = tx.init(params)
    assert state.muon.mu["w"].sharding.spec == P("d", None)
    said = optim.state_sharding(tx, params)
    jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), state, said)
    return stepped(tx, params, state)[0]


WRAPPED: dict[str, Callable[[Any], Tree]] = {
    "chain": lambda tx: stepped(optax.chain(optax.identity(), tx), values(0))[0],
    # Momentum is stored otherwise where beta is not known: an array, which may grow.
    "inject_hyperparams": lambda _: stepped(
        optax.inject_hyperparams(optim.muon, static_args="beta")(RATE), values(0)
    )[0],
    "accumulate": lambda tx: stepped(optim.accumulate(tx, 1), values(0))[0],
    "TrainState": _in_train_state,
    "nnx.Optimizer of octavo": partial(_in_nnx, Optimizer),
    "nnx.Optimizer of flax": partial(_in_nnx, nnx.Optimizer),
    "state_sharding": _in_smaller_shards,
}


@pytest.fixture(scope="module")
def alone() -> Tree:
    """The parameters after two steps without anything around."""
    return stepped(optim.muon(RATE), values(0))[0]


@pytest.mark.parametrize("name", WRAPPED)
def test_it_steps_alike_in(name: str, alone: Tree) -> None:
    # p + u is rounded once more than in the fused step: by 2**-26 in each of two, where
    # p is below .5, of moves of 2 * RATE.
    expect_near(WRAPPED[name](optim.muon(RATE)), alone, values(0), 1e-5)


# ---------------------------------------------------------------------- conversions


def test_training_goes_on_where_optax_stopped() -> None:
    numbers = optax.contrib.MuonDimensionNumbers()
    chosen = {"w": numbers, "embed": None, "b": None}
    how = {"muon_weight_dimension_numbers": chosen, "consistent_rms": 0.2}
    ours, theirs = optim.muon32bit(RATE, **how), optax.contrib.muon(RATE, **how)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        before, state = stepped(theirs, values(0))
        want, last = stepped(theirs, before, state, (3, 4, 5))
    made = optim.from_optax(ours.init(before), state)
    found, own = stepped(ours, before, made, (3, 4, 5))
    # As in test_32bit_equals_optax: rounding, and the order of sums in products.
    expect_near(found, want, before, 1e-5)
    back = optim.to_optax(own, state)
    assert jax.tree.structure(back) == jax.tree.structure(last)
    for x, y in zip(*map(jax.tree.leaves, (back, last)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


def test_moments_of_both_parts_are_one_tree() -> None:
    tx = optim.muon(RATE)
    _, state = stepped(tx, values(0))
    moments = optim.dequantize(state)
    assert set(moments) == {"mu", "nu"}
    assert {k: x.shape for k, x in moments["mu"].items()} == SHAPES
    assert isinstance(moments["nu"]["w"], optax.MaskedNode)
    np.testing.assert_array_equal(
        moments["mu"]["w"], optim.dequantize(state.muon)["mu"]["w"]
    )
    wide = optim.requantize(optim.muon32bit(RATE).init(values(0)), moments, 2)
    assert_same_bits(optim.dequantize(wide), moments)
    assert wide.muon.count == wide.adam.count == 2
    with pytest.raises(ValueError, match=r"moments for \['mu'\], but the state has"):
        optim.requantize(state, {"mu": moments["mu"]})
    with pytest.raises(ValueError, match="not like that of the parameters"):
        optim.requantize(state, {"mu": {}, "nu": {}})


# ---------------------------------------------------------------------- checkpoints


def test_checkpoints_change_meshes_and_formats(tmp_path: Path) -> None:
    tx, wide = optim.muon(RATE), optim.muon32bit(RATE)
    run = trained(fresh(tx), 2)
    folder = saved(tmp_path / "8bit", run)
    mesh = mesh_of("2x4", "explicit")
    where = jax.tree.map(lambda p: NamedSharding(mesh, P("d")), run.params)
    there = checkpoint.restore(folder, tx, run, where)
    assert_same_bits(there, run)
    assert there.opt_state.muon.mu["layer"]["kernel"].sharding.spec[0] == "d"

    with pytest.raises(checkpoint.CheckpointError, match=r"muon/mu.*convert=True"):
        checkpoint.restore(folder, wide, fresh(wide))
    full = checkpoint.restore(folder, wide, fresh(wide), convert=True)
    moments = optim.dequantize(run.opt_state)
    assert_same_bits(optim.dequantize(full.opt_state), moments)
    folder = saved(tmp_path / "32bit", full)
    back = checkpoint.restore(folder, tx, fresh(tx), convert=True)
    again = optim.requantize(tx.init(run.params), moments, 2)
    assert_same_bits(back.opt_state, again)


@pytest.mark.parametrize("leaves", [("w", "b"), ("w",)])
def test_checkpoints_of_optax_are_converted(
    leaves: tuple[str, ...], tmp_path: Path
) -> None:
    params = {name: values(0)[name] for name in leaves}
    theirs = optax.contrib.muon(RATE)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        after, state = stepped(theirs, params)
    run = fresh(theirs, params).replace(params=after, opt_state=state)
    folder = saved(tmp_path / "optax", run)
    tx = optim.muon(RATE)
    found = checkpoint.restore(folder, tx, fresh(tx, params), convert=True)
    assert_same_bits(found.params, after)
    assert_same_bits(found.opt_state, optim.from_optax(tx.init(params), state))


def test_other_matrices_are_no_conversion(tmp_path: Path) -> None:
    folder = saved(tmp_path / "one", fresh(optim.muon(RATE)))
    tx = optim.muon(RATE, muon_mask=lambda p: jax.tree.map(lambda x: x.ndim == 2, p))
    with pytest.raises(checkpoint.CheckpointError, match=r"mu/embed' is not in the"):
        checkpoint.restore(folder, tx, fresh(tx), convert=True)


# -------------------------------------------------------------------------- weights


def test_remainder16_is_training_in_float32_by_bits() -> None:
    """Momentum, directions and their products see gradients alone, and no parameter."""
    tx = optim.muon(RATE, weight_decay=0.1)
    want, wide = stepped(tx, values(0))
    tx = optim.muon(RATE, weight_decay=0.1, weights="remainder16")
    params, state = stepped(tx, values(0, "bfloat16"))
    assert params["w"].dtype == jnp.bfloat16
    assert_same_bits(optim.masters(state, params), want)
    assert_same_bits(optim.dequantize(state), optim.dequantize(wide))
    again, kept = optim.from_masters(state, want)
    assert_same_bits((again, kept), (params, state))


def test_one_part_may_have_no_remainders() -> None:
    params = values(0) | {"w": values(0, "bfloat16")["w"]}
    tx = optim.muon(RATE, weights="remainder8")
    _, state = stepped(tx, params)
    assert state.muon.remainder["w"].dtype == jnp.int8
    with pytest.raises(ValueError, match="float32 parameters have no remainder"):
        tx.init(values(0))


# --------------------------------------------------------------------------- limits


def test_percentile_clipping_limits_what_enters_the_momentum() -> None:
    tx = optim.muon32bit(RATE, percentile_clipping=50)
    found, state = stepped(tx, values(0), seeds=(1,))
    large = {k: 100 * g for k, g in values(2).items()}
    found, state = jax.jit(tx.step)(large, state, found)
    # All of the history but one is the first norm.
    first, second = values(1), values(2)
    norm = jnp.linalg.norm
    limited = {k: g * (norm(first[k]) / norm(g)) for k, g in second.items()}
    plain = optim.muon32bit(RATE)
    want, kept = stepped(plain, values(0), seeds=(1,))
    want, kept = jax.jit(plain.step)(limited, kept, want)
    expect_near(found, want, values(0), 1e-5)
    assert_close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(assert_close, state.muon.mu, kept.muon.mu)
    assert [part.extra["clip_history"].shape for part in state] == [(1, 100), (2, 100)]
