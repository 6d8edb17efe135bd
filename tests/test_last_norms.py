"""`record_norms`: the norms and ratios of the last step, by path."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from octavo import optim

from cases import RULES
from limits import CLIPS, leaf_at, limited, optax_clipped, tree
from training import run_step


def expect_norms(found: dict[str, optim.LayerNorms], params: Any, grads: Any) -> None:
    """Those of LAMB's first step without weight decay, whose direction is 1s."""
    assert set(found) == {"dense/kernel", "dense/bias", "scale"}
    for path, norms in found.items():
        p, g = leaf_at(params, path), leaf_at(grads, path)
        p_norm, u_norm = np.linalg.norm(p), np.sqrt(p.size)
        np.testing.assert_allclose(norms.parameter, p_norm, rtol=1e-5)
        np.testing.assert_allclose(norms.gradient, np.linalg.norm(g), rtol=1e-5)
        # eps of 1e-6 next to gradients of 0.01 and more, few of them smaller.
        np.testing.assert_allclose(norms.direction, u_norm, rtol=1e-4)
        ratio = p_norm / u_norm if path == "dense/kernel" else 1.0
        np.testing.assert_allclose(norms.ratio, ratio, rtol=1e-4)


def test_last_norms() -> None:
    """Of a step and an update, within jit and outside, in a chain and a TrainState."""
    params, (g,) = tree()
    tx = optim.lamb(0.01, record_norms=True)
    state = tx.init(params)
    for norms in optim.last_norms(state).values():
        assert norms == (0.0, 0.0, 0.0, 0.0)
    expect_norms(optim.last_norms(jax.jit(tx.step)(g, state, params)[1]), params, g)
    inside = jax.jit(lambda: optim.last_norms(tx.update(g, state, params)[1]))
    expect_norms(inside(), params, g)

    chain = optax.chain(optax.scale(2.0), tx, optax.scale(-1.0))
    _, chained = jax.jit(chain.update)(g, chain.init(params), params)
    expect_norms(optim.last_norms(chained), params, jax.tree.map(lambda x: 2 * x, g))

    train = optim.TrainState.create(apply_fn=None, params=params, tx=tx)
    stepped = jax.jit(lambda state: state.apply_gradients(grads=g))(train)
    expect_norms(optim.last_norms(stepped), params, g)


def test_last_norms_are_those_after_clipping() -> None:
    params, (g,) = tree()
    tx = optim.lamb(0.01, record_norms=True, skip_nonfinite=True, **CLIPS["both"])
    _, state = run_step(tx, params, [g])
    (clipped,) = optax_clipped([g], CLIPS["both"])
    expect_norms(optim.last_norms(state), params, clipped)


@pytest.mark.parametrize("rule", [name for name in RULES if RULES[name].slots])
def test_every_rule_records_what_it_measures(rule: str) -> None:
    """Of parameters and gradients before the step; the ratio moves no leaf without."""
    params, (g,) = tree()
    _, state = run_step(limited(rule, 0.01, record_norms=True), params, [g])
    found = optim.last_norms(state)
    assert set(found) == {"dense/kernel", "dense/bias", "scale"}
    for path, norms in found.items():
        p_norm, g_norm = (np.linalg.norm(leaf_at(x, path)) for x in (params, g))
        np.testing.assert_allclose(norms.parameter, p_norm, rtol=1e-5)
        np.testing.assert_allclose(norms.gradient, g_norm, rtol=1e-5)
        assert norms.direction > 0.0
        adapts = RULES[rule].kernels > 1 and path == "dense/kernel"
        assert (norms.ratio != 1.0) == adapts


def test_last_norms_of_stacked_layers_are_vectors() -> None:
    """Within jit those with fewer layers than others end in NaN."""
    params = {"one": jnp.ones((8, 16)), "two": jnp.ones((2, 8)), "three": jnp.ones(3)}
    axes = {"one": None, "two": 0, "three": 0}
    tx = optim.adamw(0.1, record_norms=True, layer_axes=axes)
    _, state = run_step(tx, params, [params])
    assert {k: x.parameter.shape for k, x in optim.last_norms(state).items()} == {
        "one": (),
        "two": (2,),
        "three": (3,),
    }
    inside = jax.jit(optim.last_norms)(state)
    np.testing.assert_allclose(inside["two"].parameter, [8**0.5, 8**0.5, np.nan])
    np.testing.assert_allclose(inside["one"].ratio, [1.0, np.nan, np.nan])


def test_norms_that_were_not_recorded() -> None:
    params, _ = tree()
    with pytest.raises(ValueError, match="with record_norms=True"):
        optim.last_norms(optim.lamb(0.1).init(params))
