"""How long steps of Muon take on several devices: Octavo's and optax', in turns.

    python benchmarks/muon_time.py --tree separate

A few layers of Llama 3 8B, each side an 8th as long, on a mesh of FSDP and tensor
parallelism; on a computer without accelerators, of 8 CPU devices that share its cores,
where nothing is waited for while bytes travel. Both optimizers take the same matrices
as such; `optax.contrib.muon` is partitioned by XLA. Float32 and the same iterations
everywhere. Medians of the time that passes, and of what all threads work, which does
not depend on what else the computer does; the ratio is of the latter.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from _compiled import collectives
from _llama import AXES, Parameter, parameters
from jax.sharding import AxisType, NamedSharding
from muon import optimizer
from rich.console import Console
from rich.table import Table

from octavo import optim

NAMES = ("octavo 8bit", "octavo 32bit", "optax")


def placed(layers: int, stacked: bool, parts: int, mesh: Any) -> tuple[Any, Any]:
    """Random parameters, with long sides divided by `parts`, and their shardings."""
    tree, seed = parameters(layers, stacked), iter(range(10**6))
    tree = {name: x for name, x in tree.items() if name.startswith("layer")}

    def is_leaf(x: Any) -> bool:
        return isinstance(x, Parameter)

    def random(p: Parameter) -> jax.Array:
        shape = [n // parts if n >= 1024 else n for n in p.shape]
        return jax.random.normal(jax.random.key(next(seed)), shape)

    where = jax.tree.map(lambda p: NamedSharding(mesh, p.spec), tree, is_leaf=is_leaf)
    arrays = jax.tree.map(random, tree, is_leaf=is_leaf)
    return jax.device_put(arrays, where), where


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    p = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    p.add_argument("--layers", type=int, default=2)
    p.add_argument("--parts", type=int, default=8, help="what sides are divided by")
    p.add_argument("--tree", nargs="+", default=["separate", "stacked"])
    p.add_argument("--repeats", type=int, default=10, help="rounds")
    args = p.parse_args(argv)
    jax.config.update("jax_num_cpu_devices", 8)
    count = jax.device_count()
    mesh = jax.make_mesh(
        (count // 2, 2) if count % 2 == 0 else (count, 1),
        AXES,
        axis_types=(AxisType.Auto,) * 2,
    )
    table = Table(title=f"{count} devices ({jax.devices()[0].device_kind})")
    for name in ("optimizer", "layers", "collectives", "ms", "CPU ms", "/ optax"):
        table.add_column(name)
    for tree in args.tree:
        params, where = placed(args.layers, tree == "stacked", args.parts, mesh)
        grads = jax.device_put(jax.tree.map(jnp.flip, params), where)
        steps = {name: _begun(name, grads, where) for name in NAMES}
        times: dict[str, list[Any]] = {name: [] for name in steps}
        carries = {name: (params, state) for name, (_, state) in steps.items()}
        for _ in range(args.repeats):
            for name, (step, _) in steps.items():
                begin = time.perf_counter(), time.process_time()
                carries[name] = step(*carries[name], grads)
                jax.block_until_ready(carries[name])
                end = time.perf_counter(), time.process_time()
                times[name].append([b - a for a, b in zip(begin, end, strict=True)])
        median = {
            name: [statistics.median(column) for column in zip(*own, strict=True)]
            for name, own in times.items()
        }
        for name, (step, _) in steps.items():
            kinds = collectives(step.as_text()).items()
            table.add_row(
                name,
                tree,
                ", ".join(f"{n} {kind}" for kind, n in kinds),
                *(f"{1e3 * x:.0f}" for x in median[name]),
                f"{median[name][1] / median['optax'][1]:.2f}",
            )
    console = Console()
    console.width = max(console.width, 110)
    console.print(table)


def _begun(name: str, params: Any, where: Any) -> tuple[Any, Any]:
    """A compiled step, and its first state."""
    kind, _, bits = name.partition(" ")
    tx = optimizer(kind, where, state=bits)
    state = jax.jit(tx.init)(params)
    kept = where, optim.state_sharding(tx, params, where)
    state = jax.device_put(state, kept[1])
    step = jax.jit(lambda p, s, g: optim.step(tx, g, s, p), out_shardings=kept)
    return step.lower(params, state, params).compile(), state


if __name__ == "__main__":
    main()
