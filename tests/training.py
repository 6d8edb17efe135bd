"""Runs of an optimizer, fused and as optax has it."""

from typing import Any

import jax
import optax

from octavo import optim


def run_step(tx: optim.Transformation, params: Any, grads: list[Any]) -> Any:
    """Parameters and state after fused steps."""
    state, step = tx.init(params), jax.jit(tx.step)
    for g in grads:
        params, state = step(g, state, params)
    return params, state


def run_update(tx: optim.Transformation, params: Any, grads: list[Any]) -> Any:
    """Parameters and state after updates that are then applied."""
    state = tx.init(params)

    @jax.jit
    def step(g: Any, state: Any, params: Any) -> Any:
        updates, state = tx.update(g, state, params)
        return optax.apply_updates(params, updates), state

    for g in grads:
        params, state = step(g, state, params)
    return params, state
