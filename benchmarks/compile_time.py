"""How long equal leaves take to trace, lower and compile.

Many equal leaves, as the layers of a model are, share one traced and lowered step. For
devices that are not here: seconds to trace and lower, and kernels in the module. On the
CPU: seconds until the step is compiled, beside optax's in the same run, alternating.
"""

import argparse
import itertools
import re
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from _topologies import devices_of, platform_of, prepare
from jax.sharding import AxisType, Mesh, SingleDeviceSharding
from rich.console import Console
from rich.table import Table

from octavo import optim

_KERNELS = r"tpu_custom_call|__gpu\$xla|triton_kernel_call"


def step_of(tx: optax.GradientTransformation) -> Callable[..., Any]:
    """Parameters first: XLA pairs donated arrays in order."""
    return lambda params, state, grads: optim.step(tx, grads, state, params)


def lowered(topology: str, leaves: int, shape: tuple[int, ...]) -> tuple[float, int]:
    """Seconds to trace and lower AdamW's step for a device, and its kernels."""
    (device, *_) = devices_of(topology)
    mesh = Mesh([device], ("x",), axis_types=(AxisType.Auto,))
    where = SingleDeviceSharding(device)
    backend = "tpu" if platform_of(topology) == "tpu" else "triton"
    tx = optim.adamw(1e-3, backend=backend)

    def placed(x: Any) -> Any:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

    leaf = placed(jax.ShapeDtypeStruct(shape, jnp.float32))
    params = {f"layer{k}": leaf for k in range(leaves)}
    state = jax.tree.map(placed, jax.eval_shape(tx.init, params))
    jax.clear_caches()
    start = time.perf_counter()
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        traced = jax.jit(step_of(tx), donate_argnums=(0, 1)).trace(
            params, state, params
        )
        program = traced.lower(lowering_platforms=(platform_of(topology),))
    seconds = time.perf_counter() - start
    return seconds, len(re.findall(_KERNELS, program.as_text()))


def compiled(
    tx: optax.GradientTransformation, leaves: int, shape: tuple[int, ...]
) -> list[float]:
    """Seconds to trace, lower and compile a step for the CPU."""
    params = {f"layer{k}": jnp.ones(shape) for k in range(leaves)}
    state = tx.init(params)
    jax.clear_caches()
    times = [time.perf_counter()]
    traced = jax.jit(step_of(tx), donate_argnums=(0, 1)).trace(params, state, params)
    times.append(time.perf_counter())
    program = traced.lower()
    times.append(time.perf_counter())
    program.compile()
    times.append(time.perf_counter())
    return [after - before for before, after in itertools.pairwise(times)]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    p.add_argument("--topology", nargs="*", default=["v6e:2x2", "h200:1x1"])
    p.add_argument("--leaves", type=int, default=150, help="of (1024, 512)")
    p.add_argument("--cpu-leaves", type=int, default=300, help="of (64, 128)")
    p.add_argument("--repeat", type=int, default=3)
    return p.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and print two tables."""
    args, console = parse(argv), Console(width=100)
    prepare()
    if args.topology:
        table = Table("device", "leaves", "seconds to trace and lower", "kernels")
        for topology in args.topology:
            runs = [
                lowered(topology, args.leaves, (1024, 512)) for _ in range(args.repeat)
            ]
            times = ", ".join(f"{seconds:.2f}" for seconds, _ in runs)
            table.add_row(topology, str(args.leaves), times, str(runs[0][1]))
        console.print(table)
    if args.cpu_leaves:
        table = Table("CPU", "trace", "lower", "compile", "seconds in all")
        ratios = []
        for _ in range(args.repeat):
            totals = []
            for name, tx in (
                ("optax", optax.adamw(1e-3)),
                ("octavo", optim.adamw(1e-3)),
            ):
                parts = compiled(tx, args.cpu_leaves, (64, 128))
                totals.append(sum(parts))
                table.add_row(name, *(f"{s:.2f}" for s in (*parts, totals[-1])))
            ratios.append(totals[1] / totals[0])
        console.print(table)
        console.print("octavo to optax: " + ", ".join(f"{r:.1f}" for r in ratios))
    return 0


if __name__ == "__main__":
    sys.exit(main())
