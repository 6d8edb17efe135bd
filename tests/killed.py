"""Trains a small model that is killed again and again while it saves; then once more.

    python tests/killed.py FOLDER KILLS SEED [paged]

With "paged", the state of one leaf is in host memory. One process imports everything,
and forks each of those that train: they share what they have compiled, too. Prints a
line of JSON for each kill, and leaves the last steps in FOLDER/killed and, of a run
that nobody killed, in FOLDER/whole.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp

from octavo import optim
from octavo.optim import checkpoint

STEPS = 100
SHAPES = {"embed": (512, 64), "kernel": (64, 256), "bias": (256,)}
PAGED = "paged" in sys.argv[4:]
if PAGED:
    SHAPES["embed"] = (2048, 64)


def fresh() -> optim.TrainState:
    """The run before its first step."""
    rng = np.random.default_rng(0)
    params = {k: jnp.asarray(rng.normal(size=s), "float32") for k, s in SHAPES.items()}
    rates = optax.linear_schedule(0.01, 0.0, STEPS)
    options: dict[str, Any] = {"grad_clip_norm": 100.0}
    if PAGED:
        # Bound to a device, all of it: a free array would make a program of its own.
        params = jax.device_put(params, jax.devices()[0])
        options |= {"paged": True, "page_bytes": 200_000}
    tx = optim.adamw(rates, **options)
    made = optim.TrainState.create(apply_fn=None, params=params, tx=tx)
    if PAGED:
        made = made.replace(step=jax.device_put(jnp.int32(0), jax.devices()[0]))
    return made


@jax.jit
def batch(step: jax.Array) -> dict[str, jax.Array]:
    """Gradients, which depend on the step's number as a batch would."""
    key = jax.random.fold_in(jax.random.key(1), step)
    return {k: jax.random.normal(key, shape) for k, shape in SHAPES.items()}


def train(folder: Path, every: int, tell: int) -> None:
    """From the newest complete step to the end.

    Args:
      folder: of the checkpoints.
      every: steps between two of them.
      tell: file descriptor to which to write "restored STEP" and "saving STEP"; at the
        end, how many programs there were, and where the first moment of `embed` is.
    """
    step = jax.jit(lambda s, g: s.apply_gradients(grads=g), donate_argnums=0)
    kept = ocp.CheckpointManagerOptions(max_to_keep=3)
    with ocp.CheckpointManager(folder, options=kept) as manager:
        state = fresh()
        if manager.latest_step() is not None:
            state = checkpoint.restore(manager, state.tx, state)
        os.write(tell, f"restored {state.step}\n".encode())
        while (n := int(state.step)) < STEPS:
            state = step(state, batch(state.step))
            if (n + 1) % every == 0:
                checkpoint.save(manager, n + 1, state)
                os.write(tell, f"saving {n + 1}\n".encode())
        memory = state.opt_state.mu["embed"].sharding.memory_kind
        os.write(tell, f"{step._cache_size()} {memory}\n".encode())


def start(folder: Path, every: int) -> tuple[int, int]:
    """The id of a process that trains, and the descriptor from which it tells."""
    ours, theirs = os.pipe()
    process = os.fork()
    if process:
        os.close(theirs)
        return process, ours
    os.close(ours)
    code = 1
    try:
        cache = str(folder.parent / "compiled")
        jax.config.update("jax_compilation_cache_dir", cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
        train(folder, every, theirs)
        code = 0
    finally:
        sys.stderr.flush()
        os._exit(code)


def newest(folder: Path) -> int:
    """The newest complete step: Orbax gives a folder its name once it is complete."""
    return max((int(f.name) for f in folder.iterdir() if f.name.isdigit()), default=0)


def kill(folder: Path, chance: random.Random) -> dict[str, int | None]:
    """Start, kill at a random moment, and tell what was found and what was left."""
    found = newest(folder) if folder.exists() else 0
    process, tells = start(folder, every=1)
    with os.fdopen(tells) as told:
        lines = []
        if PAGED:  # the second checkpoint is complete
            lines = [told.readline() for _ in range(4)]
        elif chance.random() < 0.2:  # while it starts, or restores
            time.sleep(chance.uniform(0.0, 2.0))
        else:
            lines = [told.readline() for _ in range(chance.randint(1, 3))]
            time.sleep(chance.uniform(0.0, 0.2))
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        lines += told.readlines()
    restored = int(lines[0].split()[1]) if lines else None
    unfinished = sum("tmp" in f.name for f in folder.iterdir())
    return {"found": found, "restored": restored, "unfinished": unfinished}


def finish(folder: Path) -> int:
    """Train to the end, with one checkpoint there; tells from which step."""
    process, tells = start(folder, every=STEPS)
    with os.fdopen(tells) as told:
        first, *_, last = told.read().splitlines()
    _, status = os.waitpid(process, 0)
    assert status == 0
    assert not PAGED or last == "1 pinned_host", last
    return int(first.split()[1])


def main(folder: Path, kills: int, seed: int) -> None:
    """Both runs."""
    finish(folder / "whole")
    chance = random.Random(seed)
    for _ in range(kills):
        print(json.dumps(kill(folder / "killed", chance)), flush=True)
    resumed = finish(folder / "killed")
    if PAGED:
        print(json.dumps({"resumed": resumed}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
