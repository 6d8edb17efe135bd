"""Every preset computes what the implementation that it is named for computes."""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from octavo import optim

from formulas import adamw_float64
from oracle import optax_run
from published import (
    PRESETS,
    Mask,
    Rate,
    Reference,
    Tree,
    lamb_bitsandbytes,
    lamb_deepspeed,
    lamb_nvidia,
    lamb_optax,
    lamb_paper,
    lamb_tf_addons,
    lars_bitsandbytes,
    lars_braintools,
    lars_optax,
    lars_paper,
    percentile_clipped,
)
from training import run_step, run_update

MASK: Mask = {"kernel": True, "bias": False, "zero": True}
ALL: Mask = dict.fromkeys(MASK, True)
RUNS = [run_step, run_update]
# What MLPerf's BERT and ResNet-50 were trained with, far from the defaults.
UNUSUAL = {"lamb": {"b1": 0.66, "b2": 0.996}, "lars": {"momentum": 0.951807}}


def layers(steps: int) -> tuple[Tree, list[Tree]]:
    """A leaf that decays, one that does not, one of zeros; gradients of all sizes.

    Parameters are about 0.5, 30 and 0, and the norm of a step's gradients is between
    0.1 and 100: on both sides of every bound that a preset has.
    """
    rng = np.random.default_rng(0)
    shapes = {"kernel": (96, 40), "bias": (16,), "zero": (8, 16)}
    sizes = {"kernel": 0.5, "bias": 30.0, "zero": 0.0}
    params = {
        k: np.asarray(sizes[k] * rng.normal(size=s), np.float32)
        for k, s in shapes.items()
    }
    spread = {k: np.exp(rng.normal(size=s)) for k, s in shapes.items()}
    grads = [
        {
            k: np.asarray(size * spread[k] * rng.normal(size=s), np.float32)
            for k, s in shapes.items()
        }
        for size in 10.0 ** rng.uniform(-3.0, 0.0, size=steps)
    ]
    return params, grads


def warmup_and_decay(peak: float, steps: int) -> Rate:
    """Linear to the peak and back, a different rate at every step."""
    rise = steps // 4
    counts = np.arange(steps)
    rates = peak * np.minimum((counts + 1) / rise, (steps - counts) / (steps - rise))
    return lambda count: jnp.asarray(rates, jnp.float32)[count]


def to_jax(tree: Tree) -> dict[str, Any]:
    """The same tree of JAX arrays."""
    return {k: jnp.asarray(x) for k, x in tree.items()}


def check_close(got: Any, expected: Any, start: Tree, steps: int = 20) -> None:
    """1e-5 of the largest distance that a value of the leaf has moved.

    And on top, at every step, the two roundings to float32 of the largest value.
    """
    for name, p in start.items():
        exact = np.asarray(expected[name], np.float64)
        moved = float(np.abs(exact - p).max())
        assert moved > 0
        ulp = float(np.spacing(np.float32(np.maximum(np.abs(exact), np.abs(p)).max())))
        np.testing.assert_allclose(
            got[name], exact, rtol=0, atol=1e-5 * moved + steps * ulp, err_msg=name
        )


def optax_adamw(
    params: Tree, grads: list[Tree], rate: Rate, decay: float, mask: Mask
) -> Tree:
    """AdamW, which LAMB of bitsandbytes is where nothing is bounded."""
    return optax_run(optax.adamw(rate, weight_decay=decay, mask=mask), params, grads)


def optax_sgd(
    params: Tree, grads: list[Tree], rate: Rate, decay: float, mask: Mask
) -> Tree:
    """Momentum with L2 decay, which its LARS is where nothing is bounded."""
    decayed = optax.add_decayed_weights(decay, mask)
    return optax_run(optax.chain(decayed, optax.sgd(rate, 0.9)), params, grads)


