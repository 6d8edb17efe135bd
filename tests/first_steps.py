"""What a user of an installed Octavo does first.

The program trains in both ways, saves and restores, and prints where every module of
Octavo came from, and which could not be imported, as JSON.
"""

import importlib
import json
import pkgutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp

import octavo
from octavo import optim, schedules
from octavo.optim import checkpoint

STEPS = 5


def loss_of(params: Any) -> jax.Array:
    """How far the parameters are from 1."""
    return sum(jnp.mean((p - 1) ** 2) for p in jax.tree.leaves(params))


def by_step(tx: Any, params: Any, state: Any) -> tuple[Any, Any]:
    """The fused step."""
    return tx.step(jax.grad(loss_of)(params), state, params)


def by_update(tx: Any, params: Any, state: Any) -> tuple[Any, Any]:
    """The same in optax's two calls."""
    updates, state = tx.update(jax.grad(loss_of)(params), state, params)
    return optax.apply_updates(params, updates), state


def train(way: Callable[..., Any], tx: Any) -> tuple[Any, Any]:
    """Parameters and state after some steps, which make the loss smaller."""
    params = {"kernel": jnp.zeros((128, 64)), "bias": jnp.zeros(64)}
    state = tx.init(params)
    assert state.mu["kernel"].dtype == jnp.int8
    step, before = jax.jit(lambda *args: way(tx, *args)), loss_of(params)
    for _ in range(STEPS):
        params, state = step(params, state)
    assert loss_of(params) < 0.7 * before
    return params, state


def main(folder: Path) -> None:
    """Train, save, restore and compare; then import all modules."""
    tx = optim.adamw(schedules.LinearLR(0.1, start_factor=0.5, total_iters=STEPS))
    train(by_update, tx)
    trained = dict(zip(("params", "opt_state"), train(by_step, tx), strict=True))
    with ocp.CheckpointManager(folder) as manager:
        checkpoint.save(manager, STEPS, trained)
    restored = checkpoint.restore(folder, tx, jax.eval_shape(lambda: trained))
    same = jax.tree.map(lambda a, b: bool((a == b).all()), trained, restored)
    assert all(jax.tree.leaves(same)), same

    absent = []
    for module in pkgutil.walk_packages(octavo.__path__, "octavo."):
        if not module.name.endswith(".__main__"):
            try:
                importlib.import_module(module.name)
            except ImportError:
                absent.append(module.name)
    files = {
        k: m.__file__ for k, m in sys.modules.items() if k.split(".")[0] == "octavo"
    }
    print(json.dumps({"version": octavo.__version__, "files": files, "absent": absent}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
