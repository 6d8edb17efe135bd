"""What optax wraps around optimizers, and a small tree to step with it."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

PARAMS = {
    "dense": {"kernel": jnp.ones((64, 32)), "bias": jnp.zeros(32)},
    "scale": jnp.ones(()),
}
GRADS = jax.tree.map(lambda p: jnp.full(p.shape, 0.1, p.dtype), PARAMS)


def wrapped(tx: Any) -> dict[str, Any]:
    """The transformation in each of the wrappers."""
    return {
        "chain": optax.chain(optax.clip_by_global_norm(1.0), tx),
        "named_chain": optax.named_chain(("clip", optax.clip(1.0)), ("octavo", tx)),
        "masked": optax.masked(tx, {"dense": True, "scale": False}),
        "partition": optax.partition(
            {"a": tx, "b": optax.sgd(0.1), "none": tx},
            {"dense": {"kernel": "a", "bias": "b"}, "scale": "b"},
        ),
        "multi_steps": optax.MultiSteps(tx, 2),
        "apply_if_finite": optax.apply_if_finite(tx, 3),
        "flatten": optax.flatten(tx),
    }


WRAPPERS = tuple(wrapped(optax.identity()))
