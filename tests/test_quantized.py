"""Transformations of optax whose moments are stored in 8 bits between their steps."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from octavo import optim
from octavo.optim.storage.state import states_in

from wrappers import GRADS, PARAMS, WRAPPERS, wrapped

contrib = optax.contrib
SMALL = 1024  # the kernel is quantized, the bias and the scale are not


class Case(NamedTuple):
    """A transformation, and the format tag of each part of its state."""

    make: Callable[[], optax.GradientTransformation]
    tags: dict[str, str]
    options: dict[str, Any] = {}  # noqa: RUF012


ADAM = "mu=ratio8,nu=bits8"
ROOT = {"slots": {"nu": "root"}}
CASES: dict[str, Case] = {
    "muon": Case(
        lambda: contrib.muon(0.1),
        {
            "inner_states/adam/inner_state/0": ADAM,
            "inner_states/muon/inner_state/0": "mu=mulaw8",
        },
    ),
    "adamax": Case(lambda: optax.adamax(0.1), {"0": ADAM}, ROOT),
    "nadam": Case(lambda: optax.nadam(0.1), {"0": ADAM}),
    "adabelief": Case(lambda: optax.adabelief(0.1), {"0": ADAM}),
    "adafactor": Case(
        lambda: optax.adafactor(0.1, 16, momentum=0.9), {"4": "ema=mulaw8"}
    ),
    "novograd": Case(lambda: optax.novograd(0.1), {"0": "mu=mulaw8"}),
    "yogi": Case(lambda: optax.yogi(0.1), {"0": ADAM}),
    "prodigy": Case(
        contrib.prodigy,
        {"state": "exp_avg=ratio8,exp_avg_sq=bits8,grad_sum=mulaw16"},
    ),
    "schedule_free": Case(
        lambda: contrib.schedule_free_adamw(0.1),
        {"base_optimizer_state/0": "nu=bits8"},
    ),
    "ademamix": Case(
        lambda: contrib.ademamix(0.1), {"0": "m1=ratio8,m2=mulaw16,nu=bits8"}
    ),
    "sophia": Case(lambda: contrib.sophia(0.1), {"0": "mu=mulaw8,nu=mulaw8"}),
    "trace": Case(lambda: optax.trace(0.9), {"state": "trace=mulaw8"}),
    "ema": Case(lambda: optax.ema(0.9), {"state": "ema=mulaw8"}),
    "amsgrad": Case(
        lambda: optax.amsgrad(0.1), {"0": "mu=ratio8,nu=bits8,nu_max=bits8"}
    ),
    "adan": Case(lambda: optax.adan(0.1), {"0": "m=ratio8,v=ratio8,n=bits8,g=ratio8"}),
}
each = pytest.mark.parametrize("name", CASES)


@pytest.fixture(autouse=True)
def promotion() -> Any:
    """optax itself relies on implicit promotion."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def named(state: Any) -> dict[str, np.ndarray]:
    """The arrays of a state of optax by their paths; those of a whole below `state`."""
    flat, _ = jax.tree_util.tree_flatten_with_path(state)
    paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in flat]
    arrays = [np.asarray(x) for _, x in flat]
    whole = {f"state/{path}": x for path, x in zip(paths, arrays, strict=True)}
    return dict(zip(paths, arrays, strict=True)) | whole


def quantized(tx: Any, **options: Any) -> Any:
    return optim.quantized(tx, **{"min_quantized_size": SMALL, **options})


def gradients(seed: int) -> Any:
    """Of either sign, and of sizes from 1/2 to 3/2: squares are within a decade."""
    rng = np.random.default_rng(seed)

    def of(p: Any) -> jax.Array:
        size = rng.uniform(0.5, 1.5, jnp.shape(p)) * rng.choice([-1, 1], jnp.shape(p))
        return jnp.asarray(size, jnp.float32)

    return jax.tree.map(of, PARAMS)


def loss(params: Any) -> jax.Array:
    """Sophia's, whose second derivatives it takes."""
    return sum(jnp.sum(p**2) for p in jax.tree.leaves(params))


@functools.cache
def stepped(name: str) -> tuple[Any, Any]:
    """A transformation's state after two steps of optax, and its update after a third.

    The third is of what the quantized one decodes, and optax's own.
    """
    tx = optax.with_extra_args_support(CASES[name].make())
    state = tx.init(PARAMS)
    for seed in (0, 1):
        _, state = tx.update(gradients(seed), state, PARAMS, obj_fn=loss)
    return tx, state


