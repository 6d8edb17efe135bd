"""Clipping and limits of a step: alone, together, and in wrappers."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from octavo import optim

from cases import KINDS, RULES, params_and_grads
from kernels import (
    INTERPRETERS,
    expect_equal_up_to_contraction,
    interpreted,
    leaf_of,
)
from limits import (
    CLIPS,
    EVERYTHING,
    KEEPS,
    everything,
    leaf_at,
    limited,
    optax_clipped,
    tree,
)
from training import run_step
from wrappers import GRADS, PARAMS, WRAPPERS, wrapped

every_optimizer = pytest.mark.parametrize("name", KINDS)


@pytest.mark.parametrize("clips", CLIPS)
@every_optimizer
def test_clipping_is_that_of_optax(name: str, clips: str) -> None:
    params, grads = tree(steps=5)
    ours = limited(name, 0.01, state="32bit", **CLIPS[clips])
    got, _ = run_step(ours, params, grads)
    bare = limited(name, 0.01, state="32bit")
    expected, _ = run_step(bare, params, optax_clipped(grads, CLIPS[clips]))
    # Roundings of parameters of up to 4, and of a factor, at each of 5 steps.
    chex.assert_trees_all_close(got, expected, rtol=0, atol=5 * 2.0**-22)
    without, _ = run_step(bare, params, grads)
    with pytest.raises(AssertionError):
        chex.assert_trees_all_close(without, expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("backend", ["xla", *INTERPRETERS])
def test_kernels_clip_on_the_way_in(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Codes and scales are those of gradients that were clipped before."""
    backend = interpreted(backend, monkeypatch)
    p, grads = params_and_grads((64, 96))
    leaves = []
    for clips, given in (
        (CLIPS["both"], grads),
        ({}, optax_clipped(grads, CLIPS["both"])),
    ):
        tx = optim.lamb(0.01, backend=backend, **clips)
        leaves.append(leaf_of(*run_step(tx, p, given)))
    expect_equal_up_to_contraction(*leaves)


def test_gradients_within_the_limits_are_left_alone() -> None:
    params, grads = tree(steps=3)
    wide = {"grad_clip_norm": 1e6, "grad_clip_value": 1e6}
    bare, unreached = (optim.adamw(0.01, state="32bit", **x) for x in ({}, wide))
    got, expected = (run_step(tx, params, grads) for tx in (unreached, bare))
    # Multiply-adds that the compiler contracts in one program and not in the other.
    chex.assert_trees_all_close(got, expected, rtol=0, atol=3 * 2.0**-22)


def test_percentiles_come_before_the_global_norm_and_values_after() -> None:
    """A gradient 10 times as long is cut to the last one; that is what is measured."""
    params, (g,) = tree()
    total = float(optax.tree.norm(g))
    norm, value = total / 2, 1.0
    tx = optim.adamw(
        0.01,
        percentile_clipping=20,
        grad_clip_norm=norm,
        grad_clip_value=value,
        record_norms=True,
    )
    _, state = run_step(tx, params, [g, jax.tree.map(lambda x: 10 * x, g)])
    for path, norms in optim.last_norms(state).items():
        expected = np.clip(leaf_at(g, path) / 2, -value, value)
        np.testing.assert_allclose(norms.gradient, np.linalg.norm(expected), rtol=1e-5)


def test_a_norm_that_overflows_is_in_no_history() -> None:
    params, (g,) = tree()
    large = {**g, "scale": jnp.float32(1e30)}
    _, state = run_step(optim.adam(0.1, percentile_clipping=20), params, [g, large, g])
    history = np.unique(state.extra["clip_history"][2])
    np.testing.assert_allclose(history, [np.square(g["scale"])], rtol=1e-6)


def test_the_norm_of_a_complex_leaf_counts_both_parts() -> None:
    g = {"z": jnp.full((4, 3), 3.0 + 4.0j, jnp.complex64), "x": jnp.full(5, 2.0)}
    start = jax.tree.map(jnp.zeros_like, g)
    got, _ = run_step(optim.lars(1.0, grad_clip_norm=1.0), start, [g])
    norm = np.sqrt(12 * 25.0 + 5 * 4.0)
    for name, leaf in got.items():
        np.testing.assert_allclose(leaf, -np.asarray(g[name]) / norm, rtol=1e-6)


