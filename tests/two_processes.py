"""Five steps of LAMB on four devices: `python two_processes.py COUNT RANK PORT OUT`.

Each of COUNT processes has its part of the devices, and writes what is on them.
"""

import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from octavo import optim

from meshes import named

STEPS = 5
# Sums of up to two parts, or of four.
LEAVES: dict[str, tuple[tuple[int, ...], P]] = {
    "replicated": ((64, 64), P()),
    "rows": ((128, 64), P("d")),
    "both": ((128, 64), P("d", "m")),
    "layers/first": ((8, 64, 64), P("d", None, "m")),
    "layers/last": ((4, 64, 64), P(None, "d", "m")),
    "bias": ((64,), P("m")),
}


def main(count: int, rank: int, port: int, out: Path) -> None:
    jax.config.update("jax_num_cpu_devices", 4 // count)
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    if count > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"localhost:{port}", count, rank)
    assert jax.device_count() == 4 and jax.process_count() == count
    found = {}
    for axes in AxisType.Explicit, AxisType.Auto:
        mesh = jax.make_mesh((2, 2), ("d", "m"), axis_types=(axes,) * 2)
        for name, x in named(trained(mesh, axes)).items():
            for shard in x.addressable_shards:
                device = jax.devices().index(shard.device)
                bits = np.asarray(shard.data).view(f"u{x.dtype.itemsize}")
                found[f"{axes.name}/{name}/{device}"] = bits
    np.savez(out / f"{count}-{rank}.npz", **found)


def trained(mesh: Mesh, axes: AxisType) -> Any:
    """Parameters and state."""
    placed = {name: NamedSharding(mesh, spec) for name, (_, spec) in LEAVES.items()}
    tx = optim.lamb(
        0.01,
        weight_decay=0.1,
        layer_axes=lambda path: 0 if path.startswith("layers") else None,
        record_norms=True,
        sharding=placed if axes == AxisType.Auto else None,
    )
    step = jax.jit(lambda p, s, g: tx.step(g, s, p), donate_argnums=(0, 1))
    params = spread(0, placed)
    state = tx.init(params)
    for t in range(STEPS):
        params, state = step(params, state, spread(1 + t, placed))
    return params, state


def spread(seed: int, placed: dict[str, NamedSharding]) -> dict[str, jax.Array]:
    """The same numbers, however many processes there are."""
    rng, tree = np.random.default_rng(seed), {}
    for name, (shape, _) in LEAVES.items():
        x = rng.normal(size=shape).astype(np.float32)
        tree[name] = jax.make_array_from_callback(shape, placed[name], x.__getitem__)
    return tree


if __name__ == "__main__":
    main(*map(int, sys.argv[1:4]), Path(sys.argv[4]))
