"""One of two processes that save together, restore together, and go on.

    python tests/two_processes_checkpoint.py RANK PORT FOLDER

Each has two CPU devices of a mesh of four. Prints "done" once everything holds.
"""

import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding, PartitionSpec

from octavo import optim
from octavo.optim import checkpoint

P = PartitionSpec


def assert_same_shards(a: Any, b: Any) -> None:
    """Equal bits on the devices of this process."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        for mine, other in zip(x.addressable_shards, y.addressable_shards, strict=True):
            assert mine.device == other.device and mine.index == other.index
            assert np.asarray(mine.data).tobytes() == np.asarray(other.data).tobytes()


def main(rank: int, port: str, folder: Path) -> None:
    """What both processes do."""
    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", 2, rank)
    mesh = jax.make_mesh((4,), ("data",))
    jax.set_mesh(mesh)
    shapes = {"kernel": (256, 128), "bias": (8,)}
    shardings = {
        "kernel": NamedSharding(mesh, P("data")),
        "bias": NamedSharding(mesh, P()),
    }

    def start(tx: Any) -> optim.TrainState:
        keys = dict(zip(shapes, jax.random.split(jax.random.key(0)), strict=True))
        params = {k: jax.random.normal(keys[k], shape) for k, shape in shapes.items()}
        params = jax.tree.map(jax.sharding.reshard, params, shardings)
        return optim.TrainState.create(apply_fn=None, params=params, tx=tx)

    step = jax.jit(lambda s: s.apply_gradients(grads=s.params))
    tx, wide = optim.lamb(1e-2), optim.lamb(1e-2, state="32bit")
    state = step(jax.jit(start, static_argnums=0)(tx))
    fresh = jax.jit(start, static_argnums=0)(wide)
    with ocp.CheckpointManager(folder) as manager:
        checkpoint.save(manager, 1, state)
        later = step(state)
        restored = checkpoint.restore(manager, tx, state)
        assert_same_shards(restored, state)
        assert_same_shards(step(restored), later)
        target = jax.eval_shape(lambda: start(tx))
        assert_same_shards(checkpoint.restore(manager, tx, target, shardings), state)
        converted = checkpoint.restore(manager, wide, fresh, convert=True)
        moments = optim.dequantize(state.opt_state)
        stored = {slot: getattr(converted.opt_state, slot) for slot in moments}
        assert_same_shards(stored, moments)
    assert_same_shards(checkpoint.restore(folder, tx, state), state)
    print("done")


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
