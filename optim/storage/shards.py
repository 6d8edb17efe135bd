"""How many shards the axes of each leaf may have: the option `min_shards`."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from ..checks import check_shards
from ..options import Settings
from ..values import at, is_tree
from .tree import SHARDINGS, Kind, Leaves, per_leaf

_COUNTS = Kind(
    lambda x: not is_tree(x),
    "ints (or counts of mesh axes, if sharding= is given, too)",
)


def most_shards(settings: Settings, tree: Leaves) -> list[tuple[int, ...]]:
    """For each leaf, the most shards along each of its axes."""
    option = settings.min_shards
    ranks = [len(jnp.shape(leaf)) for leaf in tree.leaves]
    if isinstance(option, Mapping) and settings.sharding is not None:
        given = per_leaf("sharding", settings.sharding, tree, SHARDINGS)
        if set(option) <= {name for s in given for name in _names(s)}:
            for name, count in option.items():
                check_shards(count, f"[{name!r}]")
            pairs = zip(given, ranks, strict=True)
            more = tuple(x for x in mesh_axes(settings.state_sharding) if x in option)
            return [_along_axes(s, rank, option, more) for s, rank in pairs]
    counts = per_leaf("min_shards", option, tree, _COUNTS)
    for path, count in zip(tree.names, counts, strict=True):
        check_shards(count, at(path))
    return [(count,) * rank for count, rank in zip(counts, ranks, strict=True)]


def _names(sharding: Any) -> tuple[str, ...]:
    """The mesh axes that it knows."""
    if isinstance(sharding, NamedSharding):
        return sharding.mesh.axis_names
    named = (name for axis in sharding for name in mesh_axes(axis))
    return (*named, *jax.sharding.get_abstract_mesh().axis_names)


def _along_axes(
    sharding: Any, rank: int, counts: Mapping[str, int], more: tuple[str, ...]
) -> tuple[int, ...]:
    """Of one leaf; the mesh axes `more` may partition its state along any axis."""
    spec = sharding.spec if isinstance(sharding, NamedSharding) else sharding
    axes = (*spec, *(None,) * (rank - len(spec)))
    named = ({*mesh_axes(axis), *more} for axis in axes)
    return tuple(math.prod(counts.get(name, 1) for name in names) for names in named)


def mesh_axes(axis: Any) -> tuple[str, ...]:
    """The mesh axes over which one axis of an array is partitioned."""
    if isinstance(axis, str):
        return (axis,)
    return axis if isinstance(axis, tuple) else ()