@each
def test_an_update_is_optax_own_of_the_decoded_moments(name: str) -> None:
    """And what is stored afterwards is within a code of optax's moments."""
    tx, exact = stepped(name)
    q = quantized(tx, **CASES[name].options)
    state = optim.from_optax(q.init(PARAMS), exact)
    assert {k: next(iter(x.extra["format"])) for k, x in state.moments.items()} == (
        CASES[name].tags
    )
    g = gradients(2)
    updates, new = jax.jit(lambda s: q.update(g, s, PARAMS, obj_fn=loss))(state)
    chex.assert_trees_all_equal_shapes_and_dtypes(new, q.init(PARAMS))
    theirs, exact = jax.jit(lambda s: tx.update(g, s, PARAMS, obj_fn=loss))(
        q.inner_state(state, PARAMS)
    )
    # XLA fuses the two programs in other ways; muon orthogonalizes by ten products of
    # matrices, in which a last place (2**-24) grows a thousandfold at most.
    chex.assert_trees_all_close(updates, theirs, rtol=1e-4, atol=1e-5)
    expect_within_a_code(name, q.inner_state(new, PARAMS), exact, new)


def expect_within_a_code(name: str, stored: Any, exact: Any, state: Any) -> None:
    """Of the kernel: how far what is stored may be from what was to be stored.

    ratio8 has 127 steps up to the block's largest, whose scale is rounded up by 1/128
    at most. A step of mulaw8 is a 32nd of y = 1 + 14.75 |m| / scale at most; 16 bits
    are finer. Of a root, bits8 has 15 % down to 1e-3 of the largest.
    """
    for key, part in state.moments.items():
        tag = next(iter(part.extra["format"]))
        forms = dict(slot.split("=") for slot in tag.split(","))
        pairs = {
            slot: [named(x).get(f"{key}/{slot}/dense/kernel") for x in (stored, exact)]
            for slot in forms
        }
        if any(x is None for pair in pairs.values() for x in pair):
            continue  # muon's kernel has no Adam
        squares = [pairs[slot] for slot, form in forms.items() if form == "bits8"]
        roots = [np.sqrt(x) for x in squares[0]] if squares else []
        roots = squares[0] if CASES[name].options == ROOT else roots
        for slot, form in forms.items():
            ours, theirs = pairs[slot]
            if form == "bits8":
                np.testing.assert_allclose(*roots, rtol=0.15)
                continue
            if form == "ratio8":
                ours, theirs = ours / roots[0], theirs / roots[1]
            largest = np.abs(theirs).max() * 129 / 128
            steps, share = (127, 1e-5) if form == "ratio8" else (14.75 * 32, 1 / 32)
            np.testing.assert_allclose(
                ours, theirs, rtol=share, atol=largest / steps * 1.0001
            )


def test_rounding_is_unbiased() -> None:
    """Without gradients a momentum decays by its factor, though codes cannot."""
    tx = quantized(optax.trace(0.99))
    params = jnp.zeros((64, 128))
    state = tx.init(params)
    start = jnp.linspace(-1.0, 1.0, params.size).reshape(params.shape)
    update = jax.jit(tx.update)
    _, state = update(start, state)
    for _ in range(20):
        moments, state = update(jnp.zeros_like(params), state)
    # Each of 20 roundings moves a value by a step at most, a 31st of the largest, with
    # a standard deviation of at most half of one; the mean of 8192 values, weighted by
    # their signs: four standard deviations.
    most = 4 * 0.5 * (129 / 128) / 31 * np.sqrt(20 / params.size)
    expected = 0.99**20 * np.abs(np.asarray(start)).mean()
    assert abs(float(jnp.mean(moments * jnp.sign(start))) - expected) < most


def test_a_block_that_is_not_finite_keeps_what_it_had() -> None:
    """The update is optax's own: not finite in that one value."""
    tx = quantized(optax.adam(0.1))
    g = gradients(0)["dense"]["kernel"]
    state = tx.init(g)
    update = jax.jit(tx.update)
    _, before = update(g, state)
    updates, after = update(g.at[3, 5].set(jnp.nan), before)
    assert np.isnan(updates).sum() == 1
    old, new = before.moments["0"], after.moments["0"]
    # 64 x 32 has 16 blocks of 4 down each column.
    for slot in ("mu", "nu"):
        a, b = (np.asarray(getattr(x, slot)) for x in (old, new))
        assert (a[:4, 5] == b[:4, 5]).all()
        scales = [np.asarray(getattr(x, slot + "_scale")) for x in (old, new)]
        assert scales[0][0, 5] == scales[1][0, 5]
        assert (scales[0] != scales[1]).mean() > 0.5
    assert np.isfinite(tx.inner_state(after, g)[0].mu).all()


