"""Meshes of eight devices, and a tree with a leaf for every way to be sharded."""

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from octavo.pallas_kernels import Blocks

Tree: TypeAlias = dict[str, Any]


class LeafCase(NamedTuple):
    """A leaf, how it is sharded over axes "d" and "m", and how its state is stored."""

    shape: tuple[int, ...]
    spec: P
    state: str = "8bit"
    dtype: str = "float32"


# Blocks are whole in every shard, on all of `MESHES`.
LEAVES: dict[str, LeafCase] = {
    "replicated": LeafCase((64, 64), P()),
    "rows": LeafCase((128, 64), P("d"), dtype="bfloat16"),
    "columns": LeafCase((128, 64), P(None, "m"), state="dynamic8"),
    "both": LeafCase((128, 64), P("d", "m")),
    "swapped": LeafCase((128, 64), P("m", "d"), state="bf16"),
    "tuple": LeafCase((256, 32), P(("d", "m"))),
    "layers/first": LeafCase((8, 64, 64), P("d", "m")),
    "layers/last": LeafCase((8, 64, 64), P("m", None, "d")),
    "vector": LeafCase((8192,), P(("m", "d"))),
    "bias": LeafCase((64,), P("m")),
    "count": LeafCase((8,), P("d"), dtype="int32"),
}
# What differs between meshes: the layers, the sums, the positions in two directions.
FEW = ("both", "tuple", "layers/first", "bias")
MESHES: dict[str, dict[str, int]] = {
    "1": {"d": 1},
    "2 rows": {"d": 2},
    "4 rows": {"d": 4},
    "8 rows": {"d": 8},
    "8 columns": {"m": 8},
    "4x2": {"d": 4, "m": 2},
    "2x4": {"d": 2, "m": 4},
}
AXES: dict[str, AxisType] = {"explicit": AxisType.Explicit, "auto": AxisType.Auto}


def stored(path: str) -> str:
    """The option `state` of the leaves."""
    return LEAVES[path].state


def layer_axes(path: str) -> int | None:
    """The option of that name."""
    return 0 if path.startswith("layers") else None


def values(seed: int, names: Collection[str] = tuple(LEAVES)) -> dict[str, np.ndarray]:
    """Parameters or gradients, whose scale differs from element to element."""
    tree = {}
    for k, (name, leaf) in enumerate(LEAVES.items()):
        rng = np.random.default_rng((seed, k))
        x = np.exp(rng.normal(size=leaf.shape)) * rng.normal(size=leaf.shape)
        if name in names:
            floating = leaf.dtype != "int32"
            tree[name] = x.astype(leaf.dtype) if floating else np.zeros(8, np.int32)
    return tree


def mesh_of(name: str, axes: str) -> jax.sharding.Mesh:
    """A mesh of the first devices."""
    shape = MESHES[name]
    return jax.make_mesh(
        tuple(shape.values()),
        tuple(shape),
        axis_types=(AXES[axes],) * len(shape),
        devices=jax.devices()[: math.prod(shape.values())],
    )


def on(mesh: jax.sharding.Mesh, names: Collection[str] = tuple(LEAVES)) -> Tree:
    """Their shardings there: their specs, less the axes that the mesh lacks."""

    def kept(axis: Any) -> tuple[str, ...]:
        given = axis if isinstance(axis, tuple) else (axis,)
        return tuple(name for name in given if name in mesh.axis_names)

    specs = {name: P(*(kept(a) or None for a in LEAVES[name].spec)) for name in names}
    return {name: NamedSharding(mesh, spec) for name, spec in specs.items()}


def shard_of(blocks: Blocks, sharding: NamedSharding) -> Blocks:
    """The blocks of one shard of a leaf."""
    shape = sharding.shard_shape(blocks.shape)
    return dataclasses.replace(blocks, shape=shape, whole=blocks.shape)


def given(axes: str, shardings: Any) -> dict[str, Any]:
    """The options that axes of this type need: none, where types say it."""
    return {} if axes == "explicit" else {"sharding": shardings}


def named(tree: Any) -> Mapping[str, Any]:
    """The leaves by path."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in flat
    }


def abstract(tree: Any, shardings: Any) -> Any:
    """Shapes and types, placed."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(jnp.shape(x), x.dtype, sharding=s),
        tree,
        shardings,
    )
