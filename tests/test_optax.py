"""Octavo's optimizers are optax transformations, to the letter, and wrap like them."""

import inspect
import itertools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from octavo import optim
from octavo.optim.storage.state import states_in

from cases import OPTIMIZERS, RULES, params_and_grads
from wrappers import GRADS, PARAMS, WRAPPERS, wrapped

# One row of each optimizer, and the one that keeps nothing.
EACH = [*OPTIMIZERS, "descent"]
all_rules = pytest.mark.parametrize("rule", EACH)
# With the defaults, small leaves are not quantized: nothing then differs from optax.
QUANTIZED, DEFAULT = 0, 4096


def make(rule: str, size: int = QUANTIZED, **options: Any) -> optim.Transformation:
    case = RULES[rule]
    return case.ours(1e-2, **case.kwargs, min_quantized_size=size, **options)


def added(params: Any, updates: Any) -> Any:
    return jax.tree.map(
        lambda p, u: jnp.asarray(p + u, jnp.result_type(p)), params, updates
    )


@pytest.fixture(autouse=True)
def promotion() -> Any:
    """optax's own wrappers rely on implicit promotion."""
    with jax.numpy_dtype_promotion("standard"):
        yield


# Wrappers see a transformation: all of them with one pass and with two, else in turns.
WRAPPED = [
    *((rule, QUANTIZED, wrapper) for rule in ("adamw", "lamb") for wrapper in WRAPPERS),
    *(("adamw", DEFAULT, wrapper) for wrapper in WRAPPERS),
    *zip(EACH, itertools.repeat(QUANTIZED), itertools.cycle(WRAPPERS)),
]


@pytest.mark.parametrize(("rule", "size", "wrapper"), sorted({*WRAPPED}))
def test_wrapped(rule: str, size: int, wrapper: str) -> None:
    tx = optax.with_extra_args_support(wrapped(make(rule, size))[wrapper])
    start = tx.init(PARAMS)

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        updates, new = tx.update(GRADS, state, params, value=1.0)
        chex.assert_trees_all_equal_shapes_and_dtypes(new, state)
        return optax.apply_updates(params, updates), new

    params, state = PARAMS, start
    for _ in range(4):
        params, state = step(params, state)
    assert not np.allclose(params["dense"]["kernel"], PARAMS["dense"]["kernel"])
    chex.assert_tree_all_finite(params)
    if wrapper == "freeze":
        for x, y in ((params, PARAMS), (params["dense"], PARAMS["dense"])):
            frozen = "scale" if x is params else "bias"
            chex.assert_trees_all_equal(x[frozen], y[frozen])
    for own in states_in(state):
        assert optax.tree.get(own, "count") > 0


@all_rules
def test_lookahead_steps_its_fast_parameters(rule: str) -> None:
    tx = optax.lookahead(make(rule), sync_period=2, slow_step_size=0.5)
    params = optax.LookaheadParams.init_synced(PARAMS)
    state = tx.init(params)
    update = jax.jit(tx.update)
    for _ in range(2):
        updates, state = update(GRADS, state, params)
        params = optax.apply_updates(params, updates)
    chex.assert_trees_all_close(params.fast, params.slow)
    moved = params.fast["dense"]["kernel"] - PARAMS["dense"]["kernel"]
    plain, alone = PARAMS, make(rule)
    own, step = alone.init(PARAMS), jax.jit(alone.step)
    for _ in range(2):
        plain, own = step(GRADS, own, plain)
    whole = plain["dense"]["kernel"] - PARAMS["dense"]["kernel"]
    # Half of the way; p is about 1, and so rounded by 6e-8 in every sum.
    np.testing.assert_allclose(moved, whole / 2, rtol=1e-5, atol=3e-7)


@all_rules
def test_inject_hyperparams_gives_the_same_updates_and_codes(rule: str) -> None:
    case = RULES[rule]
    plain = case.ours(1e-2, **case.kwargs, min_quantized_size=0)
    injected = optax.inject_hyperparams(case.ours, static_args="min_quantized_size")(
        learning_rate=1e-2, **case.kwargs, min_quantized_size=0
    )
    a, b = plain.init(PARAMS), injected.init(PARAMS)
    for _ in range(3):
        mine, a = jax.jit(plain.update)(GRADS, a, PARAMS)
        theirs, b = jax.jit(injected.update)(GRADS, b, PARAMS)
        chex.assert_trees_all_close(mine, theirs, rtol=1e-6)
    chex.assert_trees_all_close(a.trees, b.inner_state.trees)
    given = inspect.signature(case.ours).parameters.values()
    numbers = {p.name for p in given if isinstance(p.default, float)}
    numbers |= {k for k, x in case.kwargs.items() if not isinstance(x, bool)}
    assert set(b.hyperparams) >= {"learning_rate"} | numbers


def test_inject_hyperparams_without_static_args_says_what_to_do() -> None:
    tx = optax.inject_hyperparams(optim.adam)(1e-3, block_size=64)
    with pytest.raises(ValueError, match=r"static_args='block_size'"):
        tx.init(PARAMS)


@all_rules
def test_unknown_extra_arguments_are_ignored(rule: str) -> None:
    tx = make(rule)
    assert isinstance(tx, optax.GradientTransformationExtraArgs)
    tx.update(GRADS, tx.init(PARAMS), PARAMS, value=1.0, unknown="yes")


