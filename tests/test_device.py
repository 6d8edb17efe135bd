"""On a real accelerator: `JAX_PLATFORMS=cuda make test ARGS=tests/test_device.py`."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from octavo import optim

from cases import FORMATS, RULES, params_and_grads

KERNELS = {"gpu": "triton", "tpu": "tpu"}
pytestmark = pytest.mark.skipif(
    jax.default_backend() not in KERNELS,
    reason=f"no accelerator: JAX runs on {jax.default_backend()}",
)
SHAPES = [
    (4096, 1024),
    (5025, 768),
    (12, 64, 768),
    (1000, 333),
    (3, 3, 64, 128),
    (1, 8192),
]


def run(tx: optim.Transformation, p: Any, grads: list[Any]) -> Any:
    step = jax.jit(lambda p, s, g: tx.step(g, s, p), donate_argnums=(0, 1))
    carry = (jnp.copy(p), tx.init(p))
    for g in grads:
        carry = step(*carry, g)
    return carry


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("state", FORMATS)
@pytest.mark.parametrize("rule", RULES)
def test_the_kernel_agrees_with_xla(
    rule: str, state: str, shape: tuple[int, ...]
) -> None:
    """Square roots and divisions of the two compilers differ by a few units."""
    case = RULES[rule]
    p, grads = params_and_grads(shape, steps=3)
    kernel = KERNELS[jax.default_backend()]
    got, got_state = run(
        case.ours(0.01, **case.kwargs, state=state, backend=kernel), p, grads
    )
    expected, expected_state = run(
        case.ours(0.01, **case.kwargs, state=state, backend="xla"), p, grads
    )
    for name in got_state.slots:
        codes = getattr(got_state, name)
        if codes.dtype == jnp.int8:
            other = getattr(expected_state, name).astype(jnp.int32)
            difference = np.abs(np.asarray(codes.astype(jnp.int32) - other))
            wrapped = np.minimum(difference, 256 - difference)
            assert wrapped.max() <= 1
            assert (wrapped > 0).mean() < 1e-3
    # A code of m is 6 % of an update of 0.01: 1/127 of 7.3, the largest m / sqrt(v).
    # One of v is 10 % of it at most, where v is 1/25,000 of its block's largest.
    assert np.abs(np.asarray(got - expected)).max() < 1e-3
    assert np.abs(np.asarray(got - expected)).mean() < 1e-6


def test_the_best_backend_is_the_kernel() -> None:
    if jax.device_count() > 1:
        pytest.skip("several devices: XLA, which can partition, is the default")
    p, (g,) = params_and_grads((1024, 512))
    tx = optim.adamw(0.01)
    text = jax.jit(tx.step).lower(g, tx.init(p), p).compile().as_text()
    assert "octavo_step" in text
