"""A leaf of matrices that are sharded: its parts, and how they make whole matrices."""

import math
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import NamedSharding

from ..sharding.geometry import padded_spec
from ..storage.shards import mesh_axes
from .choice import Axes, Shape

LANES = 128


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
    def over(self) -> Any:
        """The mesh, and its axes over which matrices are partitioned, and batches."""
        assert self.sharding is not None
        mesh, batch = self.sharding.mesh, len(self.axes.batch)
        parts, own = (
            {name for axis in some for name in axis}
            for some in (self.names[batch:], self.names[:batch])
        )
        ordered = tuple(n for n in mesh.axis_names if n in parts)
        return mesh, ordered, tuple(n for n in mesh.axis_names if n in own)

    @property
    def shard(self) -> Shape:
        """The shape of a shard."""
        if self.sharding is None:
            return self.shape
        return self.sharding.shard_shape(self.shape)

    @property
    def tiling(self) -> "Tiling":
        """Of its matrices."""
        mesh, over, _ = self.over
        batch = len(self.axes.batch)
        sizes = dict(zip(mesh.axis_names, mesh.axis_sizes, strict=True))
        return Tiling(
            tuple(sizes[name] for name in over),
            tuple(tuple(map(over.index, axis)) for axis in self.names[batch:]),
            tuple(self.shard[k] for k in self.axes.order[batch:]),
            len(self.axes.rows),
        )

    def matrices(self, shard: jax.Array, local: Shape) -> jax.Array:
        """The leaf, or a shard of it, as (count, *local)."""
        return shard.transpose(self.axes.order).reshape(-1, *local)

    def leaf(self, matrices: jax.Array, shape: Shape) -> jax.Array:
        """The inverse of `matrices`, given the shape of the result."""
        order = self.axes.order
        ordered = matrices.reshape([shape[k] for k in order])
        return ordered.transpose([order.index(k) for k in range(len(order))])


@dataclass(frozen=True)
class Tiling:
    """How the devices' parts make up a matrix; equal for leaves that are stacked.

    Attributes:
      sizes: of the mesh axes over which it is partitioned, in the mesh's order.
      axes: for each axis of the matrix, which of them partition it, the outer one
        first.
      local: the shape of a part.
      rows: how many axes are rows.
    """

    sizes: tuple[int, ...]
    axes: tuple[tuple[int, ...], ...]
    local: Shape
    rows: int

    @property
    def whole(self) -> tuple[int, int]:
        """Rows and columns of the matrix."""
        lengths = [
            n * math.prod(self.sizes[k] for k in own)
            for n, own in zip(self.local, self.axes, strict=True)
        ]
        return math.prod(lengths[: self.rows]), math.prod(lengths[self.rows :])

    @property
    def values(self) -> int:
        """In a part."""
        return math.prod(self.local)

    @property
    def _lanes(self) -> int:
        last = self.local[-1]
        return LANES if last % LANES == 0 else last

    def flat(self, x: jax.Array) -> jax.Array:
        """Parts (count, values), of (count, *local), as they are sent.

        In columns as wide as a TPU's tiles, which are then moved whole.
        """
        x = x.reshape(len(x), -1, self.local[-1] // self._lanes, self._lanes)
        return x.transpose(0, 2, 1, 3).reshape(len(x), -1)

    def parts(self, x: jax.Array) -> jax.Array:
        """The inverse of `flat`."""
        x = x.reshape(len(x), self.local[-1] // self._lanes, -1, self._lanes)
        return x.transpose(0, 2, 1, 3).reshape(-1, *self.local)

    @property
    def _sent(self) -> list[int]:
        """The shape of matrices, but for their count: mesh axes, and axes of a part."""
        *others, last = self.local
        return [*self.sizes, last // self._lanes, *others, self._lanes]

    @property
    def _order(self) -> list[int]:
        """Of the axes of `_sent`, with the count after those of the mesh."""
        m = len(self.sizes)
        order = [m]
        for k, own in enumerate(self.axes[:-1]):
            order += [*own, m + 2 + k]
        return [*order, *self.axes[-1], m + 1, m + 1 + len(self.axes)]

    def joined(self, x: jax.Array) -> jax.Array:
        """Matrices (count, rows, columns), of what devices sent: (devices, count, -1)."""
        shape, m = self._sent, len(self.sizes)
        x = x.reshape(*shape[:m], x.shape[1], *shape[m:])
        return x.transpose(self._order).reshape(-1, *self.whole)

    def cut(self, x: jax.Array) -> jax.Array:
        """The inverse of `joined`."""
        shape, m, order, count = self._sent, len(self.sizes), self._order, len(x)
        shape.insert(m, count)
        x = x.reshape([shape[k] for k in order])
        x = x.transpose([order.index(k) for k in range(len(order))])
        return x.reshape(math.prod(self.sizes), count, self.values)
