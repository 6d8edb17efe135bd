"""Stacked layers train as separate leaves do; what ratios measure, bound and skip."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from octavo import optim
from octavo.pallas_kernels import Slot

from cases import ADAPTING, FORMATS, KINDS, RULES, params_and_grads
from training import run_step

LAYERS = 3
# Where the stacked leaves have their axis of layers.
STACKED: dict[str, dict[str, int]] = {
    "first": {"kernel": 0, "bias": 0},
    "middle": {"kernel": 1, "bias": 0},
    "last": {"kernel": -1, "bias": -1},
}
adapting = pytest.mark.parametrize("rule", ADAPTING)


def make(rule: str, **options: Any) -> optim.Transformation:
    """The optimizer, at a rate at which 20 steps move every leaf."""
    return RULES[rule].ours(0.1, **{**RULES[rule].kwargs, **options})


def slots_of(rule: str) -> tuple[Slot, ...]:
    """The moments of a row of `RULES`."""
    return make(rule).optimizer.rule.slots


def norms_after(
    tx: optim.Transformation, params: Any, grads: Any
) -> tuple[Any, dict[str, optim.LayerNorms]]:
    """Parameters and norms after one step."""
    params, state = run_step(tx, params, [grads])
    return params, optim.last_norms(state)


def layers_and_grads(shape: tuple[int, int], steps: int) -> tuple[Any, list[Any]]:
    """Layers of a kernel and a bias, of different scale; their gradients."""
    layers, grads = [], []
    for k in range(LAYERS):
        kernel, kernel_grads = params_and_grads(shape, steps, seed=2 * k)
        bias, bias_grads = params_and_grads(shape[1:], steps, seed=2 * k + 1)
        layers.append({"kernel": (k + 1) * kernel, "bias": bias})
        pairs = zip(kernel_grads, bias_grads, strict=True)
        grads.append([{"kernel": g / 10**k, "bias": b} for g, b in pairs])
    return layers, [list(step) for step in zip(*grads, strict=True)]


def stack(layers: list[Any], axes: dict[str, int]) -> Any:
    """One tree whose leaves stack those of many."""
    return {
        name: jnp.stack([layer[name] for layer in layers], axis=axis)
        for name, axis in axes.items()
    }


def run_both(
    rule: str, axes: dict[str, int], shape: tuple[int, int], **options: Any
) -> tuple[Any, Any, Any]:
    """Start, and ends, of a stacked model and of its unstacked twin, stacked then."""
    layers, grads = layers_and_grads(shape, steps=20)
    start = stack(layers, axes)
    stacked = [stack(g, axes) for g in grads]
    together, _ = run_step(make(rule, layer_axes=axes, **options), start, stacked)
    apart, _ = run_step(make(rule, **options), layers, grads)
    return start, together, stack(apart, axes)


# What scales a layer's step by itself.
SCALED = [
    *((rule, {}) for rule in ADAPTING),
    *((rule, {"max_unorm": 0.5}) for rule in KINDS if RULES[rule].max_unorm),
]


@pytest.mark.parametrize("where", STACKED)
@pytest.mark.parametrize(("rule", "options"), SCALED, ids=str)
def test_stacked_layers_train_as_separate_ones(
    rule: str, options: dict[str, Any], where: str
) -> None:
    start, together, apart = run_both(
        rule, STACKED[where], (24, 40), state="32bit", **options
    )
    for name in start:
        assert np.abs(apart[name] - start[name]).max() > 0.1
        # Sums in another order: some 2**-22 of a ratio, and so of what a step moves.
        np.testing.assert_allclose(together[name], apart[name], rtol=1e-6, atol=1e-6)


@adapting
def test_layers_that_are_not_named_train_differently(rule: str) -> None:
    """So that the test above cannot pass without `layer_axes`."""
    layers, grads = layers_and_grads((24, 40), steps=20)
    axes = STACKED["first"]
    start, stacked = stack(layers, axes), [stack(g, axes) for g in grads]
    ends = [
        run_step(make(rule, layer_axes=given, state="32bit"), start, stacked)[0]
        for given in (None, 0)
    ]
    for name in start:
        assert np.abs(ends[0][name] - ends[1][name]).max() > 0.01


@pytest.mark.parametrize("where", STACKED)
@adapting
def test_stacked_8bit_layers_stay_near_separate_ones(rule: str, where: str) -> None:
    """Other blocks and other random numbers: less than a code of what they move.

    Steps divide by the root of second moments, which halves their error.
    """
    axes = STACKED[where]
    start, together, apart = run_both(rule, axes, (64, 96), min_quantized_size=0)
    kinds = [(s.signed, s.relative_to is not None) for s in slots_of(rule)]
    worst = max(FORMATS["8bit"][k].worst / (1 if k[0] else 2) for k in kinds)
    for name, axis in axes.items():
        lost, moved = (
            np.linalg.norm(np.moveaxis(x, axis, 0).reshape(LAYERS, -1), axis=1)
            for x in (together[name] - apart[name], apart[name] - start[name])
        )
        assert (lost < worst * moved).all()


PREFIXES: dict[str, Any] = {
    "numpy": {"layers": np.int64(0), "embed": None},
    "prefix": {"layers": 0, "embed": None},
    "negative": {"layers": {"kernel": -3, "bias": -2}, "embed": None},
    "tuples": {"layers": {"kernel": (0,), "bias": (-2,)}, "embed": ()},
    "path": lambda path: 0 if path.startswith("layers/") else None,
}


@pytest.mark.parametrize("form", PREFIXES)
def test_layer_axes_of_some_leaves(form: str) -> None:
    params = {
        "layers": {"kernel": jnp.ones((3, 24, 40)), "bias": jnp.ones((3, 40))},
        "embed": jnp.ones((48, 40)),
    }
    tx = make("lars", layer_axes=PREFIXES[form], record_norms=True)
    _, norms = norms_after(tx, params, params)
    assert norms["layers/kernel"].ratio.shape == (3,)
    assert norms["layers/bias"].ratio.shape == (3,)
    assert norms["embed"].ratio.shape == ()


@pytest.mark.parametrize(("axes", "count"), [(0, 2), (-4, 2), ((0, 1), 6), ((1,), 3)])
def test_layer_axes_of_all_leaves(axes: Any, count: int) -> None:
    params = {"a": jnp.ones((2, 3, 16, 8)), "b": jnp.ones((2, 3, 8, 16))}
    tx = make("lars", layer_axes=axes, record_norms=True)
    _, norms = norms_after(tx, params, params)
    assert {x.ratio.shape for x in norms.values()} == {(count,)}


@adapting
def test_two_axes_of_layers_are_one_of_their_product(rule: str) -> None:
    p, grads = params_and_grads((2, 3, 24, 40), steps=5)
    p = p * jnp.arange(1.0, 7.0).reshape(2, 3, 1, 1)
    ends = [
        run_step(
            make(rule, layer_axes=axes, state="32bit"),
            p.reshape(shape),
            [g.reshape(shape) for g in grads],
        )[0]
        for axes, shape in (((0, 1), p.shape), (0, (6, 24, 40)))
    ]
    np.testing.assert_allclose(ends[0].reshape(ends[1].shape), ends[1], rtol=1e-6)


@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        ((64, 24, 40), 0),
        ((24, 64, 40), 1),
        ((24, 40, 64), 2),
        ((24, 40, 64), -1),
        ((8, 64, 24, 40), (0, 1)),
        ((64, 128), 0),
        ((128, 64), 1),
    ],
    ids=str,
)
def test_no_block_spans_two_layers(shape: tuple[int, ...], axes: Any) -> None:
    """Not even where layers are the longest axis."""
    tx = optim.lamb(0.1, layer_axes=axes)
    scale = jax.eval_shape(tx.init, jnp.ones(shape)).mu_scale
    shortened = [n != m for n, m in zip(shape, scale.shape, strict=True)]
    assert sum(shortened) == 1
    for axis in axes if isinstance(axes, tuple) else (axes,):
        assert not shortened[axis]


def test_what_has_a_ratio_by_default_is_a_matter_of_a_layers_rank() -> None:
    params = {
        "kernel": jnp.full((3, 24, 40), 2.0),
        "bias": jnp.full((3, 40), 2.0),
        "scale": jnp.full(3, 2.0),
    }
    for axes, adapted in (
        (0, {"kernel": True, "bias": False, "scale": False}),
        (None, {"kernel": True, "bias": True, "scale": False}),
    ):
        tx = optim.lamb(0.1, layer_axes=axes, record_norms=True)
        _, norms = norms_after(tx, params, params)
        # |p| is twice |u|, whose values are all 1.
        for name, adapts in adapted.items():
            expected = 2.0 if adapts else 1.0
            np.testing.assert_allclose(norms[name].ratio, expected, rtol=1e-5)


@adapting
def test_a_layer_without_norm_has_ratio_1(rule: str) -> None:
    """Of zeros, or with a gradient of zeros; its neighbours keep theirs."""
    p, (g,) = params_and_grads((4, 24, 40))
    p, g = p.at[1].set(0.0), g.at[2].set(0.0)
    tx = make(rule, weight_decay=0.0, layer_axes=0, record_norms=True)
    after, norms = norms_after(tx, p, g)
    (recorded,) = norms.values()
    np.testing.assert_array_equal(recorded.ratio == 1.0, [False, True, True, False])
    assert recorded.parameter[1] == 0.0 and recorded.direction[2] == 0.0
    assert np.isfinite(after).all()
    np.testing.assert_array_equal(after[2], p[2])
    # That of Adam, or of gradient descent.
    plain = make(rule, weight_decay=0.0, layer_axes=0, adapt_mask=False)
    expected, _ = run_step(plain, p, [g])
    np.testing.assert_allclose(after[1], expected[1], rtol=1e-6)
    assert (after[1] != p[1]).all()


SIZES = jnp.asarray([1e-3, 1.0, 1e3, 0.0]).reshape(4, 1, 1)


@pytest.mark.parametrize(
    ("bounds", "expected"),
    [
        ({}, [1e-3, 1.0, 1e3, 1.0]),
        ({"trust_ratio_bounds": (6.0, 600.0)}, [0.1, 1.0, 10.0, 1.0]),
        ({"ratio_bounds": (0.01, 10.0)}, [0.01, 1.0, 10.0, 1.0]),
        ({"ratio_bounds": (2.0, 3.0)}, [2.0, 2.0, 3.0, 1.0]),
        (
            {"trust_ratio_bounds": (0.0, 600.0), "ratio_bounds": (0.5, 100.0)},
            [0.5, 1.0, 10.0, 1.0],
        ),
    ],
)
def test_bounds_of_the_ratio_and_of_the_weights_norm(
    bounds: dict[str, Any], expected: list[float]
) -> None:
    """Layers of norm 0.06, 60, 60,000 and 0; the first direction's is 60.

    No bound moves a layer without norm, whose ratio is 1.
    """
    p = jnp.ones((4, 60, 60)) * SIZES
    options = {"layer_axes": 0, "record_norms": True, "state": "32bit"}
    tx = optim.lamb(0.1, **options, **bounds)
    _, norms = norms_after(tx, p, jnp.ones_like(p))
    np.testing.assert_allclose(norms[""].ratio, expected, rtol=1e-5)


def test_without_averaging_gradients_enter_with_weight_1() -> None:
    """The first moment and, without weight decay, the direction are 10 times larger."""
    p, grads = params_and_grads((24, 40), steps=5)
    ends, moments = [], []
    for averaging in (True, False):
        tx = optim.lamb(0.01, adapt_mask=False, state="32bit", grad_averaging=averaging)
        end, state = run_step(tx, p, grads)
        ends.append(end - p)
        moments.append(state.mu)
    # Roundings of p, at most 4, at each of 5 steps.
    np.testing.assert_allclose(ends[1], 10.0 * ends[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(moments[1], 10.0 * moments[0], rtol=1e-5, atol=1e-6)


def test_where_the_learning_rate_enters_matters_only_where_it_changes() -> None:
    p, grads = params_and_grads((24, 40), steps=20)

    def moved(rate: Any, first: bool) -> Any:
        tx = optim.lars(
            rate, trust_coefficient=0.5, learning_rate_first=first, state="32bit"
        )
        return run_step(tx, p, grads)[0] - p

    constant = [moved(0.1, first) for first in (True, False)]
    np.testing.assert_allclose(constant[0], constant[1], rtol=1e-5, atol=1e-5)
    # The rate drops: momentum of full size remains in one, and not in the other.
    dropping = [
        moved(lambda count: jnp.where(count < 10, 0.1, 0.001), first)
        for first in (True, False)
    ]
    difference = np.linalg.norm(dropping[0] - dropping[1])
    assert difference > 0.1 * np.linalg.norm(dropping[0])


def ratios(state: Any, steps: int = 200) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Trust ratios of LAMB in this state and in 32 bits, from the same gradients.

    A network with one hidden layer learns noisy labels in minibatches; the gradients
    are those along the 32-bit run.
    """
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(1024, 64)), jnp.float32)
    labels = (np.asarray(x) @ rng.normal(size=(64, 32))).argmax(axis=1)
    labels = jnp.where(rng.random(1024) < 0.2, rng.integers(0, 32, 1024), labels)
    params = {
        "up": jnp.asarray(rng.normal(size=(64, 128)) / 8, jnp.float32),
        "down": jnp.asarray(rng.normal(size=(128, 32)) / 11, jnp.float32),
    }
    batches = jnp.asarray(rng.integers(0, 1024, (steps, 256)))
    full, low = (optim.lamb(0.01, record_norms=True, state=s) for s in ("32bit", state))

    def loss(params: Any, batch: Any) -> Any:
        hidden = jax.nn.relu(x[batch] @ params["up"])
        logits = jax.nn.log_softmax(hidden @ params["down"])
        return -jnp.take_along_axis(logits, labels[batch][:, None], axis=1).mean()

    def body(carry: Any, batch: Any) -> Any:
        exact, stored = carry
        grads = jax.grad(loss)(exact[0], batch)
        exact, stored = full.step(grads, *exact[::-1]), low.step(grads, *stored[::-1])
        norms = [optim.last_norms(state) for _, state in (exact, stored)]
        return (exact, stored), {k: tuple(n[k].ratio for n in norms) for k in params}

    start = ((params, full.init(params)), (params, low.init(params)))
    _, found = jax.jit(lambda c: jax.lax.scan(body, c, batches))(start)
    return jax.tree.map(np.asarray, found)


@pytest.mark.parametrize("mu", ["bf16", "8bit"])
def test_ratios_of_8bit_lamb_are_those_of_32_bits(mu: str) -> None:
    for name, (exact, got) in ratios({"mu": mu, "nu": "8bit"}).items():
        assert exact.max() > 2 * exact.min()
        np.testing.assert_allclose(got, exact, rtol=0.01, err_msg=name)