# References that are the same formula where their differences are switched off.
AGREEING: dict[str, tuple[Reference, Reference, float, Mask]] = {
    "paper, optax": (lamb_paper, lamb_optax, 0.1, MASK),
    "paper, tf-addons": (lamb_paper, lamb_tf_addons, 0.1, ALL),
    "paper, nvidia": (lamb_paper, partial(lamb_nvidia, max_grad_norm=1e9), 0.1, MASK),
    "paper, deepspeed": (
        lamb_paper,
        partial(
            lamb_deepspeed, eps=1e-6, coefficients=(0.0, np.inf), corrects="moments"
        ),
        0.1,
        MASK,
    ),
    "bitsandbytes, adamw": (
        partial(lamb_bitsandbytes, max_unorm=1e9),
        optax_adamw,
        0.1,
        MASK,
    ),
    "lars paper, lars optax": (lars_paper, lars_optax, 0.0, MASK),
    "lars bitsandbytes, sgd": (
        partial(lars_bitsandbytes, max_unorm=1e9),
        optax_sgd,
        0.01,
        MASK,
    ),
}


@pytest.mark.parametrize("pair", AGREEING)
def test_references_agree_where_their_formulas_do(pair: str) -> None:
    one, other, decay, mask = AGREEING[pair]
    params, grads = layers(20)
    rate = warmup_and_decay(10.0 if "lars" in pair else 0.03, 20)
    check_close(
        other(params, grads, rate, decay, mask),
        one(params, grads, rate, decay, mask),
        params,
    )


def test_lars_of_braintools_and_optax_differ_only_in_the_place_of_the_rate() -> None:
    params, grads = layers(20)
    rate = optax.constant_schedule(10.0)
    check_close(
        lars_braintools(params, grads, rate, 0.01, MASK),
        lars_optax(params, grads, rate, 0.01, MASK),
        params,
    )


@pytest.mark.parametrize("run", RUNS, ids=["step", "update"])
@pytest.mark.parametrize("betas", ["default", "unusual"])
@pytest.mark.parametrize("name", PRESETS)
def test_preset_equals_its_reference(
    name: str, betas: str, run: Callable[..., Any]
) -> None:
    case = PRESETS[name]
    arguments = dict(case.arguments)
    if betas == "unusual":
        arguments |= UNUSUAL[name.split("-")[0]]
    rate = warmup_and_decay(case.peak, 20)
    params, grads = layers(20)
    tx = optim.preset(name, rate, mask=MASK, state="32bit", **arguments)
    got, _ = run(tx, to_jax(params), [to_jax(g) for g in grads])
    expected = case.reference(params, grads, rate, mask=MASK, **arguments)
    check_close(got, expected, params)


@pytest.mark.parametrize("run", RUNS, ids=["step", "update"])
@pytest.mark.parametrize("name", ["lamb-bitsandbytes", "lars-bitsandbytes"])
def test_leaves_of_zeros_move_where_bitsandbytes_freezes_them(
    name: str, run: Callable[..., Any]
) -> None:
    """Octavo's deviation: a bound of zero times the norm of zeros is none."""
    case = PRESETS[name]
    rate = warmup_and_decay(case.peak, 20)
    params, grads = layers(1)
    frozen = case.reference(
        params, grads, rate, mask=MASK, **case.arguments, frozen=True
    )
    np.testing.assert_array_equal(frozen["zero"], 0.0)
    tx = optim.preset(name, rate, mask=MASK, state="32bit", **case.arguments)
    got, _ = run(tx, to_jax(params), [to_jax(g) for g in grads])
    # The first direction of Adam, and the first momentum; of zeros, nothing decays.
    g = grads[0]["zero"].astype(np.float64)
    u = g / (np.abs(g) + 1e-8) if name.startswith("lamb") else g
    np.testing.assert_allclose(got["zero"], -float(rate(0)) * u, rtol=1e-5)


@pytest.mark.parametrize(
    ("ours", "theirs", "peak"),
    [
        (partial(optim.lamb, adapt_mask=True), optax.lamb, 0.03),
        (partial(optim.preset, "lamb-optax"), optax.lamb, 0.03),
        (partial(optim.preset, "lars-optax"), optax.lars, 10.0),
    ],
    ids=["lamb", "lamb-optax", "lars-optax"],
)
def test_32bit_equals_optax_over_50_steps(
    ours: Callable[..., Any], theirs: Callable[..., Any], peak: float
) -> None:
    params, grads = layers(50)
    rate = warmup_and_decay(peak, 50)
    tx = ours(rate, weight_decay=0.01, state="32bit")
    got, _ = run_step(tx, to_jax(params), [to_jax(g) for g in grads])
    expected = optax_run(theirs(rate, weight_decay=0.01), params, grads)
    check_close(got, expected, params, steps=50)