@all_rules
def test_tree_map_params_and_tree_get_and_set(rule: str) -> None:
    tx = make(rule)
    state = tx.init(PARAMS)
    mapped = optax.tree_map_params(tx, lambda x: x, state)
    chex.assert_trees_all_equal(mapped, state)
    specs = jax.tree.map(lambda p: f"spec{p.ndim}", PARAMS)
    with_specs = optax.tree_map_params(
        tx, lambda _, spec: spec, state, specs, transform_non_params=lambda _: "none"
    )
    for tree in with_specs.trees.values():
        assert tree == specs
    assert with_specs.count == "none"
    for name, tree in state.trees.items():
        chex.assert_trees_all_equal(optax.tree.get(state, name), tree)
    assert optax.tree.get(state, "count") == 0
    assert optax.tree.set(state, count=jnp.int32(7)).count == 7


ODD: list[Any] = [
    {},
    (),
    1.0,
    {"a": None, "b": np.ones((4, 40), np.float32), "c": 2.0},
    {"empty": jnp.zeros((0, 4)), "scalar": jnp.ones(()), "count": jnp.arange(3)},
]


@all_rules
@pytest.mark.parametrize("params", ODD, ids=range(len(ODD)))
def test_odd_trees(rule: str, params: Any) -> None:
    """Without leaves, with None, Python floats, numpy, empty ones and integers."""
    tx = make(rule)
    updates, state = tx.update(updates=params, state=tx.init(params), params=params)
    chex.assert_trees_all_equal_shapes_and_dtypes(
        updates, jax.tree.map(jnp.asarray, params)
    )
    stepped, _ = tx.step(params, state, params)
    chex.assert_trees_all_equal_structs(stepped, params)


@all_rules
def test_arrays_that_are_donated_are_written_over(rule: str) -> None:
    tx = make(rule)
    params = jax.tree.map(jnp.array, PARAMS)
    state = jax.jit(tx.init)(params)
    step = jax.jit(lambda p, s: tx.step(GRADS, s, p), donate_argnums=(0, 1))
    expected = jax.jit(tx.step)(GRADS, state, params)
    got = step(params, state)
    chex.assert_trees_all_equal(got, expected)
    assert params["dense"]["kernel"].is_deleted()


@all_rules
def test_init_of_shapes_alone(rule: str) -> None:
    tx = make(rule)
    shapes = jax.eval_shape(lambda: PARAMS)
    expected = jax.eval_shape(tx.init, PARAMS)
    chex.assert_trees_all_equal_shapes_and_dtypes(
        jax.eval_shape(tx.init, shapes), expected
    )
    chex.assert_trees_all_equal_shapes_and_dtypes(tx.init(shapes), expected)


@all_rules
def test_scan_vmap_and_cond(rule: str) -> None:
    tx = make(rule)
    p, (g,) = params_and_grads((64, 32))

    def body(carry: Any, _: Any) -> Any:
        params, state = carry
        updates, state = tx.update(g, state, params)
        return (optax.apply_updates(params, updates), state), None

    (scanned, _), _ = jax.lax.scan(body, (p, tx.init(p)), length=3)
    stacked = jnp.stack([p, p])
    states = jax.vmap(tx.init)(stacked)
    step = jax.vmap(tx.step)
    for _ in range(3):
        stacked, states = step(jnp.stack([g, g]), states, stacked)
    np.testing.assert_allclose(stacked[0], scanned, rtol=1e-5, atol=1e-6)

    state = tx.init(p)
    jax.lax.cond(jnp.array(True), lambda s: tx.update(g, s, p)[1], lambda s: s, state)


@all_rules
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "complex64"])
def test_updates_have_the_gradients_type_and_state_is_stable(
    rule: str, dtype: str
) -> None:
    tx = make(rule)
    params = {"w": jnp.ones((2, 3), dtype), "v": jnp.ones(5, dtype)}
    state = tx.init(params)
    updates, new = jax.jit(tx.update)(params, state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(new, state)
    stepped, new = jax.jit(tx.step)(params, state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes((stepped, new), (params, state))


@all_rules
def test_float64_leaves_are_computed_in_float64(rule: str) -> None:
    with jax.enable_x64(True):
        tx = make(rule)
        params = {"a": jnp.full((8, 8), 1.0, "float64"), "b": jnp.ones(3, "float32")}
        state = tx.init(params)
        stepped, new = jax.jit(tx.step)(params, state, params)
        chex.assert_trees_all_equal_shapes_and_dtypes((stepped, new), (params, state))


@pytest.mark.parametrize(
    ("rule", "size"), [*((rule, QUANTIZED) for rule in EACH), ("adamw", DEFAULT)]
)
def test_converges(rule: str, size: int) -> None:
    """A parabola and Rosenbrock's valley, as in optax's own tests."""
    case = RULES[rule]
    # Adagrad's steps get shorter: all of them reach two learning rates times the root
    # of their number, 100 here, and the valley is 2 long.
    rate = 0.1 if rule == "adagrad" else 1e-2
    tx = case.ours(rate, **case.kwargs, min_quantized_size=size)
    target = jnp.asarray([[-1.0, 2.0], [0.5, 3.0]])
    decay = RULES[rule].kwargs.get("weight_decay", 0.0)

    def parabola(p: Any) -> Any:
        return jnp.sum((p - target) ** 2)

    def rosenbrock(p: Any) -> Any:
        return jnp.sum(100 * (p[1] - p[0] ** 2) ** 2 + (1 - p[0]) ** 2)

    for loss, goal in ((parabola, target), (rosenbrock, jnp.ones((2, 2)))):
        if decay and loss is rosenbrock:
            continue  # its minimum with decay is elsewhere

        def body(carry: Any, _: Any, loss: Any = loss) -> Any:
            params, state = carry
            return tx.step(jax.grad(loss)(params), state, params), None

        start = jnp.zeros((2, 2))
        (p, _), _ = jax.lax.scan(body, (start, tx.init(start)), length=10_000)
        # With decay the minimum of the parabola moves by at most decay's share.
        np.testing.assert_allclose(p, goal, rtol=3e-2 + decay, atol=3e-2)
