"""Parameters with matrices of several kinds, and steps of Muon with them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from optax.contrib import MuonDimensionNumbers as Numbers

from octavo import optim

STEPS = 20
SHAPES: dict[str, tuple[int, ...]] = {
    **{f"layer_{k}/kernel": (64, 128) for k in range(3)},
    "down": (128, 64),
    "odd": (33, 17),
    "replicated": (64, 64),
    "stack": (8, 32, 64),
    "heads": (64, 4, 16),
    "embed": (128, 32),
    "bias": (128,),
}
SPECS = {
    **{f"layer_{k}/kernel": P("d", "m") for k in range(3)},
    "down": P(None, "m"),
    "odd": P(),
    "replicated": P(),
    "stack": P("d", None, "m"),
    "heads": P("d", "m", None),
    "embed": P("d"),
    "bias": P("m"),
}
NUMBERS: dict[str, Any] = {
    **{name: Numbers() for name, shape in SHAPES.items() if len(shape) == 2},
    "stack": Numbers(1, 2),
    "heads": Numbers(0, (1, 2)),
    "embed": None,
    "bias": None,
}


def values(seed: int, scale: float = 1.0) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    shapes = SHAPES.items()
    return {k: jnp.asarray(scale * rng.normal(size=s), jnp.float32) for k, s in shapes}


def stepped(
    tx: Any, params: Any, steps: int = STEPS, donate: Any = (0, 1)
) -> tuple[Any, Any]:
    """The parameters and the state after some steps."""
    step = jax.jit(lambda p, s, g: optim.step(tx, g, s, p), donate_argnums=donate)
    state = tx.init(params)
    shardings = jax.tree.map(lambda p: p.sharding, params)
    params = jax.tree.map(jnp.copy, params)
    for k in range(steps):
        params, state = step(params, state, jax.device_put(values(k + 1), shardings))
    return params, state


def expect_near(ours: Any, theirs: Any, start: Any, tolerance: float) -> None:
    """Differences, as shares of the largest move of each leaf."""
    for name, p in start.items():
        move = np.max(np.abs(np.asarray(theirs[name]) - np.asarray(p)))
        error = np.max(np.abs(np.asarray(ours[name]) - np.asarray(theirs[name])))
        assert error <= tolerance * move, (name, error / move)
