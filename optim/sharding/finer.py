"""States that are partitioned further than their parameters: ZeRO-1."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from ..storage.shards import mesh_axes
from ..storage.tree import Leaves
from .geometry import padded_spec, shards
from .placement import full, placements

_BLOCK = 32  # the usual one


class Places(NamedTuple):
    """Where each leaf is; None where that is not known, or one device.

    Attributes:
      params: the sharding of the parameter.
      state: of its state, which is where it is stepped.
    """

    params: list[NamedSharding | None]
    state: list[NamedSharding | None]


def places(sharding: Any, state_sharding: Any, tree: Leaves) -> Places:
    """Where parameters and their states are, from the options of these names.

    Raises:
      ValueError: where an option does not fit the tree.
    """
    return with_states(placements(sharding, tree), state_sharding, tree)


def with_states(
    params: Sequence[NamedSharding | None], state_sharding: Any, tree: Leaves
) -> Places:
    """Where the states are of parameters that are there."""
    known = list(params)
    if state_sharding is None:
        return Places(known, known)
    if any(s is None for s in known):
        if all(s is None for s in known):
            return Places(known, known)  # one device, or it is left to XLA
        raise ValueError(
            "state_sharding: it is not known how some parameters are sharded. Give "
            "sharding=, too, or tx.bind(params)"
        )
    axes = mesh_axes(state_sharding)
    if not axes:
        return Places(known, list(full(state_sharding, tree, "state_sharding")))
    return Places(
        known,
        [
            None if s is None else finer(s, jnp.shape(leaf), axes)
            for s, leaf in zip(known, tree.leaves, strict=True)
        ],
    )


def finer(
    sharding: NamedSharding, shape: tuple[int, ...], axes: tuple[str, ...]
) -> NamedSharding:
    """A sharding that also partitions one axis of an array over these mesh axes.

    Of the axes that divide, it is that whose shards have the longest blocks, and then
    that with the longest shards. An array without such an axis stays as it is.
    """
    sizes = dict(zip(sharding.mesh.axis_names, sharding.mesh.axis_sizes, strict=True))
    for name in axes:
        if name not in sizes:
            raise ValueError(
                f"state_sharding={name!r} is no axis of the mesh, which has "
                f"{', '.join(map(repr, sizes))}"
            )
    spec = padded_spec(sharding, len(shape))
    used = {name for axis in spec for name in mesh_axes(axis)}
    more = tuple(name for name in axes if name not in used)
    parts = math.prod(sizes[name] for name in more)
    found = []
    for k, now in enumerate(shards(sharding, len(shape))):
        if shape[k] and shape[k] % (now * parts) == 0:
            length = shape[k] // (now * parts)
            found.append((math.gcd(length, _BLOCK), length, -k))
    if not found or not more:
        return sharding
    k = -max(found)[-1]
    longer = (*spec[:k], (*mesh_axes(spec[k]), *more), *spec[k + 1 :])
    entries = (x[0] if isinstance(x, tuple) and len(x) == 1 else x for x in longer)
    return NamedSharding(sharding.mesh, PartitionSpec(*entries))