@pytest.fixture
def bitsandbytes() -> Any:
    """bitsandbytes, whose import warns of what its CPU build lacks."""
    pytest.importorskip("torch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("bitsandbytes")


def bitsandbytes_run(
    make: Callable[..., Any], params: Tree, grads: list[Tree], rate: Rate
) -> Tree:
    """Parameters after bitsandbytes' own steps, on the CPU."""
    import torch

    leaves = {k: torch.nn.Parameter(torch.tensor(p)) for k, p in params.items()}
    optimizer = make(list(leaves.values()), lr=1.0)
    for count, tree in enumerate(grads):
        for group in optimizer.param_groups:
            group["lr"] = float(rate(count))
        for name, leaf in leaves.items():
            leaf.grad = torch.tensor(tree[name])
        optimizer.step()
    return {k: leaf.detach().numpy() for k, leaf in leaves.items()}


def moving_layers(steps: int) -> tuple[Tree, list[Tree]]:
    """The leaves that bitsandbytes moves."""
    params, grads = layers(steps)
    params["zero"] = params["zero"] + np.float32(0.01)
    return params, grads


def test_references_equal_bitsandbytes(bitsandbytes: Any) -> None:
    params, grads = moving_layers(20)
    decay = {"weight_decay": 0.1}
    rate = warmup_and_decay(0.03, 20)
    check_close(
        bitsandbytes_run(
            partial(bitsandbytes.optim.LAMB32bit, **decay), params, grads, rate
        ),
        lamb_bitsandbytes(
            params, grads, rate, mask=ALL, measures="uncorrected", **decay
        ),
        params,
    )
    rate = warmup_and_decay(0.5, 20)
    check_close(
        bitsandbytes_run(
            partial(bitsandbytes.optim.LARS32bit, momentum=0.9, **decay),
            params,
            grads,
            rate,
        ),
        lars_bitsandbytes(params, grads, rate, mask=ALL, **decay),
        params,
    )


def test_lars_equals_bitsandbytes(bitsandbytes: Any) -> None:
    params, grads = moving_layers(20)
    rate = warmup_and_decay(0.5, 20)
    arguments = {"weight_decay": 0.01, "momentum": 0.9}
    tx = optim.preset("lars-bitsandbytes", rate, state="32bit", **arguments)
    got, _ = run_step(tx, to_jax(params), [to_jax(g) for g in grads])
    make = partial(bitsandbytes.optim.LARS32bit, **arguments)
    check_close(got, bitsandbytes_run(make, params, grads, rate), params)


def test_lamb_equals_bitsandbytes_where_nothing_is_bounded(bitsandbytes: Any) -> None:
    """On CPUs bitsandbytes bounds another norm than on GPUs, whose norm is ours."""
    params, grads = layers(20)
    params = {k: p + np.float32(100.0) for k, p in params.items()}
    rate = warmup_and_decay(3.0, 20)
    tx = optim.preset("lamb-bitsandbytes", rate, weight_decay=0.01, state="32bit")
    got, _ = run_step(tx, to_jax(params), [to_jax(g) for g in grads])
    make = partial(bitsandbytes.optim.LAMB32bit, weight_decay=0.01)
    check_close(got, bitsandbytes_run(make, params, grads, rate), params)


@pytest.mark.parametrize("percentile", [5, 50])
@pytest.mark.parametrize("run", RUNS, ids=["step", "update"])
def test_percentile_clipping_equals_that_of_bitsandbytes(
    run: Callable[..., Any], percentile: int
) -> None:
    params, grads = layers(150)  # the window of 100 comes round
    for tree in grads[::7]:
        tree["kernel"] *= 50
    for tree in grads[3::11]:
        tree["bias"] *= 200
    tx = optim.adam(0.01, state="32bit", percentile_clipping=percentile)
    got, _ = run(tx, to_jax(params), [to_jax(g) for g in grads])
    unclipped, _ = run(
        optim.adam(0.01, state="32bit"), to_jax(params), [to_jax(g) for g in grads]
    )
    expected = {
        k: adamw_float64(p, percentile_clipped([g[k] for g in grads], percentile), 0.01)
        for k, p in params.items()
    }
    check_close(got, expected, params, steps=150)
    for name, exact in expected.items():
        moved = np.abs(exact - params[name]).max()
        assert np.abs(unclipped[name] - exact).max() > 0.1 * moved
