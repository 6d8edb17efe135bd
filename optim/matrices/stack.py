"""A leaf of matrices that are sharded: its parts, and how they make whole matrices."""

import math
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import NamedSharding

from ..sharding.geometry import padded_spec
from ..storage.shards import mesh_axes
from .choice import Axes, Shape

# A TPU has matrices in tiles, and XLA moves whole ones where shapes say so:
# docs/decisions.md, "Muon: whole matrices in bins".
TILE = (8, 128)


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
    def _split(self) -> list[int]:
        """A part's axes, the last two each as tiles and what is within a tile."""
        *others, r, c = self.local
        high, wide = TILE
        high = high if r % high == 0 else r
        wide = wide if c % wide == 0 else c
        return [*others, r // high, high, c // wide, wide]

    @property
    def _sent(self) -> list[int]:
        """In which order their values are sent: columns of tiles, one after another."""
        n = len(self.local)
        return [n, *range(n), n + 1]

    def flat(self, x: jax.Array) -> jax.Array:
        """Parts (count, values) as they are sent, of (count, *local)."""
        x = x.reshape(len(x), *self._split)
        return x.transpose(0, *(k + 1 for k in self._sent)).reshape(len(x), -1)

    def parts(self, x: jax.Array) -> jax.Array:
        """The inverse of `flat`."""
        x = x.reshape(len(x), *(self._split[k] for k in self._sent))
        order = [self._sent.index(k) + 1 for k in range(len(self._sent))]
        return x.transpose(0, *order).reshape(-1, *self.local)

    @property
    def _devices(self) -> list[int]:
        """What all devices sent is (mesh axes, count, a part): count, rows, columns."""
        m, n = len(self.sizes), len(self.local)
        own = [[k] for k in range(n - 2)] + [[n - 2, n - 1], [n, n + 1]]
        order = [m]
        for over, axes in zip(self.axes, own, strict=True):
            order += [*over, *(m + 1 + self._sent.index(k) for k in axes)]
        return order

    def joined(self, x: jax.Array) -> jax.Array:
        """Matrices (count, rows, columns), of (devices, count, values)."""
        part = [self._split[k] for k in self._sent]
        x = x.reshape(*self.sizes, x.shape[1], *part)
        return x.transpose(self._devices).reshape(-1, *self.whole)

    def cut(self, x: jax.Array) -> jax.Array:
        """The inverse of `joined`."""
        order, count = self._devices, len(x)
        shape = [*self.sizes, count, *(self._split[k] for k in self._sent)]
        x = x.reshape([shape[k] for k in order])
        x = x.transpose([order.index(k) for k in range(len(order))])
        return x.reshape(math.prod(self.sizes), count, self.values)
