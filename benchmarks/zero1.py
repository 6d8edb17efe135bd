"""What ZeRO-1 is on devices that are not here: compiled for them, and counted.

Llama 3 8B in bfloat16, whole on every device, as is the gradient of each one's own
batch. The step adds gradients up over devices, and either every device holds and steps
the whole state, or its part (`state_sharding="data"`). From shapes alone.
"""

import argparse
import math
import string
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from _compiled import collectives
from _llama import Parameter, layer_axes, parameters
from _topologies import devices_of, platform_of, prepare
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console
from rich.table import Table

from octavo import optim

AXIS = "data"


class Figures(NamedTuple):
    """Of one compiled step; bytes are those of one device."""

    collectives: dict[str, int]
    fused_scatters: int
    state_bytes: int


def figures_of(topology: str, layers: int, state_sharding: str | None) -> Figures:
    """Compile a step, and look at it."""
    devices = devices_of(topology)
    mesh = Mesh(devices, (AXIS,), axis_types=(AxisType.Explicit,))
    whole, own = NamedSharding(mesh, P()), NamedSharding(mesh, P(AXIS))
    tree = parameters(layers, stacked=True)
    shapes = jax.tree.map(
        lambda p: jax.ShapeDtypeStruct(p.shape, jnp.bfloat16),
        tree,
        is_leaf=lambda x: isinstance(x, Parameter),
    )
    tx = optim.adamw(
        1e-3,
        layer_axes=layer_axes,
        min_shards=len(devices),
        state_sharding=state_sharding,
    )
    where = optim.state_sharding(tx, shapes, whole)
    state = jax.tree.map(_on, jax.eval_shape(tx.init, shapes), where)
    params = jax.tree.map(lambda x: _on(x, whole), shapes)
    each = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((len(devices), *x.shape), x.dtype, sharding=own),
        shapes,
    )

    def step(params: Any, state: Any, each: Any) -> Any:
        grads = jax.tree.map(_added_up, each)
        return tx.step(grads, state, params)

    platform = platform_of(topology)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        traced = jax.jit(step, donate_argnums=(0, 1)).trace(params, state, each)
        compiled = traced.lower(lowering_platforms=(platform,)).compile()
    text = compiled.as_text()
    return Figures(
        collectives(text),
        text.count("%all-reduce-scatter") // 2,  # a definition, and its use
        sum(
            math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
            for x in jax.tree.leaves(state)
        ),
    )


def _on(x: Any, sharding: NamedSharding) -> Any:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _added_up(each: jax.Array) -> jax.Array:
    """The sum of all devices' gradients, still to be done."""
    axes = string.ascii_lowercase[1 : each.ndim]
    return jnp.einsum(
        f"a{axes},a->{axes}",
        each,
        jnp.ones(len(each), each.dtype, out_sharding=P(AXIS)),
        out_sharding=P(unreduced={AXIS}),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Compile and print; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--topology", nargs="+", default=["h200:1x8", "h200:32x8"])
    parser.add_argument("--layers", type=int, default=32)
    options = parser.parse_args(argv)
    prepare()
    table = Table(title="A step of AdamW with bfloat16 weights, MB of one device")
    for name in ("topology", "state", "collectives", "state, MB"):
        table.add_column(name)
    for topology in options.topology:
        for sharding in (None, AXIS):
            f = figures_of(topology, options.layers, sharding)
            counts = ", ".join(f"{k}: {n}" for k, n in f.collectives.items())
            if f.fused_scatters:
                counts += f" (scattered: {f.fused_scatters})"
            kind = "in parts" if sharding else "whole"
            table.add_row(topology, kind, counts, f"{f.state_bytes / 1e6:,.1f}")
    Console(width=120).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
