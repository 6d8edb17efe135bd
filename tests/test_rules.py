"""Rules compute what optax and the papers compute; storage is all that differs."""

import dataclasses
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from octavo import optim

from cases import FORMATS, OPTIMIZERS, RULES, SHAPES, params_and_grads
from oracle import optax_run
from training import run_step, run_update

DTYPES = [jnp.float32, jnp.bfloat16]


@pytest.mark.parametrize("rule", RULES)
def test_32bit_equals_optax_over_50_steps(rule: str) -> None:
    case = RULES[rule]
    p, grads = params_and_grads((96, 40), steps=50)
    ours, _ = run_step(case.ours(0.01, **case.kwargs, state="32bit"), p, grads)
    theirs = optax_run(case.optax(0.01, **case.kwargs), p, grads)
    # optax takes 1 - b2 in float64 and b2 in float32: v differs by 1.3e-5 of itself,
    # an update by half of that; 50 of them, of at most 0.03 each.
    np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=50 * 0.03 * 7e-6)


@pytest.mark.parametrize("rule", RULES)
def test_32bit_equals_the_paper_in_float64(rule: str) -> None:
    case = RULES[rule]
    p, grads = params_and_grads((96, 40), steps=50)
    ours, _ = run_step(case.ours(0.01, **case.kwargs, state="32bit"), p, grads)
    exact = case.numpy(
        np.asarray(p), [np.asarray(g) for g in grads], 0.01, **case.kwargs
    )
    # 50 roundings of p (up to 4), and of updates (up to 0.03, some 10 operations each).
    np.testing.assert_allclose(ours, exact, rtol=0, atol=50 * (2.0**-22 + 3e-2 * 1e-6))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda t: t.__name__)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("state", FORMATS)
@pytest.mark.parametrize("rule", OPTIMIZERS)
def test_step_equals_update_and_apply(
    rule: str, state: str, shape: tuple[int, ...], dtype: Any
) -> None:
    case = RULES[rule]
    tx = case.ours(0.01, **case.kwargs, state=state, min_quantized_size=0)
    # Where moments see parameters, a last bit of those is one of theirs next time.
    p, grads = params_and_grads(shape, steps=3 if case.pure else 1, dtype=dtype)
    stepped, state_stepped = run_step(tx, p, grads)
    updated, state_updated = run_update(tx, p, grads)
    if dtype == jnp.float32:
        chex.assert_trees_all_equal(state_stepped, state_updated)
        ulp = np.spacing(np.maximum(np.abs(stepped), np.abs(updated)))
        assert (np.abs(stepped - updated) <= ulp).all()
    else:  # the update itself is rounded to bf16 on the way to apply_updates
        np.testing.assert_allclose(
            stepped.astype(jnp.float32),
            updated.astype(jnp.float32),
            rtol=2.0**-6,
            atol=1e-3,
        )


@pytest.mark.parametrize("state", [s for s in FORMATS if s != "32bit"])
@pytest.mark.parametrize("rule", RULES)
def test_quantized_follows_32bit(rule: str, state: str) -> None:
    """Over 50 steps the update's error stays below the format's own resolution."""
    case = RULES[rule]
    p, grads = params_and_grads((256, 64), steps=50)
    exact, _ = run_step(case.ours(0.01, **case.kwargs, state="32bit"), p, grads)
    got, _ = run_step(case.ours(0.01, **case.kwargs, state=state), p, grads)
    error = jnp.linalg.norm(got - exact) / jnp.linalg.norm(exact - p)
    assert error < (0.01 if state == "bf16" else 0.1)


def test_learning_rate_schedule_sees_the_steps_taken_before() -> None:
    rates: list[float] = [0.5, 0.25, 0.125]
    tx = optim.adam(lambda count: jnp.asarray(rates)[count], state="32bit", eps=0.0)
    p, state = jnp.zeros(4), tx.init(jnp.zeros(4))
    for rate in rates:  # a constant gradient makes Adam's direction 1
        updates, state = tx.update(jnp.ones(4), state)
        np.testing.assert_allclose(updates, -rate, rtol=1e-5)
    assert state.count == 3 and p.shape == (4,)


def test_bias_correction_is_exact_for_betas_near_one() -> None:
    tx = optim.adam(1.0, b1=0.9, b2=1 - 1e-6, eps=0.0, state="32bit")
    updates, _ = tx.update(jnp.full(4, 0.3), tx.init(jnp.zeros(4)))
    np.testing.assert_allclose(updates, -1.0, rtol=1e-6)


def test_mask_says_which_leaves_decay() -> None:
    params = {"kernel": jnp.ones((8, 8)), "bias": jnp.ones(8)}
    zero = jax.tree.map(jnp.zeros_like, params)
    trees = [{"kernel": True, "bias": False}, lambda p: {"kernel": True, "bias": False}]
    for mask in trees:
        tx = optim.adamw(0.1, weight_decay=0.5, mask=mask)
        updates, _ = tx.update(zero, tx.init(params), params)
        np.testing.assert_allclose(updates["kernel"], -0.05, rtol=1e-6)
        np.testing.assert_allclose(updates["bias"], 0.0)


@pytest.mark.parametrize("dtype", ["int32", "complex64", "float16"])
def test_other_types_of_leaves(dtype: str) -> None:
    p = jnp.ones((8, 8), dtype)
    tx = optim.adam(0.1)
    state = tx.init(p)
    g = jnp.ones((8, 8), dtype) if dtype != "complex64" else jnp.full((8, 8), 1 + 1j)
    updates, state = tx.update(g, state, p)
    assert updates.dtype == jnp.dtype(dtype)
    expected = {"int32": 0, "float16": -0.1, "complex64": -0.1 - 0.1j}[dtype]
    np.testing.assert_allclose(updates, expected, rtol=1e-3)


@pytest.mark.parametrize("name", ["count", "extra", "mu_scale", "second moment", "mu"])
def test_names_of_slots_that_a_state_cannot_have(name: str) -> None:
    rule = optim.adam(0.1).optimizer.rule
    first, second = rule.slots
    slots = (first._replace(name="mu"), second._replace(name=name))
    with pytest.raises(ValueError, match=f"a slot cannot be called '{name}': give"):
        dataclasses.replace(rule, slots=slots)


@pytest.mark.parametrize(
    ("slot", "other"), [("mu", "mu"), ("mu", "momentum"), ("nu", "nu")]
)
def test_slots_that_nothing_can_be_relative_to(slot: str, other: str) -> None:
    rule = optim.adam(0.1).optimizer.rule
    slots = tuple(
        s._replace(relative_to=other if s.name == slot else None) for s in rule.slots
    )
    message = f"slot '{slot}' cannot be relative to '{other}': a signed slot"
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(rule, slots=slots)


def test_random_bits_depend_on_the_seed_the_leaf_and_the_step() -> None:
    p, grads = params_and_grads((256, 64), steps=3)
    same = [p, p]

    def codes(**options: Any) -> Any:
        _, state = run_step(optim.adam(0.01, **options), same, [[g, g] for g in grads])
        return state.nu

    first, second = codes(seed=1)
    chex.assert_trees_all_equal(codes(seed=1), [first, second])
    assert (first != second).any()
    assert (codes(seed=2)[0] != first).any()
