"""ReduceLROnPlateau follows torch's rules, inside jit, and as a part of a chain."""

import itertools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from schedule_cases import METRIC, rates_of

from octavo.schedules import PlateauState, ReduceLROnPlateau


def torch_rules(
    lr, values, mode, factor, patience, threshold, threshold_mode, cooldown, min_lr
):
    """The documented rules, in Python numbers."""
    best = math.inf if mode == "min" else -math.inf
    bad, resting, rates = 0, 0, []
    sign = -1 if mode == "min" else 1
    for value in values:
        relative = best * (1 + sign * threshold)
        mark = relative if threshold_mode == "rel" else best + sign * threshold
        if value < mark if mode == "min" else value > mark:
            best, bad = value, 0
        else:
            bad += 1
        if resting:
            resting, bad = resting - 1, 0
        if bad > patience:
            resting, bad = cooldown, 0
            if lr - max(lr * factor, min_lr) > 1e-8:
                lr = max(lr * factor, min_lr)
        rates.append(lr)
    return rates


@pytest.mark.parametrize(
    ("mode", "threshold_mode", "cooldown", "patience"),
    list(itertools.product(("min", "max"), ("rel", "abs"), (0, 3), (0, 2))),
)
def test_follows_the_rules(mode, threshold_mode, cooldown, patience) -> None:
    options = {
        "mode": mode,
        "factor": 0.5,
        "patience": patience,
        "threshold": 0.01,
        "threshold_mode": threshold_mode,
        "cooldown": cooldown,
        "min_lr": 0.004,
    }
    values = METRIC.astype(np.float32)
    expected = torch_rules(0.1, values, **options)
    assert len(set(expected)) > 2
    np.testing.assert_allclose(rates_of(0.1, METRIC, **options), expected, rtol=1e-6)


def test_equal_to_optax_where_both_reduce() -> None:
    # optax reduces at the patience-th bad reading, torch after it.
    theirs = optax.contrib.reduce_on_plateau(
        0.5, patience=3, rtol=0.01, accumulation_size=2
    )
    values = jnp.asarray(np.append(METRIC[:50], np.ones(20)), jnp.float32)
    ours = rates_of(
        1.0, values, factor=0.5, patience=2, threshold=0.01, accumulation_size=2
    )

    @jax.jit
    def step(state, value):
        return theirs.update(jnp.ones(2), state, value=value)

    state, expected = theirs.init(jnp.ones(2)), []
    # optax divides an int32 count by a float, which strict promotion forbids.
    with jax.numpy_dtype_promotion("standard"):
        for value in values:
            updates, state = step(state, value)
            expected.append(float(updates[0]))
    assert expected[-1] < 1.0
    np.testing.assert_allclose(ours, expected, rtol=1e-6)


def test_state_is_six_scalars_stable_under_jit() -> None:
    tx = ReduceLROnPlateau(0.1)
    state = tx.init({"w": jnp.ones(3)})
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(state)) == 24
    step = jax.jit(lambda g, s, value: tx.update(g, s, value=value))
    _, after = step({"w": jnp.ones(3)}, state, 1.0)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, after)
    chex.assert_trees_all_equal_structs(state, after)


def test_updates_keep_type_and_structure() -> None:
    updates = {"a": jnp.ones(3, jnp.bfloat16), "b": (jnp.ones(()), None)}
    tx = ReduceLROnPlateau()
    scaled, _ = tx.update(updates, tx.init(updates), value=0.5, other="ignored")
    chex.assert_trees_all_equal(scaled, updates)
    chex.assert_trees_all_equal_dtypes(scaled, updates)


def test_in_a_chain_behind_an_optimizer() -> None:
    tx = optax.chain(optax.sgd(0.1), ReduceLROnPlateau(0.1, patience=0, min_lr=0.02))
    params = jnp.ones(2)
    state = tx.init(params)
    sizes = []
    for _ in range(5):
        updates, state = tx.update(jnp.ones(2), state, params, value=jnp.float32(1.0))
        sizes.append(-float(updates[0]))
    np.testing.assert_allclose(sizes, [0.1, 0.02, 0.02, 0.02, 0.02], rtol=2e-6)


def test_resumes_from_its_state() -> None:
    tx = ReduceLROnPlateau(0.1, patience=1, accumulation_size=2)
    state = tx.init(None)
    for value in METRIC[:33]:
        _, state = tx.update(jnp.ones(1), state, value=value)
    stored = PlateauState(*(np.asarray(leaf) for leaf in state))
    resumed = jax.tree.map(jnp.asarray, stored)
    for value in METRIC[33:45]:
        first, state = tx.update(jnp.ones(1), state, value=value)
        second, resumed = tx.update(jnp.ones(1), resumed, value=value)
        chex.assert_trees_all_equal(first, second)


@pytest.mark.parametrize(
    "options",
    [
        {"base_lr": 0.0},
        {"mode": "mean"},
        {"factor": 1.0},
        {"factor": -0.1},
        {"patience": -1},
        {"patience": 1.5},
        {"threshold": -1e-4},
        {"threshold_mode": "ratio"},
        {"cooldown": -1},
        {"min_lr": -1.0},
        {"eps": float("nan")},
        {"accumulation_size": 0},
    ],
    ids=str,
)
def test_bad_options(options) -> None:
    (name,) = options
    with pytest.raises(ValueError, match=f"ReduceLROnPlateau: {name}="):
        ReduceLROnPlateau(**options)


def test_bad_values() -> None:
    tx = ReduceLROnPlateau()
    state = tx.init(None)
    with pytest.raises(ValueError, match="value=loss"):
        tx.update(jnp.ones(1), state)
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        tx.update(jnp.ones(1), state, value=jnp.ones(3))
