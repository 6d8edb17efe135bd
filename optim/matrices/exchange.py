"""Matrices that are sharded, whole on one device each for as long as it takes.

Every device sends its part of each matrix to the device that gets the whole, in one
all-to-all, and gets its parts of the results back in another. `bins` says who gets
what. Equal matrices are stacked, so that a few slices move all of them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .bins import Kind, Run, length, shared_out
from .groups import ROW, Group, OfMatrices, at_once, groups_of
from .stack import Stack

# In each round a device sends this many values, or whole matrices for all devices.
_IN_A_ROUND = 2**27


def exchanged(
    function: OfMatrices,
    stacks: Sequence[Stack],
    shards: Sequence[jax.Array],
    operands: Any,
) -> list[jax.Array]:
    """Within shard_map: a function of the matrices of which each device has parts.

    Args:
      function: static, of a stack of whole matrices and the operands.
      stacks: for each leaf; all are partitioned over the same mesh axes.
      shards: of the leaves.
      operands: arrays that every device has.
    """
    over = Over.of(stacks[0])
    groups = groups_of(stacks, over.bins)
    kinds = [group.kind for group in groups]
    units = [
        group.units(
            [stacks[k].matrices(shards[k], group.tiling.local) for k in group.leaves]
        )
        for group in groups
    ]
    starts = [0] * len(groups)
    found: list[list[jax.Array]] = [[] for _ in groups]
    for runs in shared_out(kinds, over.bins, _IN_A_ROUND // ROW):
        ends = [
            s + sum(r.bins * r.counts[k] for r in runs) for k, s in enumerate(starts)
        ]
        some = [x[s:e] for x, s, e in zip(units, starts, ends, strict=True)]
        whole = over.there(_sent(runs, kinds, some))
        whole = _computed(function, groups, runs, whole, over, operands)
        for own, x in zip(found, _received(runs, kinds, over.back(whole)), strict=True):
            own += x
        starts = ends
    results: list[Any] = [None] * len(stacks)
    for group, parts in zip(groups, found, strict=True):
        own = group.matrices(jnp.concatenate(parts))
        for k, x in zip(group.leaves, own, strict=True):
            results[k] = stacks[k].leaf(x, stacks[k].shard)
    return results


def needed(stacks: Sequence[Stack], size: int) -> int:
    """Bytes of the largest arrays that a device has at once for these leaves.

    A matrix and its next iterate, two matrices of the size of its Gram matrix, and
    beside them all that was received in a round.

    Args:
      stacks: for each leaf; all are partitioned over the same mesh axes, or none is.
      size: bytes of a value.
    """
    if stacks[0].sharding is None:
        shapes = [stack.axes.sizes(stack.shape) for stack in stacks]
        return size * max(_kept(min(n, at_once((r, c))), r, c) for n, r, c in shapes)
    over = Over.of(stacks[0])
    groups = groups_of(stacks, over.bins)
    kinds = [group.kind for group in groups]
    rounds = shared_out(kinds, over.bins, _IN_A_ROUND // ROW)
    rows = max(length(runs, kinds) for runs in rounds)
    received = over.parts[1] * rows * ROW if over.bins > 1 else 0
    kept = max(_kept(group.unit, *group.tiling.whole) for group in groups)
    return size * (received + max(received, kept))


def _kept(count: int, rows: int, columns: int) -> int:
    return count * 2 * (rows * columns + min(rows, columns) ** 2)


# ---------------------------------------------------------------------- on the way


@dataclass(frozen=True)
class Over:
    """Devices that share matrices out among them.

    Attributes:
      copies: mesh axes along which devices have the same parts, and their size.
      parts: those along which they have other ones, and their size.
    """

    copies: tuple[tuple[str, ...], int]
    parts: tuple[tuple[str, ...], int]

    @classmethod
    def of(cls, stack: Stack) -> "Over":
        """Those of a leaf."""
        mesh, parts, batch = stack.over
        used = {*parts, *batch}
        copies = tuple(name for name in mesh.axis_names if name not in used)
        sizes = dict(zip(mesh.axis_names, mesh.axis_sizes, strict=True))
        return cls(
            *((own, math.prod(sizes[n] for n in own)) for own in (copies, parts))
        )

    @property
    def bins(self) -> int:
        """One for each device."""
        return self.copies[1] * self.parts[1]

    @property
    def bin(self) -> jax.Array:
        """That of this device."""
        return lax.axis_index((*self.copies[0], *self.parts[0]))

    def there(self, x: jax.Array) -> jax.Array:
        """Of what each bin gets, what all devices sent to this one's."""
        (copies, count), (parts, size) = self.copies, self.parts
        if count > 1:
            x = lax.dynamic_slice_in_dim(x, lax.axis_index(copies) * size, size)
        return self._all_to_all(x) if parts else x

    def back(self, x: jax.Array) -> jax.Array:
        """The inverse; all devices get the results of their parts."""
        x = self._all_to_all(x) if self.parts[0] else x
        copies, count = self.copies
        return lax.all_gather(x, copies, axis=0, tiled=True) if count > 1 else x

    def _all_to_all(self, x: jax.Array) -> jax.Array:
        return lax.all_to_all(x, self.parts[0], split_axis=0, concat_axis=0, tiled=True)