@pytest.mark.parametrize("name", [n for n in KINDS if RULES[n].max_unorm])
def test_a_step_is_at_most_max_unorm_times_as_long_as_the_weights(name: str) -> None:
    """To the bound where a step is longer, and of its own length where it is not."""
    params, grads = tree(steps=4)
    params["scale"] = jnp.float32(1e-3)
    options: dict[str, Any] = {"max_unorm": 0.5, "record_norms": True}
    if "weight_decay" in RULES[name].kwargs:
        options["weight_decay"] = 0.0
    tx = limited(name, 0.1, **options)
    step, state = jax.jit(tx.step), tx.init(params)
    bounded = set()
    for g in grads:
        before = params
        params, state = step(g, state, params)
        for path, norms in optim.last_norms(state).items():
            old, new = (leaf_at(x, path) for x in (before, params))
            moved, limit = np.linalg.norm(new - old), 0.05 * np.linalg.norm(old)
            # p is rounded once more.
            np.testing.assert_array_less(moved, limit * (1 + 1e-5) + 1e-6)
            if norms.ratio < 1.0:
                bounded.add(path)
                np.testing.assert_allclose(moved, limit, rtol=1e-4)
    assert "scale" in bounded and len(bounded) > 1


@pytest.mark.parametrize("max_unorm", [0.5, 2.0])
def test_max_unorm_bounds_the_step_that_the_ratio_makes(max_unorm: float) -> None:
    """LAMB's own is exactly as long as the weights: a wider limit changes nothing."""
    params, (g,) = tree()
    params = jax.tree.map(lambda p: 3.0 * p, params)  # longer than Adam's step
    options: dict[str, Any] = {"adapt_mask": True, "state": "32bit"}
    moved, free = (
        run_step(optim.lamb(0.1, max_unorm=limit, **options), params, [g])[0]
        for limit in (max_unorm, None)
    )
    for path in ("dense/kernel", "dense/bias", "scale"):
        got, whole = (leaf_at(x, path) - leaf_at(params, path) for x in (moved, free))
        # Two roundings of parameters of up to 4.
        expected = min(max_unorm, 1.0) * whole
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=2.0**-21)


@pytest.mark.parametrize("first", [np.nan, np.inf, 1e30])
def test_a_bad_first_gradient_does_not_stop_percentile_clipping(first: float) -> None:
    """It leaves no norm that others are measured by."""
    params, (g,) = tree()
    bad = jax.tree.map(lambda x: jnp.full_like(x, first), g)
    tx = optim.adam(0.1, state="32bit", percentile_clipping=20)
    after, _ = run_step(tx, params, [bad, g])
    for path in ("dense/kernel", "dense/bias", "scale"):
        assert (leaf_at(after, path) != leaf_at(params, path)).all()


def test_a_changed_limit_does_not_recompile() -> None:
    params, (g,) = tree()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(norm: Any, value: Any, unorm: Any) -> Any:
        tx = optim.sgd(
            0.01,
            momentum=0.9,
            grad_clip_norm=norm,
            grad_clip_value=value,
            max_unorm=unorm,
            record_norms=True,
        )
        return optim.last_norms(tx.step(g, tx.init(params), params)[1])

    for norm in (30.0, 60.0):
        found = step(norm, 1e6, 1e6)
        total = np.sqrt(sum(x.gradient**2 for x in found.values()))
        np.testing.assert_allclose(total, norm, rtol=1e-5)
    for value in (0.5, 1e-3):
        found = step(1e6, value, 1e6)
        np.testing.assert_allclose(found["scale"].gradient, value, rtol=1e-6)
    for unorm in (1e-4, 1e-6):
        kernel = step(1e6, 1e6, unorm)["dense/kernel"]
        np.testing.assert_allclose(
            kernel.ratio * kernel.direction, unorm * kernel.parameter, rtol=1e-5
        )


