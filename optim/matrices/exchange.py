"""Matrices that are sharded, whole on one device each for as long as it takes.

Equal matrices are stacked. Every device sends its part of each to the device that gets
the whole, in one all-to-all, and gets its parts of the results back in another.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ..checks import warn_once
from ..sharding.geometry import is_explicit, padded_spec, resharded
from ..storage.shards import mesh_axes
from .choice import Axes, Shape

# Of a stack of matrices (count, rows, columns), with operands; elementwise in count.
OfMatrices: TypeAlias = Callable[..., jax.Array]

LARGEST = 2**28
# Smaller ones are computed at once, this many values of them.
_AT_ONCE = 2**22


@dataclass(frozen=True)
class Stack:
    """A leaf of matrices, and where it is; static.

    Attributes:
      axes: of its matrices.
      shape: of the leaf.
      sharding: None: on one device, or it is not known.
    """

    axes: Axes
    shape: Shape
    sharding: NamedSharding | None

    @property
    def names(self) -> list[tuple[str, ...]]:
        """The mesh axes over which each axis is partitioned, batch axes first."""
        assert self.sharding is not None
        spec = padded_spec(self.sharding, len(self.shape))
        return [mesh_axes(spec[k]) for k in self.axes.order]

    @property
    def local(self) -> Shape:
        """The shape of a shard, batch axes first."""
        if self.sharding is None:
            return tuple(self.shape[k] for k in self.axes.order)
        shard = self.sharding.shard_shape(self.shape)
        return tuple(shard[k] for k in self.axes.order)

    @property
    def group(self) -> Any:
        """What leaves have in common that are stacked: whole matrices, and shards."""
        batch = len(self.axes.batch)
        whole = tuple(self.shape[k] for k in self.axes.order[batch:])
        over = sorted({name for own in self.names[:batch] for name in own})
        return whole, len(self.axes.rows), tuple(self.names[batch:]), tuple(over)


def whole_matrices(
    function: OfMatrices,
    stacks: Sequence[Stack],
    paths: Sequence[str],
    arrays: Sequence[jax.Array],
    operands: Any,
    largest: int,
) -> list[jax.Array]:
    """A function of the matrices of each leaf, wherever those are.

    Args:
      function: static, of a stack of whole matrices and the operands.
      stacks: for each leaf.
      paths: of the leaves.
      arrays: the leaves.
      operands: arrays that every device has.
      largest: values in a matrix that one device may have.
    """
    found: list[Any] = [None] * len(stacks)
    groups: dict[Any, list[int]] = {}
    for k, (stack, x) in enumerate(zip(stacks, arrays, strict=True)):
        _, rows, columns = stack.axes.sizes(stack.shape)
        if stack.sharding is None:
            found[k] = _of_leaf(function, stack, x, operands)
        elif rows * columns > largest:
            warn_once(_TOO_LARGE.format(paths[k], rows, columns, largest))
            found[k] = _partitioned(function, stack, x, operands)
        else:
            groups.setdefault((stack.sharding.mesh, stack.group, x.dtype), []).append(k)
    for own in groups.values():
        chosen = tuple(stacks[k] for k in own)
        results = _in_shards(function, chosen, [arrays[k] for k in own], operands)
        for k, result in zip(own, results, strict=True):
            found[k] = result
    return found


_TOO_LARGE = (
    "{!r}: its matrices of {} x {} values are too large for one device (max_matrix_size"
    "={}), and XLA partitions the products of Newton-Schulz: they communicate. Where "
    "there is memory for a few float32 copies of one, give a larger max_matrix_size"
)


# ---------------------------------------------------------------------- one leaf


def _of_leaf(function: OfMatrices, stack: Stack, x: jax.Array, operands: Any) -> Any:
    """Where it is."""
    flat = x.transpose(stack.axes.order).reshape(stack.axes.sizes(stack.shape))
    return _placed_back(stack, _in_turns(function, flat, operands), stack.shape)


def _placed_back(stack: Stack, flat: jax.Array, shape: Shape) -> jax.Array:
    order = stack.axes.order
    ordered = flat.reshape([shape[k] for k in order])
    return ordered.transpose([order.index(k) for k in range(len(order))])


def _in_turns(function: Any, x: jax.Array, operands: Any) -> jax.Array:
    """Of a few matrices at a time, so that what is kept meanwhile is small."""
    some = max(1, _AT_ONCE // math.prod(x.shape[1:]))
    if some >= len(x) or len(x) == 1:
        return function(x, *operands)
    return lax.map(
        lambda one: function(one[None], *operands)[0],
        x,
        batch_size=None if some == 1 else some,
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _partitioned(
    function: OfMatrices, stack: Stack, x: jax.Array, operands: Any
) -> jax.Array:
    """Each product over all devices, as XLA partitions it."""
    sharding = stack.sharding
    assert sharding is not None

    def freely(x: jax.Array, operands: Any) -> jax.Array:
        return _of_leaf(function, stack, x, operands)

    if is_explicit(sharding):
        out = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec))
        partitioned: Any = jax.sharding.auto_axes(freely, out_sharding=out)
        return partitioned(x, operands)
    found = freely(x, operands)
    if AxisType.Explicit in sharding.mesh.axis_types:
        return found
    return lax.with_sharding_constraint(found, sharding)


# ---------------------------------------------------------------------- in shards


@functools.partial(jax.jit, static_argnums=(0, 1))
def _in_shards(
    function: OfMatrices,
    stacks: tuple[Stack, ...],
    arrays: list[jax.Array],
    operands: Any,
) -> list[jax.Array]:
    shardings: list[Any] = [stack.sharding for stack in stacks]
    specs = [sharding.spec for sharding in shardings]
    placed = [resharded(*pair) for pair in zip(arrays, shardings, strict=True)]
    mapped = jax.shard_map(
        functools.partial(_on_one_device, function, stacks),
        mesh=shardings[0].mesh,
        in_specs=(specs, PartitionSpec()),
        out_specs=specs,
        check_vma=False,  # gathers make equal what types say may differ
    )
    return mapped(placed, operands)


def _on_one_device(
    function: OfMatrices,
    stacks: tuple[Stack, ...],
    shards: list[jax.Array],
    operands: Any,
) -> list[jax.Array]:
    """Within shard_map: this device's share of all matrices, there and back."""
    first = stacks[0]
    assert first.sharding is not None
    mesh, batch = first.sharding.mesh, len(first.axes.batch)
    names = first.names[batch:]
    parts = tuple(name for own in names for name in own)
    used = {*parts, *(name for own in first.names[:batch] for name in own)}
    copies = tuple(name for name in mesh.axis_names if name not in used)

    locals_ = [stack.local[len(stack.axes.batch) :] for stack in stacks]
    flat = [
        x.transpose(stack.axes.order).reshape(-1, *own)
        for x, stack, own in zip(shards, stacks, locals_, strict=True)
    ]
    counts = [len(x) for x in flat]
    x = jnp.concatenate(flat) if len(flat) > 1 else flat[0]
    sizes = dict(zip(mesh.axis_names, mesh.axis_sizes, strict=True))
    tiles = [math.prod(sizes[name] for name in own) for own in names]
    devices = math.prod(tiles) * math.prod(sizes[name] for name in copies)
    share = -(-sum(counts) // devices)
    x = jnp.pad(x, ((0, share * devices - len(x)), *((0, 0),) * (x.ndim - 1)))

    x = _own_share(x, copies, share * math.prod(tiles))
    whole = _joined(_exchanged(x, parts), tiles, len(first.axes.rows))
    whole = _in_turns(function, whole, operands)
    x = _exchanged(_cut(whole, tiles, locals_[0]), parts)
    if copies:
        x = lax.all_gather(x, copies, axis=0, tiled=True)
    ends = [sum(counts[: k + 1]) for k in range(len(counts))]
    results = jnp.split(x[: ends[-1]], ends[:-1])
    return [
        _placed_back(stack, result, _shard_shape(stack))
        for stack, result in zip(stacks, results, strict=True)
    ]


def _shard_shape(stack: Stack) -> Shape:
    assert stack.sharding is not None
    return stack.sharding.shard_shape(stack.shape)


def _own_share(x: jax.Array, copies: tuple[str, ...], count: int) -> jax.Array:
    """Of matrices that several devices have, those that are this one's to compute."""
    if not copies:
        return x
    return lax.dynamic_slice_in_dim(x, lax.axis_index(copies) * count, count)


def _exchanged(x: jax.Array, parts: tuple[str, ...]) -> jax.Array:
    """Its k-th share to the k-th device; and in the same order, what all sent here."""
    if not parts:
        return x
    return lax.all_to_all(x, parts, split_axis=0, concat_axis=0, tiled=True)


def _joined(x: jax.Array, tiles: Sequence[int], rows: int) -> jax.Array:
    """Whole matrices (count, rows, columns), from the parts of each device."""
    parts = math.prod(tiles)
    x = x.reshape(*tiles, len(x) // parts, *x.shape[1:])
    n = len(tiles)
    # The tiles of an axis, before what is within a tile.
    x = x.transpose(n, *(k for tile in range(n) for k in (tile, n + 1 + tile)))
    lengths = [x.shape[2 * k + 1] * x.shape[2 * k + 2] for k in range(n)]
    return x.reshape(len(x), math.prod(lengths[:rows]), math.prod(lengths[rows:]))


def _cut(x: jax.Array, tiles: Sequence[int], local: Shape) -> jax.Array:
    """The inverse of `_joined`."""
    n = len(tiles)
    pairs = (k for pair in zip(tiles, local, strict=True) for k in pair)
    x = x.reshape(len(x), *pairs)
    outside = range(1, 2 * n + 1, 2)
    x = x.transpose(*outside, 0, *(k + 1 for k in outside))
    return x.reshape(-1, *local)