def _sent(runs: Sequence[Run], kinds: Sequence[Kind], units: Any) -> jax.Array:
    """What goes to each bin, one after the other, and zeros up to the fullest bin's."""
    rows, starts, found = length(runs, kinds), [0] * len(kinds), []
    for run in runs:
        pieces = []
        for k, (n, x) in enumerate(zip(run.counts, units, strict=True)):
            end = starts[k] + run.bins * n
            pieces.append(x[starts[k] : end].reshape(run.bins, n * kinds[k].size, ROW))
            starts[k] = end
        own = jnp.concatenate(pieces, axis=1)
        found.append(jnp.pad(own, ((0, 0), (0, rows - own.shape[1]), (0, 0))))
    return jnp.concatenate(found)


def _received(
    runs: Sequence[Run], kinds: Sequence[Kind], x: jax.Array
) -> list[list[jax.Array]]:
    """The inverse of `_sent`: units of each kind, in pieces."""
    found: list[list[jax.Array]] = [[] for _ in kinds]
    first = 0
    for run in runs:
        start, last = 0, first + run.bins
        for own, n, kind in zip(found, run.counts, kinds, strict=True):
            end = start + n * kind.size
            if n:
                own.append(x[first:last, start:end].reshape(-1, kind.size, ROW))
            start = end
        first = last
    return found


def _computed(
    function: OfMatrices,
    groups: Sequence[Group],
    runs: Sequence[Run],
    x: jax.Array,
    over: Over,
    operands: Any,
) -> jax.Array:
    """The function of what is in this device's bin, each matrix in its place."""
    each = np.repeat([run.counts for run in runs], [run.bins for run in runs], axis=0)
    sizes = np.array([group.kind.size for group in groups])
    firsts = np.cumsum(each * sizes, axis=1) - each * sizes
    for k, group in enumerate(groups):
        size = group.kind.size

        def body(
            i: Any, x: jax.Array, first: Any, group: Group = group, size: int = size
        ) -> jax.Array:
            at = first + i * size
            one = lax.dynamic_slice_in_dim(x, at, size, axis=1)
            one = group.of_one(function, one, operands)
            return lax.dynamic_update_slice_in_dim(x, one, at, axis=1)

        first, count = _own(firsts[:, k], over), _own(each[:, k], over)
        if isinstance(count, int) and count < 2:
            x = body(0, x, first) if count else x
        else:
            x = lax.fori_loop(0, count, lambda i, x, f=first, b=body: b(i, x, f), x)
    return x


def _own(values: np.ndarray, over: Over) -> Any:
    """Of one number for each bin, that of this device's."""
    if np.all(values == values[0]):
        return int(values[0])
    return jnp.asarray(values, jnp.int32)[over.bin]