def test_a_limit_is_a_hyperparameter_of_inject_hyperparams() -> None:
    """Integers and what is no number are named in static_args."""
    params, (g,) = tree()
    static = [name for name in EVERYTHING if not name.startswith("grad_clip")]
    make = optax.inject_hyperparams(optim.lamb, static_args=static)
    tx = make(0.01, adapt_mask=True, **EVERYTHING)
    update, state = jax.jit(tx.update), tx.init(params)
    for value in (0.1, 1e-3):
        state.hyperparams["grad_clip_value"] = jnp.float32(value)
        _, after = update(g, state, params)
        clipped = optim.last_norms(after)["scale"].gradient
        np.testing.assert_allclose(clipped, value, rtol=1e-6)
    assert update._cache_size() == 1


@every_optimizer
def test_masked_leaves_are_in_no_norm(name: str) -> None:
    params, grads = tree(steps=3)
    tx = limited(name, 0.01, state="32bit", **everything(name))
    masked = optax.masked(tx, {"dense": True, "scale": False})
    _, alone = run_step(tx, params["dense"], [g["dense"] for g in grads])
    state, update = masked.init(params), jax.jit(masked.update)
    bad = {**grads[1], "scale": jnp.float32(np.nan)}
    assert np.isnan(update(bad, state, params)[0]["scale"])
    for g in grads:
        updates, state = update(g, state, params)
        params = {**params, "dense": optax.apply_updates(params, updates)["dense"]}
    paths = {f"dense/{path}": x for path, x in optim.last_norms(alone).items()}
    chex.assert_trees_all_close(optim.last_norms(state), paths, rtol=1e-5)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrapped_with_every_option(wrapper: str) -> None:
    """Of `partition`, a group without leaves is a part."""
    with jax.numpy_dtype_promotion("standard"):
        tx = wrapped(optim.lamb(0.01, min_quantized_size=0, **EVERYTHING))[wrapper]
        tx = optax.with_extra_args_support(tx)
        params, state, update = PARAMS, tx.init(PARAMS), jax.jit(tx.update)
        for _ in range(4):
            updates, new = update(GRADS, state, params, value=1.0)
            chex.assert_trees_all_equal_shapes_and_dtypes(new, state)
            params, state = optax.apply_updates(params, updates), new
    chex.assert_tree_all_finite(params)
    moved = np.abs(params["dense"]["kernel"] - PARAMS["dense"]["kernel"])
    assert moved.min() > 1e-3


@every_optimizer
def test_tree_map_params_with_every_option(name: str) -> None:
    """What belongs to no parameter is none's: counters, histories, norms."""
    params, _ = tree()
    tx = limited(name, 0.01, **everything(name))
    state = tx.init(params)
    mapped = optax.tree_map_params(
        tx, lambda _: "parameter", state, transform_non_params=lambda _: "other"
    )
    assert set(jax.tree.leaves(mapped.trees)) == {"parameter"}
    assert set(jax.tree.leaves((mapped.count, mapped.extra))) == {"other"}
    assert set(mapped.extra) == {"format", *KEEPS}


@pytest.mark.parametrize("key", KEEPS)
def test_a_state_made_with_other_options_is_refused(key: str) -> None:
    params, (g,) = tree()
    with_option, without = optim.adam(0.1, **KEEPS[key]), optim.adam(0.1)
    for made, used in ((with_option, without), (without, with_option)):
        with pytest.raises(ValueError, match=rf"state\.extra has .*{key}"):
            used.step(g, made.init(params), params)


def test_limits_that_keep_nothing_leave_the_state_as_it_is() -> None:
    params, (g,) = tree()
    limited = optim.adamw(0.1, max_unorm=0.5, percentile_clipping=100, **CLIPS["both"])
    bare = optim.adamw(0.1)
    chex.assert_trees_all_equal(limited.init(params), bare.init(params))
    jax.eval_shape(limited.step, g, bare.init(params), params)
