"""A step of Muon on devices that are not here, compiled: Octavo's and optax'.

    python benchmarks/muon.py --topology v6e:16x16 --layers 32

Llama 3 8B on a mesh of FSDP and tensor parallelism, from shapes alone: the collectives
of a step, what they bring to each device, and its memory. Both optimizers take the same
matrices as such; `optax.contrib.muon` is partitioned by XLA, its state sharded like the
parameters.
"""

import argparse
import math
import re
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from _compiled import COLLECTIVES, collectives, mesh_of
from _llama import layer_axes, placed
from _topologies import prepare
from optax.contrib import MuonDimensionNumbers
from rich.console import Console
from rich.table import Table

from octavo import optim


class Figures(NamedTuple):
    """Of a compiled step; bytes are those of one device.

    Attributes:
      collectives: how many of each.
      moved: bytes that they bring.
      state: bytes of state.
      temporary: bytes beside arguments and results.
      seconds: of this process' threads, to lower and compile.
    """

    collectives: dict[str, int]
    moved: int
    state: int
    temporary: int
    seconds: float


def numbers(path: str, rank: int) -> MuonDimensionNumbers | None:
    """Of the layers' matrices; None for all other leaves."""
    stacked = path.startswith("layers/")
    if not path.startswith("layer") or rank - stacked < 2:
        return None
    return MuonDimensionNumbers(1, 2) if stacked else MuonDimensionNumbers(0, 1)


def dimensions(params: Any) -> Any:
    """Of all leaves."""
    return jax.tree_util.tree_map_with_path(
        lambda path, p: numbers(
            jax.tree_util.keystr(path, simple=True, separator="/"), len(p.shape)
        ),
        params,
    )


def optimizer(name: str, where: Any, ns_dtype: Any = None, state: str = "8bit") -> Any:
    """`"octavo"` or `"optax"`, for parameters that are sharded so."""
    same = {"muon_weight_dimension_numbers": dimensions, "consistent_rms": 0.2}
    if name == "optax":
        return optax.contrib.muon(1e-3, **same)
    some = jax.tree.leaves(where)[0].mesh.size
    options = {"layer_axes": layer_axes, "min_shards": some, "sharding": where}
    return optim.muon(1e-3, ns_dtype=ns_dtype, state=state, **same, **options)


class Case(NamedTuple):
    """What is compiled; `name` is `"octavo"` or `"optax"`."""

    name: str
    layers: int
    stacked: bool
    grads: str
    ns_dtype: str | None


def figures(case: Case, mesh: Any) -> Figures:
    """Compile a step."""
    shapes, where = placed(case.layers, case.stacked, mesh)
    tx = optimizer(case.name, where, case.ns_dtype)
    put = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, where
    )
    grads = jax.tree.map(lambda x: x.update(dtype=jnp.dtype(case.grads)), put)
    kept = where, optim.state_sharding(tx, shapes, where)
    states = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        jax.eval_shape(tx.init, shapes),
        kept[1],
    )
    begin = time.process_time()
    step = jax.jit(
        lambda p, s, g: optim.step(tx, g, s, p),
        donate_argnums=(0, 1),
        out_shardings=kept,
    )
    compiled = step.lower(put, states, grads).compile()
    seconds = time.process_time() - begin
    text, memory = compiled.as_text(), compiled.memory_analysis()
    return Figures(
        collectives(text),
        moved(text),
        sum(_bytes(x) for x in jax.tree.leaves(states)),
        memory.temp_size_in_bytes,
        seconds,
    )


def _bytes(x: Any) -> int:
    return math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize


_SIZES = {
    "f32": 4,
    "s32": 4,
    "u32": 4,
    "bf16": 2,
    "f16": 2,
    "s8": 1,
    "u8": 1,
    "pred": 1,
}


def moved(text: str) -> int:
    """Bytes of the results of collectives in a compiled program."""
    kinds = "|".join(COLLECTIVES)
    total = 0
    for types in re.findall(rf"= (\(.*?\)|\S+) (?:{kinds})(?:-done)?\(", text):
        for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", types):
            values = math.prod(int(n) for n in shape.split(",") if n)
            total += _SIZES.get(dtype, 0) * values
    return total


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    p = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    p.add_argument("--topology", default="v6e:16x16", help="as of pod.py")
    p.add_argument("--layers", type=int, default=32)
    p.add_argument("--tree", nargs="+", default=["separate", "stacked"])
    p.add_argument("--optimizer", nargs="+", default=["octavo", "optax"])
    p.add_argument("--grads", default="float32", help="or bfloat16")
    p.add_argument("--ns-dtype", help="Octavo's; else that of gradients")
    args = p.parse_args(argv)
    prepare()
    mesh = mesh_of(args.topology, "auto")
    table = Table(
        title=f"{args.topology}, {args.layers} layers, {args.grads} gradients"
    )
    heads = ("optimizer", "layers", "collectives", "moved MB", "state MB")
    for name in (*heads, "temporary MB", "compile CPU s"):
        table.add_column(name)
    for tree in args.tree:
        for name in args.optimizer:
            rest = args.layers, tree == "stacked", args.grads, args.ns_dtype
            f = figures(Case(name, *rest), mesh)
            kinds = ", ".join(f"{n} {kind}" for kind, n in f.collectives.items())
            sizes = (f"{x / 1e6:.1f}" for x in (f.moved, f.state, f.temporary))
            table.add_row(name, tree, kinds or "none", *sizes, f"{f.seconds:.0f}")
    console = Console()
    console.width = max(console.width, 130)
    console.print(table)


if __name__ == "__main__":
    main()
