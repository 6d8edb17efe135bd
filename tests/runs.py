"""What the tests of checkpoints save: a small model, its steps, its folder."""

from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from octavo import optim
from octavo.optim import checkpoint

SHAPES = {"embed": (512, 64), "layer": {"kernel": (64, 256), "bias": (256,)}}
MATRICES = {"embed": True, "layer": {"kernel": True, "bias": False}}


def random(seed: int) -> Any:
    """A tree of parameters, or of gradients."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape), "float32"),
        SHAPES,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def fresh(tx: Any, params: Any = None) -> optim.TrainState:
    """A run before its first step."""
    params = random(0) if params is None else params
    return optim.TrainState.create(apply_fn=None, params=params, tx=tx)


@jax.jit
def step(state: optim.TrainState, grads: Any) -> optim.TrainState:
    """One step."""
    return state.apply_gradients(grads=grads)


def trained(state: optim.TrainState, steps: int) -> optim.TrainState:
    """A run after more steps, whose gradients depend on their numbers."""
    for _ in range(steps):
        grads = random(1 + int(state.step))
        places = jax.tree.map(lambda p: p.sharding, state.params)
        state = step(state, jax.device_put(grads, places))
    return state


TX = optim.adamw(1e-2)


@cache
def run() -> optim.TrainState:
    """Three steps of the optimizer of most tests."""
    return trained(fresh(TX), 3)


def saved(folder: Path, tree: Any, **options: Any) -> Path:
    """The folder of a checkpoint of a tree, as step 3."""
    with ocp.CheckpointManager(folder) as manager:
        assert checkpoint.save(manager, 3, tree, **options)
    return folder


def shapes(tree: Any) -> Any:
    """The shapes of a tree and where they lie, without arrays."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree
    )


def ulps(a: Any, b: Any, before: Any) -> float:
    """Largest difference, in last places of the value or of its leaf's update."""
    found = []
    for x, y, start in zip(*map(jax.tree.leaves, (a, b, before)), strict=True):
        x, y, start = (np.asarray(leaf) for leaf in (x, y, start))
        unit = np.spacing(np.maximum(np.abs(y), np.abs(y - start).max()))
        found.append((np.abs(x - y) / unit).max())
    return float(max(found))
