"""Moments of a state in 32 bits, states from moments and from optax; format tables."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from octavo import optim
from octavo.optim.storage.table import records_of

from bits import assert_same_bits
from bits import moments as stored_moments
from cases import FORMATS, RULES, params_and_grads, trees

P = PartitionSpec


def tree(steps: int = 0) -> tuple[Any, list[Any]]:
    """Parameters: leaves that are quantized and one that is not; and gradients."""
    shapes = {"embed": (96, 48), "layers": [(96, 48), (1000, 9)], "small": (8, 5)}
    return trees(shapes, steps)


def run(tx: optim.Transformation, params: Any, grads: list[Any], state: Any) -> Any:
    """Parameters and state after more steps."""
    step = jax.jit(tx.step)
    for g in grads:
        params, state = step(g, state, params)
    return params, state


def run_optax(tx: Any, params: Any, grads: list[Any], state: Any) -> Any:
    """The same of optax, which does not survive strict promotion of types."""
    update = jax.jit(tx.update)
    with jax.numpy_dtype_promotion("standard"):
        for g in grads:
            updates, state = update(g, state, params)
            params = optax.apply_updates(params, updates)
    return params, state


@pytest.mark.parametrize("state", FORMATS)
def test_moments_are_rounded_to_the_nearest_code(state: str) -> None:
    params, grads = tree(3)
    exact, other = (
        optim.adam(0.01, state=s, min_quantized_size=0) for s in ("32bit", state)
    )
    _, before = run(exact, params, grads, exact.init(params))
    assert_same_bits(optim.dequantize(before), stored_moments(before))
    stored = optim.requantize(other.init(params), stored_moments(before), before.count)
    chex.assert_trees_all_equal_shapes_and_dtypes(stored, other.init(params))
    assert stored.count == 3
    got = optim.dequantize(stored)
    assert {x.dtype for x in jax.tree.leaves(got)} == {np.dtype("float32")}
    for slot, (x, y) in encoded(stored, got, stored_moments(before)):
        relative = slot.reference is not None
        case = FORMATS[state][slot.name == "mu", slot.name == "mu"]
        # Within the range, of its own size; below it, of the largest's. Of quotients
        # in equal steps: half of one.
        allowed = case.worst * np.abs(y) + case.range * np.abs(y).max()
        allowed = case.smallest / 2 * np.abs(y).max() if relative else allowed
        assert (np.abs(x - y) <= allowed * (1 + 2.0**-8)).all()  # of bf16 scales


def encoded(state: optim.State, *moments: dict[str, Any]) -> list[Any]:
    """Of each leaf and slot, what formats encode: moments, or quotients."""
    found = []
    for n, record in enumerate(records_of(state).values()):
        for slot in record.slots:
            leaves = [jax.tree.leaves(m[slot.name])[n] for m in moments]
            if slot.reference is not None:
                others = record.slots[slot.reference].name
                squares = [jax.tree.leaves(m[others])[n] for m in moments]
                leaves = [x / np.sqrt(v) for x, v in zip(leaves, squares, strict=True)]
            found.append((slot, leaves))
    return found


@pytest.mark.parametrize("rule", RULES)
def test_optax_there_and_back_changes_nothing(rule: str) -> None:
    case = RULES[rule]
    params, grads = tree(6)
    ours = case.ours(0.01, **case.kwargs, state="32bit")
    theirs = case.optax(0.01, **case.kwargs)
    reached, before = run_optax(theirs, params, grads[:3], theirs.init(params))
    converted = optim.from_optax(ours.init(params), before)
    back = optim.to_optax(converted, theirs.init(params))
    if case.kwargs.get("centered"):  # nu is the sum of two that are rounded
        chex.assert_trees_all_close(back, before, rtol=2.0**-22)
    else:
        assert_same_bits(back, before)

    # And the next steps are theirs: as in test_rules.py, over 3 steps.
    expected, _ = run_optax(theirs, reached, grads[3:], before)
    got, state = run(ours, reached, grads[3:], converted)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6, atol=3 * 0.03 * 7e-6)
    counts = optax.tree.get_all_with_path(before, "count")  # optax' momentum has none
    assert state.count == (6 if counts else 3)


@pytest.mark.parametrize("rule", ["adamw", "lars"])
def test_chains_with_schedules_and_masks(rule: str) -> None:
    """optax goes on where Octavo stopped, its schedule at the right step."""
    case = RULES[rule]
    params, grads = tree(6)
    rate = optax.linear_schedule(0.02, 0.0, 10)
    decayed = {"embed": True, "layers": [True, True], "small": False}
    name = {"adamw": "mask", "lars": "weight_decay_mask"}[rule]
    ours = case.ours(rate, weight_decay=0.1, mask=decayed, state="32bit")
    theirs = case.optax(rate, weight_decay=0.1, **{name: decayed})
    theirs = optax.chain(optax.identity(), theirs)
    reached, before = run(ours, params, grads[:3], ours.init(params))
    converted = optim.to_optax(before, theirs.init(params))
    got, _ = run_optax(theirs, reached, grads[3:], converted)
    expected, _ = run(ours, reached, grads[3:], before)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6, atol=3 * 0.06 * 7e-6)
    assert_same_bits(optim.from_optax(ours.init(params), converted), before)


def test_history_of_norms_that_optax_does_not_have_clips_nothing() -> None:
    params, grads = tree(4)
    theirs = optax.adam(0.01)
    reached, before = run_optax(theirs, params, grads[:3], theirs.init(params))
    makers = [optim.adam(0.01, percentile_clipping=p) for p in (None, 5)]
    ends = [
        run(tx, reached, grads[3:], optim.from_optax(tx.init(params), before))[0]
        for tx in makers
    ]
    assert_same_bits(*ends)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_conversions_do_not_depend_on_the_mesh(kind: AxisType) -> None:
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind,) * 2)
    p, (g,) = params_and_grads((128, 64), steps=1)
    tx = optim.adam(0.01)
    _, whole = tx.step(g, tx.init(p), p)
    sharding = NamedSharding(mesh, P("data", "model"))
    cut = jax.tree.map(jax.device_put, whole, optim.state_sharding(tx, p, sharding))
    assert cut.mu_scale.sharding.spec == P("data", "model")
    moments = optim.dequantize(cut)
    assert moments["mu"].sharding.is_equivalent_to(sharding, 2)
    assert_same_bits(moments, optim.dequantize(whole))
    again = optim.requantize(cut, moments)
    assert again.mu.sharding == cut.mu.sharding
    assert_same_bits(again, optim.requantize(whole, optim.dequantize(whole)))


def test_leaves_that_are_not_quantized() -> None:
    params = {
        "int": jnp.arange(4),
        "complex": jnp.ones(4, jnp.complex64),
        "half": jnp.ones((64, 128), jnp.bfloat16),
        "scalar": jnp.float32(1),
    }
    tx = optim.adam(0.01)
    state = tx.init(params)
    moments = optim.dequantize(state)
    assert moments["mu"]["complex"].dtype == np.complex64
    assert_same_bits(optim.dequantize(optim.requantize(state, moments)), moments)
    with jax.enable_x64(True):
        params = {"double": jnp.ones((64, 128), jnp.float64)}
        state = tx.init(params)
        moments = jax.tree.map(lambda x: x + 1 / 3, optim.dequantize(state))
        assert moments["mu"]["double"].dtype == np.float64
        assert_same_bits(optim.dequantize(optim.requantize(state, moments)), moments)


# ------------------------------------------------------------------- format tables

WRAPPERS = {
    "chain": lambda tx: optax.chain(optax.clip(1.0), tx),
    "masked": lambda tx: optax.masked(
        tx, {"embed": True, "layers": [False, True], "small": True}
    ),
    "multi_steps": lambda tx: optax.MultiSteps(tx, 2),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "partition": lambda tx: optax.partition(
        {"a": tx, "b": optax.sgd(0.1)},
        {"embed": "a", "layers": ["b", "a"], "small": "a"},
    ),
    "inject_hyperparams": lambda tx: optax.inject_hyperparams(
        lambda learning_rate: optim.adam(learning_rate, state=_by_path),
        hyperparam_dtype=jnp.float32,
    )(learning_rate=0.01),
}


def _by_path(path: str) -> str:
    return {"embed": "dynamic8", "layers/1": "bf16"}.get(path, "8bit")


@pytest.mark.parametrize("name", WRAPPERS)
def test_the_table_survives_wrappers(name: str) -> None:
    params, grads = tree(2)
    tx = WRAPPERS[name](optim.adam(0.01, state=_by_path))
    tx = optax.with_extra_args_support(tx)
    state = tx.init(params)
    with jax.numpy_dtype_promotion("standard"):  # for MultiSteps
        for g in grads:
            _, state = jax.jit(tx.update)(g, state, params)
    state = optax.tree_map_params(tx, lambda x: x, state)
    (own,) = [
        x
        for x in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, optim.State))
        if isinstance(x, optim.State)
    ]
    table = {
        path: (how.formats[0].name, how.formats[1].name, how.blocks.size)
        for path, how in records_of(own).items()
    }
    expected = {
        "embed": ("dynamic8", "dynamic8u", 4),
        "layers/0": ("ratio8", "bits8", 4),
        "layers/1": ("bf16", "bf16", 8),
        "small": ("32bit", "32bit", 4),
    }
    if name in ("masked", "partition"):
        del expected["layers/0"]
    assert table == expected
    assert optim.dequantize(own)["mu"]["embed"].dtype == np.float32


def test_a_stack_of_states_tells_after_indexing() -> None:
    p, _ = params_and_grads((3, 64, 128))
    states = jax.vmap(optim.adam(0.01).init)(p)
    with pytest.raises(ValueError, match=r"a stack of states: give one, such as"):
        optim.dequantize(states)
    assert records_of(jax.tree.map(lambda x: x[0], states))[""].blocks.size == 4


def errors() -> dict[str, tuple[Any, str]]:
    """Calls that fail, and what they say."""
    params, _ = tree()
    state, other = (tx(0.1).init(params) for tx in (optim.adam, optim.lars))
    two = optax.partition(
        {"a": optax.adam(0.1), "b": optax.adam(0.2)},
        {"embed": "a", "layers": ["b", "b"], "small": "a"},
    )
    moments = optim.dequantize(state)
    wrong = {**moments, "mu": {**moments["mu"], "small": jnp.ones(3)}}
    zeroed = jax.tree.map(jnp.zeros_like, state)
    return {
        "zeroed": (
            lambda: optim.dequantize(zeroed),
            r"'embed': the state does not say .* zeroed; .* fresh tx.init\(params\)",
        ),
        "slots": (
            lambda: optim.requantize(state, optim.dequantize(other)),
            r"moments for \['trace'\], but the state has \['mu', 'nu'\]",
        ),
        "tree": (
            lambda: optim.requantize(state, {"mu": moments["mu"], "nu": {}}),
            "the tree of moments 'nu' is not that of the state",
        ),
        "shape": (
            lambda: optim.requantize(state, wrong),
            r"a moment of shape \(3,\) for one of \(8, 5\)",
        ),
        "optax": (
            lambda: optim.from_optax(state, optax.sgd(0.1, 0.9).init(params)),
            "the optax state has no mu, nu: it belongs to another optimizer",
        ),
        "several": (
            lambda: optim.from_optax(state, two.init(params)),
            "the optax state has several mu, nu: give the part",
        ),
    }


@pytest.mark.parametrize("name", errors())
def test_errors(name: str) -> None:
    call, message = errors()[name]
    with pytest.raises(ValueError, match=message):
        call()
