"""A run of optax in 32 bits goes on in 8: the curve of its loss has no jump."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from _text import batch_of, read_text
from train_lm import Transformer, loss_of

from octavo import optim

BEFORE, AFTER, LENGTH = 300, 100, 32


def rate(count: Any) -> jax.Array:
    """It goes on where the count is."""
    return 3e-3 * jnp.minimum((count + 1) / 50, 1.0)


PAIRS = {
    "adamw": (
        optax.adamw(rate, b2=0.99, weight_decay=0.1),
        optim.adamw8bit(rate, b2=0.99, weight_decay=0.1, min_quantized_size=0),
    ),
    "lion": (
        optax.lion(lambda t: rate(t) / 5, weight_decay=0.1),
        optim.lion8bit(lambda t: rate(t) / 5, weight_decay=0.1, min_quantized_size=0),
    ),
}


@pytest.fixture(autouse=True)
def promotion() -> Any:
    """optax and Flax rely on implicit promotion."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.parametrize("name", PAIRS)
def test_a_run_of_optax_goes_on_in_8_bits(name: str) -> None:
    theirs, ours = PAIRS[name]
    text, model = read_text(200_000), Transformer(width=32, layers=2, heads=2)
    batches = jnp.stack(
        [batch_of(text, 0, t, 8, LENGTH) for t in range(BEFORE + AFTER)]
    )
    params = model.init(jax.random.key(0), batches[0, :, :-1])["params"]

    def run(tx: Any, params: Any, state: Any, batches: jax.Array) -> Any:
        def step(carry: Any, rows: jax.Array) -> Any:
            params, state = carry
            loss, grads = jax.value_and_grad(loss_of)(params, model.apply, rows)
            return optim.step(tx, grads, state, params), loss

        return jax.jit(lambda *start: jax.lax.scan(step, start, batches))(params, state)

    start = theirs.init(params)
    (params, reached), before = run(theirs, params, start, batches[:BEFORE])
    converted = optim.from_optax(ours.init(params), reached)
    _, exact = run(theirs, params, reached, batches[BEFORE:])
    _, losses = run(ours, params, converted, batches[BEFORE:])

    assert before[:10].mean() - before[-10:].mean() > 1.0  # it has learned
    # From batch to batch the loss differs by this much; the two runs have the same.
    noise = float(jnp.std(jnp.diff(exact))) / np.sqrt(2)
    apart = np.asarray(losses - exact)
    assert np.abs(apart[:10]).max() < noise
    # The mean of as many differences of two runs that are equally good.
    assert abs(apart.mean()) < noise / np.sqrt(AFTER)