def test_types_are_those_of_the_other_transformation() -> None:
    """Moments in bfloat16 are seen as such; 32-bit leaves are not widened for it."""
    seen = []

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        seen.append(jax.tree.map(lambda x: x.dtype, state))
        return adam.update(updates, state, params)

    adam = optax.scale_by_adam(mu_dtype=jnp.bfloat16)
    tx = quantized(optax.GradientTransformation(adam.init, update))
    state = tx.init(PARAMS)
    updates, new = jax.eval_shape(tx.update, GRADS, state, PARAMS)
    chex.assert_trees_all_equal_shapes_and_dtypes(new, state)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, GRADS)
    assert set(jax.tree.leaves(seen[0].mu)) == {np.dtype(jnp.bfloat16)}
    assert set(jax.tree.leaves(seen[0].nu)) == {np.dtype(jnp.float32)}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wraps_and_is_wrapped(wrapper: str) -> None:
    """A state keeps its structure and types, whatever is inside and outside."""
    both = [wrapped(quantized(optax.adam(0.1)))[wrapper]]
    if wrapper != "flatten":  # see `test_what_cannot_be_quantized`
        both.append(quantized(wrapped(optax.adam(0.1))[wrapper]))
    for tx in both:
        update = functools.partial(optax.with_extra_args_support(tx).update, value=1.0)
        state = jax.eval_shape(tx.init, PARAMS)
        assert states_in(state)
        _, new = jax.eval_shape(update, GRADS, state, PARAMS)
        chex.assert_trees_all_equal_shapes_and_dtypes(new, state)


def test_inject_hyperparams_inside_and_outside() -> None:
    inner = optax.inject_hyperparams(optax.sgd)(learning_rate=0.1, momentum=0.9)
    outer = optax.inject_hyperparams(
        lambda learning_rate: quantized(optax.sgd(learning_rate, momentum=0.9))
    )
    for tx in (quantized(inner), outer(learning_rate=0.1)):
        state = optax.tree.set(tx.init(PARAMS), learning_rate=jnp.float32(0.2))
        updates, _ = tx.update(GRADS, state, PARAMS)
        np.testing.assert_allclose(updates["scale"], -0.02, rtol=1e-6)


def test_runs_within_scan_cond_and_vmap() -> None:
    tx = quantized(optax.adam(0.1))

    def steps(params: Any, grads: Any) -> Any:
        def body(state: Any, _: Any) -> Any:
            new = jax.lax.cond(
                state.moments["0"].count < 2,
                lambda: tx.update(grads, state, params)[1],
                lambda: state,
            )
            return new, None

        return jax.lax.scan(body, tx.init(params), length=3)[0]

    two = jax.tree.map(lambda x: jnp.stack([x, x]), (PARAMS, GRADS))
    state = jax.eval_shape(jax.vmap(steps), *two)
    codes = state.moments["0"].mu["dense"]["kernel"]
    assert (codes.shape, codes.dtype) == ((2, 64, 32), np.int8)


def test_gives_on_what_it_is_given() -> None:
    """Extra arguments, and parameters or none."""
    got = []

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        got.append((params is None, extra))
        return updates, state

    trace = optax.trace(0.9)
    tx = quantized(optax.GradientTransformationExtraArgs(trace.init, update))
    state = tx.init(PARAMS)
    tx.update(GRADS, state, value=1.0)
    tx.update(GRADS, state, PARAMS)
    assert got == [(True, {"value": 1.0}), (False, {})]


def test_schedule_free_parameters_are_read_off_the_inner_state() -> None:
    tx = contrib.schedule_free_adamw(0.1)
    q = quantized(tx)
    ours = contrib.schedule_free_eval_params(
        q.inner_state(q.init(PARAMS), PARAMS), PARAMS
    )
    theirs = contrib.schedule_free_eval_params(tx.init(PARAMS), PARAMS)
    chex.assert_trees_all_close(ours, theirs)


@pytest.mark.parametrize("name", ["paged", "weights", "min_shards", "state_sharding"])
def test_options_of_own_optimizers_are_refused(name: str) -> None:
    with pytest.raises(
        TypeError, match=rf"no '{name}', .* write optim.adamw\(\.\.\., {name}="
    ):
        optim.quantized(optax.adam(1e-3), **{name: True})
