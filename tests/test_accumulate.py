"""Gradients of micro-batches become one step: that of their mean."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from octavo import optim

from aot import backend_of, compile_for
from meshes import AXES, mesh_of

STEPS = 3
SHAPES = {"w": (256, 128), "b": (128,)}


def tree(seed: int, dtype: Any = jnp.float32) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    return {k: jnp.asarray(rng.normal(size=s), dtype) for k, s in SHAPES.items()}


def expect_equal(a: Any, b: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_in_float32_it_is_multi_steps_bit_for_bit() -> None:
    """Not so what an optimizer makes of it, which depends on what XLA contracts."""
    tx = optax.identity()
    ours, theirs = optim.accumulate(tx, STEPS), optax.MultiSteps(tx, STEPS)

    @jax.jit
    @jax.numpy_dtype_promotion("standard")  # theirs needs it
    def both(g: Any, a: Any, b: Any, p: Any) -> Any:
        u, a = ours.update(g, a, p)
        v, b = theirs.update(g, b, p)
        return a, b, u, v

    p = tree(0)
    a, b = ours.init(p), theirs.init(p)
    for seed in range(1, 2 * STEPS + 2):
        a, b, u, v = both(tree(seed), a, b, p)
        counts = a.mini_step, a.gradient_step
        expect_equal(counts, (b.mini_step, b.gradient_step))
        if seed % STEPS:  # theirs is zero after a step
            expect_equal(a.acc_grads, b.acc_grads)
        expect_equal(u, v)


@pytest.mark.parametrize("inner", ["octavo", "chain", "optax"])
def test_step_is_update_and_a_step_on_the_mean(inner: str) -> None:
    tx: Any = {
        "octavo": optim.sgd(0.5),
        "chain": optax.chain(optax.clip(10.0), optim.sgd(0.5)),
        "optax": optax.sgd(0.5),
    }[inner]
    tx = optim.accumulate(tx, STEPS)
    params, state = tree(0), tx.init(tree(0))
    mean = {k: np.zeros(s) for k, s in SHAPES.items()}
    step = jax.jit(tx.step)
    for seed in range(1, STEPS + 1):
        before = params
        params, state = step(tree(seed), state, params)
        mean = {
            k: mean[k] + np.asarray(x, float) / STEPS for k, x in tree(seed).items()
        }
        if seed < STEPS:
            expect_equal(params, before)
    for name, p in params.items():
        expected = np.asarray(tree(0)[name], float) - 0.5 * mean[name]
        np.testing.assert_allclose(
            p, expected, atol=4e-7
        )  # three sums of 1, an ulp each


def test_in_bfloat16_the_mean_is_unbiased() -> None:
    """A gradient of 1 and seven of nearly nothing, which rounding would lose."""
    tx = optim.accumulate(optim.sgd(1.0), 8, dtype="bfloat16")
    params = jnp.zeros((512, 256))
    state = tx.init(params)
    assert state.acc_grads.dtype == jnp.bfloat16
    assert optim.memory_report(tx, params).bytes == pytest.approx(
        2 * params.size, abs=1000
    )
    step = jax.jit(tx.step)
    for k in range(8):
        params, state = step(
            jnp.full_like(params, 1.0 if k == 0 else 1e-3), state, params
        )
    exact = (1.0 + 7e-3) / 8
    error = -np.asarray(params, float) - exact
    assert abs(error.mean()) < 3 * error.std() / np.sqrt(error.size)
    assert np.abs(error).max() < 8 * 2.0**-8  # a unit of each mean, which are below 1


def test_a_batch_that_is_not_finite_is_gone_after_the_step() -> None:
    tx = optim.accumulate(optim.adamw(0.1, skip_nonfinite=True), 2)
    params, state = tree(0), tx.init(tree(0))
    step = jax.jit(tx.step)
    bad = jax.tree.map(lambda p: jnp.full_like(p, jnp.inf), params)
    for g in (bad, tree(1)):
        params, state = step(g, state, params)
    expect_equal(params, tree(0))
    for g in (tree(1), tree(2)):
        params, state = step(g, state, params)
    assert all(bool(jnp.isfinite(p).all()) for p in params.values())
    assert float(jnp.abs(params["w"] - tree(0)["w"]).max()) > 0.01


@pytest.mark.parametrize("axes", AXES)
def test_it_is_sharded_like_the_state_in_scan_and_train_state(axes: str) -> None:
    mesh = mesh_of("4x2", axes)
    where = {"w": NamedSharding(mesh, P(None, "m")), "b": NamedSharding(mesh, P())}
    params = jax.device_put(tree(0), where)
    inner = optim.adamw(1e-2, state_sharding="d")
    tx = optim.accumulate(inner, STEPS, dtype="bfloat16").bind(params)

    @jax.jit
    def epoch(state: Any, grads: Any) -> Any:
        def one(state: Any, g: Any) -> Any:
            return state.apply_gradients(grads=g), None

        return jax.lax.scan(one, state, grads)[0]

    grads = [tree(seed) for seed in range(1, 2 * STEPS + 1)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *grads)
    spread = jax.tree.map(lambda s: NamedSharding(mesh, P(None, *s.spec)), where)
    with jax.set_mesh(mesh):
        state = optim.TrainState.create(apply_fn=None, params=params, tx=tx)
        state = epoch(state, jax.device_put(stacked, spread))
    assert state.params["w"].sharding.spec == P(None, "m")
    for kept in (state.opt_state.acc_grads, state.opt_state.inner_opt_state.mu):
        assert kept["w"].sharding.spec == P("d", "m")
    one = optim.accumulate(optim.adamw(1e-2), STEPS, dtype="bfloat16")
    alone, s = tree(0), one.init(tree(0))
    step = jax.jit(one.step)
    for g in grads:
        alone, s = step(g, s, alone)
    # XLA rounds the mean once or twice, in another program otherwise, and with it that
    # of a few values falls on another bfloat16.
    other = np.asarray(
        s.acc_grads["w"] != jax.device_get(state.opt_state.acc_grads["w"])
    )
    assert other.mean() < 1e-3
    unit = np.spacing(np.float32(np.abs(alone["w"]).max()))
    apart = np.abs(alone["w"] - jax.device_get(state.params["w"]))
    assert (apart <= 2 * unit).mean() > 0.999


def test_meshes_with_axes_of_both_types() -> None:
    """States, and means, in smaller shards over an axis that types show."""
    mesh = jax.make_mesh(
        (4, 2), ("d", "m"), axis_types=(AxisType.Auto, AxisType.Explicit)
    )
    where = {"w": NamedSharding(mesh, P("d")), "b": NamedSharding(mesh, P())}
    params = jax.device_put(tree(0), where)
    tx = optim.accumulate(optim.adamw(1e-2, state_sharding="m"), 2).bind(params)
    alone = optim.accumulate(optim.adamw(1e-2), 2)
    runs = []
    for own, p in ((tx, params), (alone, tree(0))):
        step, state = jax.jit(own.step), own.init(p)
        for seed in (1, 2, 3, 4):
            g = jax.device_put(tree(seed), jax.tree.map(lambda x: x.sharding, p))
            p, state = step(g, state, p)
        runs.append((p, state))
    (found, state), (want, _) = runs
    for name, sharding in where.items():
        assert found[name].sharding.is_equivalent_to(sharding, found[name].ndim)
        assert float(jnp.abs(want[name] - tree(0)[name]).max()) > 0.01
        np.testing.assert_allclose(found[name], want[name], rtol=2**-22)
    assert state.acc_grads["b"].sharding.spec == P("m")


@pytest.mark.parametrize("target", ["v6e", "sm_90"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nothing_of_a_leafs_size_is_temporary(target: str, dtype: str) -> None:
    tx = optim.adamw(1e-3, backend=backend_of(target))
    tx = optim.accumulate(tx, 4, dtype=dtype)
    p = {"w": jax.ShapeDtypeStruct((2048, 1024), jnp.float32)}
    state = jax.eval_shape(tx.init, p)
    compiled = compile_for(
        target, lambda p, s, g: tx.step(g, s, p), p, state, p, donate=(0, 1)
    )
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < 2**16
    assert memory.output_size_in_bytes - memory.alias_size_in_bytes < 2**12


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps=0 must be 1 or more"),
        ({"steps": 2.0}, "steps=2.0 must be an int"),
        ({"dtype": "float16"}, "dtype=float16 must be float32 or bfloat16"),
        ({"seed": "a"}, "seed='a' must be an int"),
    ],
    ids=str,
)
def test_what_is_not_allowed_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        optim.accumulate(optim.adamw(1e-3), **{"steps": 2, **change})


def test_other_trees_are_named() -> None:
    tx = optim.accumulate(optim.adamw(1e-3), 2)
    with pytest.raises(
        ValueError, match="gradients are not a tree like the parameters"
    ):
        tx.step({"other": jnp.ones(3)}, tx.init(tree(0)), tree(0))
