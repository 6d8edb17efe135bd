"""A function of whole matrices, wherever their leaves are."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ..checks import warn_once
from ..sharding.budget import memory_of
from ..sharding.geometry import is_explicit, resharded
from .exchange import Over, exchanged, needed
from .groups import OfMatrices, in_turns
from .stack import Stack

LARGEST = 2**28


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
    together: dict[Any, list[int]] = {}
    for k, (stack, x) in enumerate(zip(stacks, arrays, strict=True)):
        if stack.sharding is None:
            found[k] = _of_leaf(function, stack, x, operands)
        elif _values(stack) > largest:
            _, rows, columns = stack.axes.sizes(stack.shape)
            warn_once(_TOO_LARGE.format(paths[k], rows, columns, largest))
            found[k] = _partitioned(function, stack, x, operands)
        else:
            together.setdefault((stack.over, x.dtype), []).append(k)
    for own in together.values():
        chosen = tuple(stacks[k] for k in own)
        results = _in_shards(function, chosen, [arrays[k] for k in own], operands)
        for k, result in zip(own, results, strict=True):
            found[k] = result
    return found


def check_memory(
    stacks: Sequence[Stack], paths: Sequence[str], sizes: Sequence[int], largest: int
) -> None:
    """Whether devices have the memory for their matrices, as far as they report it.

    Args:
      stacks: for each leaf.
      paths: of the leaves.
      sizes: bytes of the values that are computed with.
      largest: values in a matrix that one device may have.

    Raises:
      ValueError: if they do not.
    """
    together: dict[Any, list[int]] = {}
    for k, stack in enumerate(stacks):
        if stack.sharding is None:
            together[k] = [k]
        elif _values(stack) <= largest:
            together.setdefault((stack.over, sizes[k]), []).append(k)
    for own in together.values():
        there = memory_of(_device(stacks[own[0]]))
        bytes_ = needed([stacks[k] for k in own], sizes[own[0]]) if there else 0
        if bytes_ > there:
            k = max(own, key=lambda k: _values(stacks[k]))
            _, rows, columns = stacks[k].axes.sizes(stacks[k].shape)
            raise ValueError(
                _TOO_MUCH.format(
                    paths[k], rows, columns, bytes_, there, rows * columns - 1
                )
            )


def _values(stack: Stack) -> int:
    """In a matrix."""
    return math.prod(stack.axes.sizes(stack.shape)[1:])


def _device(stack: Stack) -> Any:
    """One of those in this process that compute it."""
    mesh = None if stack.sharding is None else stack.sharding.mesh
    if isinstance(mesh, Mesh) and jax.process_count() == 1:
        return mesh.devices.flat[0]
    return jax.local_devices()[0]


_TOO_MUCH = (
    "{!r}: to make its matrices of {} x {} values orthogonal, a device needs {:,} "
    "bytes beside parameters, gradients and state, and it has {:,} in all. "
    "ns_dtype=jnp.bfloat16 takes half of what float32 does. With max_matrix_size={} "
    "XLA partitions the products of such matrices: it takes longer, as they communicate"
)
_TOO_LARGE = (
    "{!r}: its matrices of {} x {} values are too large for one device (max_matrix_size"
    "={}), and XLA partitions the products of Newton-Schulz: they communicate. Where "
    "there is memory for a few float32 copies of one, give a larger max_matrix_size"
)


def _of_leaf(function: OfMatrices, stack: Stack, x: jax.Array, operands: Any) -> Any:
    """Where it is: a leaf, or a shard of one that has whole matrices."""
    _, *matrix = stack.axes.sizes(stack.shape)
    found = in_turns(function, stack.matrices(x, tuple(matrix)), operands)
    return stack.leaf(found, x.shape)


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


@functools.partial(jax.jit, static_argnums=(0, 1))
def _in_shards(
    function: OfMatrices,
    stacks: tuple[Stack, ...],
    arrays: list[jax.Array],
    operands: Any,
) -> list[jax.Array]:
    """Each device a share of all matrices."""
    shardings: list[Any] = [stack.sharding for stack in stacks]
    specs = [sharding.spec for sharding in shardings]
    placed = [resharded(*pair) for pair in zip(arrays, shardings, strict=True)]

    def on_one_device(shards: list[jax.Array], operands: Any) -> list[jax.Array]:
        if Over.of(stacks[0]).bins > 1:
            return exchanged(function, stacks, shards, operands)
        pairs = zip(stacks, shards, strict=True)
        return [_of_leaf(function, *pair, operands) for pair in pairs]

    mapped = jax.shard_map(
        on_one_device,
        mesh=shardings[0].mesh,
        in_specs=(specs, PartitionSpec()),
        out_specs=specs,
        check_vma=False,  # gathers make equal what types say may differ
    )
    return mapped(placed, operands)
