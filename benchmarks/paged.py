"""What a step with its state in host memory takes of devices that are not here.

Compiled for them, and counted: one leaf of 512M values (1 GiB of codes), the layers of
Llama 3 8B in stacks of 24, and some of them without stacks. Nothing runs.
"""

import argparse
import math
import re
import sys
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from _hosted import compiled
from _llama import layer_axes, parameters
from _topologies import devices_of, platform_of, prepare
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console
from rich.table import Table

from octavo import optim

MIB = 2**20
# For each platform the backend, and what its kernels are called in a program.
_KERNELS = {"cuda": ("triton", "__gpu$xla.gpu.triton"), "tpu": ("tpu", "%octavo_step")}


class Figures(NamedTuple):
    """Of one compiled step, on one device; bytes, and loops.

    Attributes:
      device: beside parameters and gradients.
      host: the state that is there.
      computed: the same, from shapes alone.
      copied: of the host beside that.
      overlapping: loops that begin to fetch codes before the kernel, and end after it.
      loops: those that fetch codes, and step them.
    """

    device: int
    host: int
    computed: int
    copied: int
    overlapping: int
    loops: int


def trees(layers: int, unstacked: int) -> dict[str, dict[str, tuple[int, ...]]]:
    """Shapes by path, of each tree."""
    stacks = parameters(layers, stacked=True)["layers"]
    single = parameters(unstacked, stacked=False)
    return {
        "1 GiB": {"w": (65536, 8192)},
        f"{layers} in stacks": {f"layers/{k}": p.shape for k, p in stacks.items()},
        f"{unstacked} without": {
            f"{name}/{k}": p.shape
            for name, layer in single.items()
            if name.startswith("layer")
            for k, p in layer.items()
        },
    }


def figures_of(
    topology: str, optimizer: str, shapes: dict[str, tuple[int, ...]], page_bytes: int
) -> Figures:
    """Compile a step, and look at it."""
    devices = np.array(devices_of(topology))
    mesh = Mesh(devices, ("fsdp",), axis_types=(AxisType.Auto,))
    params = {
        path: jax.ShapeDtypeStruct(
            shape, "bfloat16", sharding=NamedSharding(mesh, _spec(shape, len(devices)))
        )
        for path, shape in shapes.items()
    }
    platform = platform_of(topology)
    backend, _ = _KERNELS[platform]
    tx = getattr(optim, optimizer)(
        1e-3,
        paged=True,
        page_bytes=page_bytes,
        layer_axes=layer_axes,
        # One device that is not here is not known to be one.
        backend=lambda path: None if path.endswith("norm") else backend,
    )
    tx = tx.bind({path: x.sharding for path, x in params.items()})
    program = compiled(tx, params, topology)
    memory, text = program.memory_analysis(), program.as_text()
    values = [math.prod(shape) for shape in shapes.values()]
    overlapping, loops = overlaps(text, platform)
    return Figures(
        memory.temp_size_in_bytes,
        memory.host_argument_size_in_bytes,
        sum(2 * n + 4 * n // 32 for n in values if n >= 100_000) // len(devices),
        memory.host_temp_size_in_bytes,
        overlapping,
        loops,
    )


def _spec(shape: tuple[int, ...], devices: int) -> P:
    """The last axis but one in parts; norms whole."""
    if len(shape) < 2 or shape[-2] % devices or min(shape) < devices:
        return P()
    return P(*(None,) * (len(shape) - 2), "fsdp")


def overlaps(scheduled: str, platform: str) -> tuple[int, int]:
    """Loops whose kernel runs while the next codes are on their way, and all loops.

    The computations of a compiled program stand in the order in which they run.
    """
    (_, kernel), found = _KERNELS[platform], []
    for body in scheduled.split("\n}\n"):
        lines = body.splitlines()
        begun = [k for k, x in enumerate(lines) if re.match(_FETCH, x)]
        done = [k for k, x in enumerate(lines) if re.match(_FETCHED, x)]
        at = [k for k, x in enumerate(lines) if kernel in x and "custom-call(" in x]
        if begun and at and "\nENTRY " not in body and not body.startswith("ENTRY "):
            found.append(max(begun) < at[0] and at[-1] < min(done))
    return sum(found), len(found)


_FETCH = r" *%dynamic-slice-start\S* = \(\(s8\["
_FETCHED = r" *%dynamic-slice-done\S* = s8\["


def main(argv: Sequence[str] | None = None) -> int:
    """Compile and print; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--topology", nargs="+", default=["v6e:1x1", "h200:1x1"])
    parser.add_argument("--optimizer", nargs="+", default=["adamw"])
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--unstacked", type=int, default=2)
    parser.add_argument("--page-bytes", type=int, default=64 * MIB)
    options = parser.parse_args(argv)
    prepare()
    table = Table(title="Paged steps with bfloat16 weights, MiB of one device")
    for name in ("topology", "optimizer", "leaves", "device", "pages"):
        table.add_column(name)
    for name in ("host", "computed", "copied", "overlap"):
        table.add_column(name)
    for topology in options.topology:
        for optimizer in options.optimizer:
            for name, shapes in trees(options.layers, options.unstacked).items():
                f = figures_of(topology, optimizer, shapes, options.page_bytes)
                table.add_row(
                    *(topology, optimizer, name),
                    f"{f.device / MIB:,.1f}",
                    f"{f.device / options.page_bytes:.2f}",
                    *(f"{x / MIB:,.1f}" for x in (f.host, f.computed, f.copied)),
                    f"{f.overlapping} of {f.loops}",
                )
    Console(width=120).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
