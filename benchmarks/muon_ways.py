"""Three ways to Muon: Octavo's, optax' wrapped by `optim.quantized`, and optax' alone.

    python benchmarks/muon_ways.py

A step on one CPU device, and on 8 (a 4 x 2 mesh): bytes of state per parameter, the
collectives of the compiled step, and the median time beside optax'. Rounds alternate.
"""

import argparse
import os
import statistics
import time
from collections.abc import Sequence
from typing import Any

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
import jax
import jax.numpy as jnp
import optax
from _compiled import collectives
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from optax.contrib import MuonDimensionNumbers
from rich.console import Console
from rich.table import Table

from octavo import optim

NAMES = (*(f"layer_{k}" for k in range(8)), "embed")


def numbers(params: Any) -> Any:
    """The matrices; a function, because a tree does not fit `optax`' placeholders."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: None if "embed" in str(path) else MuonDimensionNumbers(), params
    )


def parameters(shape: tuple[int, int], mesh: Any) -> dict[str, jax.Array]:
    """8 equal matrices, and an embedding that takes AdamW."""
    keys = jax.random.split(jax.random.key(0), len(NAMES))
    made = {
        name: 0.02 * jax.random.normal(key, shape)
        for name, key in zip(NAMES, keys, strict=True)
    }
    return jax.device_put(made, NamedSharding(mesh, PartitionSpec("fsdp", "tensor")))


def ways(params: Any) -> dict[str, Any]:
    """By name."""
    where = jax.tree.map(lambda p: p.sharding, params)
    matrices: dict[str, Any] = {"muon_weight_dimension_numbers": numbers}
    theirs = optax.contrib.muon(1e-2, consistent_rms=0.2, **matrices)
    return {
        "optax.contrib.muon": theirs,
        "optim.quantized of it": optim.quantized(theirs, sharding=where),
        "optim.muon": optim.muon(1e-2, sharding=where, **matrices),
        "optim.muon32bit": optim.muon32bit(1e-2, sharding=where, **matrices),
    }


def compiled(tx: Any, params: Any) -> tuple[Any, Any, float]:
    """The step, its state, and the state's bytes per parameter."""
    where = jax.tree.map(lambda p: p.sharding, params)
    shardings = optim.state_sharding(tx, params, where)
    state = jax.device_put(jax.jit(tx.init)(params), shardings)
    step = jax.jit(lambda p, s, g: optim.step(tx, g, s, p), donate_argnums=(0, 1))
    size = sum(x.nbytes for x in jax.tree.leaves(state))
    made = step.lower(params, state, params).compile()
    return made, state, size / sum(p.size for p in jax.tree.leaves(params))


def measured(params: Any, rounds: int) -> list[tuple[str, float, dict[str, int], Any]]:
    """Rows of the table; times in seconds."""
    rows, times, steps = [], {}, {}
    for name, tx in ways(params).items():
        made, state, size = compiled(tx, params)
        steps[name] = (made, jax.tree.map(jnp.copy, params), state)
        times[name] = []
        rows.append((name, size, collectives(made.as_text()), times[name]))
    for _ in range(rounds + 1):
        for name, (made, p, state) in steps.items():
            begin = time.perf_counter()
            p, state = jax.block_until_ready(made(p, state, params))
            times[name].append(time.perf_counter() - begin)
            steps[name] = (made, p, state)
    return [(*row[:3], statistics.median(row[3][1:])) for row in rows]


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    p = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    p.add_argument("--shape", type=int, nargs=2, default=[512, 1024])
    p.add_argument("--rounds", type=int, default=10)
    args = p.parse_args(argv)
    table = Table("devices", "way", "bytes", "collectives", "ms", "over optax")
    for count in (1, 8):
        grid = (4, 2) if count == 8 else (1, 1)
        mesh = jax.make_mesh(
            grid,
            ("fsdp", "tensor"),
            (AxisType.Auto,) * 2,
            devices=jax.devices()[:count],
        )
        rows = measured(parameters(tuple(args.shape), mesh), args.rounds)
        for name, size, kinds, seconds in rows:
            shown = ", ".join(f"{n} {kind}" for kind, n in kinds.items()) or "none"
            over = f"{seconds / rows[0][3]:.2f}"
            cells = (f"{size:.4f}", shown, f"{1e3 * seconds:.0f}", over)
            table.add_row(str(count), name, *cells)
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
