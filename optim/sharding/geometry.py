"""How a leaf and its blocks are partitioned over a mesh."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from octavo.pallas_kernels import (
    SMALLEST_BLOCK,
    Blocks,
    Storage,
    blocks_of,
    longest_in_shards,
    wrap,
)

from ..storage.shards import mesh_axes


def fitting(sharding: NamedSharding, shape: tuple[int, ...]) -> NamedSharding:
    """The sharding, less the axes that it would partition unequally."""
    parts = shards(sharding, len(shape))
    spec = padded_spec(sharding, len(shape))
    kept = (
        s if n % k == 0 else None for s, n, k in zip(spec, shape, parts, strict=True)
    )
    kind = sharding.memory_kind
    return NamedSharding(sharding.mesh, PartitionSpec(*kept), memory_kind=kind)


def padded_spec(sharding: NamedSharding, rank: int) -> tuple[Any, ...]:
    """The sharding's spec with an entry for each axis of the array."""
    return (*sharding.spec, *(None,) * (rank - len(sharding.spec)))


def of_state(
    sharding: NamedSharding, shape: tuple[int, ...], rank: int
) -> NamedSharding:
    """How an array of a state is sharded, from the sharding of its parameter.

    Args:
      sharding: of the parameter.
      shape: of the array, whose rows may be in groups (`Storage.folded`).
      rank: of the parameter.
    """
    if len(shape) != rank + 1:
        return sharding
    *outer, row, column = padded_spec(sharding, rank)
    spec = PartitionSpec(*outer, row, None, column)
    kind = sharding.memory_kind
    return NamedSharding(sharding.mesh, spec, memory_kind=kind)


def of_parameter(sharding: NamedSharding, rank: int) -> NamedSharding:
    """The inverse of `of_state`, for an array of this rank whose rows are in groups."""
    *outer, _, column = padded_spec(sharding, rank)
    spec, kind = PartitionSpec(*outer, column), sharding.memory_kind
    return NamedSharding(sharding.mesh, spec, memory_kind=kind)


def is_explicit(sharding: NamedSharding) -> bool:
    """Whether the types of arrays say how they are sharded over this mesh."""
    return all(t == AxisType.Explicit for t in sharding.mesh.axis_types)


def resharded(arrays: Any, sharding: NamedSharding, rank: int | None = None) -> Any:
    """Under explicit axes, arrays as `shard_map` expects them.

    Args:
      arrays: a tree of them.
      sharding: of each.
      rank: of the parameter, where they are of a state; see `of_state`.
    """

    def of(x: jax.Array) -> jax.Array:
        own = jax.typeof(x).sharding
        there = sharding if rank is None else of_state(sharding, x.shape, rank)
        # What is still to be added up over devices is added up on the way.
        done = not own.mesh.empty and not own.spec.unreduced
        spec = padded_spec(there, x.ndim)
        same = done and padded_spec(own, x.ndim) == spec
        return x if same else jax.sharding.reshard(x, there)

    return jax.tree.map(of, arrays) if is_explicit(sharding) else arrays


def shards(sharding: NamedSharding, rank: int) -> tuple[int, ...]:
    """Into how many parts each axis is partitioned."""
    sizes = dict(zip(sharding.mesh.axis_names, sharding.mesh.axis_sizes, strict=True))
    spec = padded_spec(sharding, rank)
    return tuple(math.prod(sizes[name] for name in mesh_axes(axis)) for axis in spec)


def aligned(blocks: Blocks, sharding: NamedSharding) -> bool:
    """Whether no block crosses a shard boundary."""
    if blocks.axis is None:
        return True
    length = _shard_length(blocks, sharding)
    return length == blocks.shape[blocks.axis] or length % blocks.size == 0


def _shard_length(blocks: Blocks, sharding: NamedSharding) -> int:
    """Length of a shard along the blocked axis."""
    axis = blocks.axis or 0
    return blocks.shape[axis] // shards(sharding, len(blocks.shape))[axis]


def origin(blocks: Blocks, sharding: NamedSharding) -> jax.Array:
    """Within shard_map: position in the whole leaf of the first value of this shard.

    Modulo 2**32.
    """
    start = jnp.int32(0)
    for first, stride in zip(starts(blocks, sharding), blocks.strides, strict=True):
        start = start + first * wrap(stride)
    return start


def starts(blocks: Blocks, sharding: NamedSharding) -> list[jax.Array]:
    """Within shard_map: index in the whole leaf, along each axis, of this shard.

    Args:
      blocks: of the shard.
      sharding: of the whole leaf.
    """
    spec = padded_spec(sharding, len(blocks.shape))
    return [
        _index(axis) * jnp.int32(length)
        for axis, length in zip(spec, blocks.shape, strict=True)
    ]


def _index(axis: Any) -> jax.Array:
    over = mesh_axes(axis)
    return lax.axis_index(over) if over else jnp.int32(0)


def owned(sharding: NamedSharding) -> jax.Array:
    """Within shard_map: whether this device is the first of those with its shard."""
    used = {name for axis in sharding.spec for name in mesh_axes(axis)}
    first = jnp.bool_(True)
    for name in sharding.mesh.axis_names:
        if name not in used:
            first = first & (lax.axis_index(name) == 0)
    return first


def advice(path: str, storage: Storage, sharding: NamedSharding) -> str:
    """What to do about a leaf whose blocks cross shard boundaries."""
    blocks = storage.blocks
    fits = []
    parts = shards(sharding, len(blocks.shape))[blocks.axis or 0]
    longest = longest_in_shards(blocks.shape[blocks.axis or 0], parts)
    if longest is not None and longest >= SMALLEST_BLOCK:
        fits.append(f"min_shards={parts}")
    for size in (64, 32, 16, 8):
        other = blocks_of(blocks.shape, size, blocks.axis, blocks.layers)
        if size < blocks.size and aligned(other, sharding):
            fits.append(f"block_size={size}")
            break
    for axis in range(len(blocks.shape)):
        # Whatever block_size is given: it is not known here.
        sizes = (blocks_of(blocks.shape, 2**n, axis) for n in range(3, 9))
        fit = all(aligned(other, sharding) for other in sizes)
        if axis not in (blocks.axis, *blocks.layers) and fit:
            fits.append(f"block_axis={axis}")
            break
    fitting = " or ".join(fits) if fits else "state='32bit', or another sharding,"
    return (
        f"{path!r} of shape {blocks.shape} with {sharding.spec}: blocks of "
        f"{blocks.size} along axis {blocks.axis} cross the boundaries of its shards "
        f"of {_shard_length(blocks, sharding)}; {fitting} fits"
    )
