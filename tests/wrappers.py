"""What optax wraps around optimizers, and a small tree to step with it."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib

PARAMS = {
    "dense": {"kernel": jnp.ones((64, 32)), "bias": jnp.zeros(32)},
    "scale": jnp.ones(()),
}
GRADS = jax.tree.map(lambda p: jnp.full(p.shape, 0.1, p.dtype), PARAMS)


def wrapped(tx: Any) -> dict[str, Any]:
    """The transformation in each of the wrappers."""
    finite = optax.skip_not_finite
    return {
        "chain": optax.chain(optax.clip_by_global_norm(1.0), tx),
        "named_chain": optax.named_chain(("clip", optax.clip(1.0)), ("octavo", tx)),
        "masked": optax.masked(tx, {"dense": True, "scale": False}),
        "partition": optax.partition(
            {"a": tx, "b": optax.sgd(0.1), "none": tx},
            {"dense": {"kernel": "a", "bias": "b"}, "scale": "b"},
        ),
        "freeze": optax.transforms.selective_transform(
            tx, freeze_mask={"dense": {"kernel": False, "bias": True}, "scale": True}
        ),
        "multi_steps": optax.MultiSteps(tx, 2, should_skip_update_fn=finite),
        "apply_if_finite": optax.apply_if_finite(tx, 3),
        "conditionally": optax.conditionally_transform(tx, lambda step: step % 2 == 0),
        "flatten": optax.flatten(tx),
        "plateau": optax.chain(tx, optax.contrib.reduce_on_plateau(patience=1)),
        "mechanize": optax.contrib.mechanize(tx, s_init=0.1),
        "schedule_free": optax.contrib.schedule_free(tx, 1e-2, b1=0.9),
    }


WRAPPERS = tuple(wrapped(optax.identity()))
