"""Llama 3 8B as shapes, and how its parameters are sharded over a mesh.

Its axes are `fsdp` and `tensor`: matrices are sharded along both, those into heads or
hidden units by columns along `tensor`; norms along `fsdp`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

WIDTH, HIDDEN, KEYS, VOCABULARY = 4096, 14336, 8 * 128, 128256
AXES = ("fsdp", "tensor")
_INTO, _OUT_OF, _NORM = P("fsdp", "tensor"), P("tensor", "fsdp"), P("fsdp")


class Parameter(NamedTuple):
    """A leaf: its shape, and how it is sharded."""

    shape: tuple[int, ...]
    spec: P


_LAYER = {
    "attention_norm": Parameter((WIDTH,), _NORM),
    "query": Parameter((WIDTH, WIDTH), _INTO),
    "key": Parameter((WIDTH, KEYS), _INTO),
    "value": Parameter((WIDTH, KEYS), _INTO),
    "attention_out": Parameter((WIDTH, WIDTH), _OUT_OF),
    "mlp_norm": Parameter((WIDTH,), _NORM),
    "gate": Parameter((WIDTH, HIDDEN), _INTO),
    "up": Parameter((WIDTH, HIDDEN), _INTO),
    "down": Parameter((HIDDEN, WIDTH), _OUT_OF),
}


def parameters(layers: int, stacked: bool) -> dict[str, Any]:
    """The tree; with a leaf for all layers, as scan over layers keeps them, or not."""
    around = {
        "embedding": Parameter((VOCABULARY, WIDTH), _OUT_OF),
        "norm": Parameter((WIDTH,), _NORM),
        "head": Parameter((WIDTH, VOCABULARY), _INTO),
    }
    if not stacked:
        return around | {f"layer{i}": _LAYER for i in range(layers)}
    stack = {
        name: Parameter((layers, *p.shape), P(None, *p.spec))
        for name, p in _LAYER.items()
    }
    return around | {"layers": stack}


def layer_axes(path: str) -> int | None:
    """The option for the stacked tree."""
    return 0 if path.startswith("layers/") else None


def block_axis(path: str) -> int | None:
    """The option: blocks run along the vocabulary, in the head as in the embedding.

    A TPU keeps shards of the head transposed, as their rows are no multiple of 128;
    scales along the other axis would be copied into that order, and padded 8-fold.
    """
    return 1 if path == "head" else None


def placed(layers: int, stacked: bool, mesh: Mesh) -> tuple[Any, Any]:
    """Shapes of the parameters, and their shardings."""
    tree = parameters(layers, stacked)

    def each(function: Any) -> Any:
        return jax.tree.map(function, tree, is_leaf=lambda x: isinstance(x, Parameter))

    shapes = each(lambda p: jax.ShapeDtypeStruct(p.shape, jnp.float32))
    return shapes, each(lambda p: NamedSharding(mesh, p.spec))
