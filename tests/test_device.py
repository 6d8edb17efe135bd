"""On a real accelerator: `JAX_PLATFORMS=cuda make test ARGS=tests/test_device.py`."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from octavo import optim

from cases import ADAPTING, FORMATS, KINDS, RULES, params_and_grads
from kernels import expect_codes_near

KERNELS = {"gpu": "triton", "tpu": "tpu"}
pytestmark = pytest.mark.skipif(
    jax.default_backend() not in KERNELS,
    reason=f"no accelerator: JAX runs on {jax.default_backend()}",
)
SHAPES = [
    (5025, 768),
    (12, 64, 768),
    (1000, 333),
    (3, 3, 64, 128),
    (1, 8192),
    (8192,),
]


def run(
    tx: optim.Transformation, p: Any, grads: list[Any], *, update: bool = False
) -> Any:
    def step(p: Any, state: Any, g: Any) -> Any:
        if not update:
            return tx.step(g, state, p)
        updates, state = tx.update(g, state, p)
        return p + updates, state

    step = jax.jit(step, donate_argnums=(0, 1))
    carry = (jnp.copy(p), jax.jit(tx.init)(p))
    for g in grads:
        carry = step(*carry, g)
    return carry


def expect_what_xla_gives(
    make: Any, kernel: str, p: Any, grads: list[Any], *, update: bool = False
) -> Any:
    """Square roots and divisions of the two compilers differ by a few units.

    Returns:
      The parameters by the kernel.
    """
    got, got_state = run(make(backend=kernel), p, grads, update=update)
    expected, expected_state = run(make(backend="xla"), p, grads, update=update)
    for name in got_state.slots:
        expect_codes_near(getattr(got_state, name), getattr(expected_state, name))
    # A code of m is 6 % of an update of 0.01: 1/127 of 7.3, the largest m / sqrt(v).
    # One of v is 10 % of it at most, where v is 1/25,000 of its block's largest.
    got, expected = (np.asarray(x.astype(jnp.float32)) for x in (got, expected))
    unit = float(jnp.finfo(p.dtype).eps)  # of weights that round to a neighbour instead
    difference = np.abs(got - expected)
    assert np.all(difference <= 1e-3 + unit * np.abs(expected))
    rounded = unit > 1e-6
    assert difference.mean() < (1e-3 * np.abs(expected).mean() if rounded else 1e-6)
    return got


def making(rule: str, **options: Any) -> Any:
    """A function of the backend."""
    case = RULES[rule]
    return lambda backend: case.ours(0.01, **case.kwargs, **options, backend=backend)


@pytest.mark.parametrize("state", FORMATS)
@pytest.mark.parametrize("rule", RULES)
def test_every_rule_and_format_agrees_with_xla(rule: str, state: str) -> None:
    p, grads = params_and_grads((4096, 1024), steps=3)
    kernel = KERNELS[jax.default_backend()]
    expect_what_xla_gives(making(rule, state=state), kernel, p, grads)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rule", ["adamw", *ADAPTING])
def test_every_shape_agrees_with_xla(rule: str, shape: tuple[int, ...]) -> None:
    p, grads = params_and_grads(shape, steps=3)
    kernel = KERNELS[jax.default_backend()]
    expect_what_xla_gives(making(rule), kernel, p, grads)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("rule", KINDS)
def test_every_type_of_weights_agrees_with_xla(rule: str, dtype: Any) -> None:
    p, grads = params_and_grads((1024, 512), steps=3, dtype=dtype)
    kernel = KERNELS[jax.default_backend()]
    expect_what_xla_gives(making(rule), kernel, p, grads)


@pytest.mark.parametrize("weights", ["nearest", "remainder8", "remainder16"])
@pytest.mark.parametrize("rule", ["adamw", *ADAPTING])
def test_weights_agree_with_xla_however_they_are_rounded(
    rule: str, weights: str
) -> None:
    p, grads = params_and_grads((1024, 512), steps=3, dtype=jnp.bfloat16)
    kernel = KERNELS[jax.default_backend()]
    expect_what_xla_gives(making(rule, weights=weights), kernel, p, grads)


@pytest.mark.parametrize("rule", KINDS)
def test_updates_agree_with_xla(rule: str) -> None:
    p, grads = params_and_grads((1024, 512), steps=3)
    kernel = KERNELS[jax.default_backend()]
    expect_what_xla_gives(making(rule), kernel, p, grads, update=True)


@pytest.mark.parametrize("rule", KINDS)
def test_a_block_that_is_not_finite_is_kept(rule: str) -> None:
    p, (first, second) = params_and_grads((1024, 512), steps=2)
    bad = second.at[100, 7].set(jnp.nan)
    kernel = KERNELS[jax.default_backend()]
    got = expect_what_xla_gives(making(rule), kernel, p, [first, bad])
    once, _ = run(making(rule)(kernel), p, [first])
    np.testing.assert_array_equal(got[96:128, 7], np.asarray(once)[96:128, 7])
    assert np.isfinite(got).all()


@pytest.mark.parametrize("shape", [(1024, 512), (12, 64, 768)], ids=str)
@pytest.mark.parametrize("rule", ["adamw", "ademamix", "lion", "sgd"])
def test_mosaic_gpu_agrees_with_xla(rule: str, shape: tuple[int, ...]) -> None:
    if jax.default_backend() != "gpu":
        pytest.skip("for GPUs")
    for dtype in (jnp.float32, jnp.bfloat16):
        p, grads = params_and_grads(shape, steps=3, dtype=dtype)
        expect_what_xla_gives(making(rule), "mosaic_gpu", p, grads)


@pytest.mark.parametrize("rule", KINDS)
def test_clipped_and_skipped_steps_agree_with_xla(rule: str) -> None:
    p, grads = params_and_grads((1024, 512), steps=3)
    grads[1] = grads[1].at[3, 5].set(jnp.inf)
    kernel = KERNELS[jax.default_backend()]
    make = making(rule, grad_clip_norm=1.0, skip_nonfinite=True)
    expect_what_xla_gives(make, kernel, p, grads)


def test_the_best_backend_is_the_kernel() -> None:
    if jax.device_count() > 1:
        pytest.skip("several devices: XLA, which can partition, is the default")
    p, (g,) = params_and_grads((1024, 512))
    tx = optim.adamw(0.01)
    text = jax.jit(tx.step).lower(g, tx.init(p), p).compile().as_text()
    assert "octavo_step" in text
