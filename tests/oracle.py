"""Reference runs: optax, which does not survive strict promotion of types."""

from typing import Any

import jax
import optax


def optax_run(tx: Any, params: Any, grads: list[Any]) -> Any:
    """Parameters after a step with each of the gradients."""
    with jax.numpy_dtype_promotion("standard"):
        state = tx.init(params)
        step = jax.jit(tx.update)
        for g in grads:
            updates, state = step(g, state, params)
            params = optax.apply_updates(params, updates)
    return params
