"""Equal matrices of several leaves: stacked, and how many of them go together."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .bins import Kind
from .choice import Shape
from .stack import TILE, Stack, Tiling

# Of a stack of matrices (count, rows, columns), with operands; elementwise in count.
OfMatrices: TypeAlias = Callable[..., jax.Array]

# Values in a row of what is sent.
ROW = TILE[1]
# Smaller matrices are computed at once, this many values of them.
_AT_ONCE = 2**22
# Moving a value takes about as long as products with matrices of this many rows.
_MOVING = 1024


def in_turns(function: Any, x: jax.Array, operands: Any) -> jax.Array:
    """Of a few matrices at a time, so that what is kept meanwhile is small."""
    some = at_once(x.shape[1:])
    if some >= len(x) or len(x) == 1:
        return function(x, *operands)
    return lax.map(
        lambda one: function(one[None], *operands)[0],
        x,
        batch_size=None if some == 1 else some,
    )


def at_once(shape: Shape) -> int:
    """How many matrices of this shape are computed together."""
    return max(1, _AT_ONCE // math.prod(shape))


@dataclass(frozen=True)
class Group:
    """Leaves whose matrices are stacked; static.

    Attributes:
      leaves: their places among all.
      counts: how many matrices a device has a part of, in each.
      tiling: of all of them.
      unit: how many matrices go to a device together.
    """

    leaves: tuple[int, ...]
    counts: tuple[int, ...]
    tiling: Tiling
    unit: int

    @property
    def kind(self) -> Kind:
        """Of its units; sizes are rows of values."""
        (rows, columns), unit = self.tiling.whole, self.unit
        cost = unit * rows * columns * (min(rows, columns) + _MOVING)
        values = unit * self.tiling.values
        return Kind(-(-sum(self.counts) // unit), cost, -(-values // ROW))

    def units(self, matrices: Sequence[jax.Array]) -> jax.Array:
        """A device's parts of them, (units, rows, values), of (count, *local) each."""
        kind, unit = self.kind, self.unit
        x = self.tiling.flat(jnp.concatenate(matrices))
        x = jnp.pad(x, ((0, kind.count * unit - len(x)), (0, 0)))
        return self._rows(x.reshape(kind.count, -1))

    def matrices(self, units: jax.Array) -> list[jax.Array]:
        """The inverse of `units`."""
        ends = np.cumsum(self.counts)
        x = self._values(units).reshape(-1, self.tiling.values)[: ends[-1]]
        return jnp.split(self.tiling.parts(x), ends[:-1])

    def of_one(self, function: OfMatrices, x: jax.Array, operands: Any) -> jax.Array:
        """The function of one unit, (devices, rows, values)."""
        x = self._values(x).reshape(len(x), self.unit, -1)
        # Else XLA would choose an order in memory that suits the first product, and
        # copy matrices to and fro.
        whole = lax.optimization_barrier(self.tiling.joined(x))
        whole = lax.optimization_barrier(function(whole, *operands))
        found = self.tiling.cut(whole)
        return self._rows(found.reshape(len(found), -1))

    def _rows(self, x: jax.Array) -> jax.Array:
        size = self.kind.size
        x = jnp.pad(x, ((0, 0), (0, size * ROW - x.shape[1])))
        return x.reshape(len(x), size, ROW)

    def _values(self, x: jax.Array) -> jax.Array:
        return x.reshape(len(x), -1)[:, : self.unit * self.tiling.values]


def groups_of(stacks: Sequence[Stack], bins: int) -> list[Group]:
    """Leaves whose matrices are equal, and sharded alike."""
    found: dict[Tiling, list[int]] = {}
    for k, stack in enumerate(stacks):
        found.setdefault(stack.tiling, []).append(k)
    groups = []
    for tiling, leaves in found.items():
        counts = tuple(math.prod(stacks[k].shard) // tiling.values for k in leaves)
        unit = min(at_once(tiling.whole), -(-sum(counts) // bins))
        groups.append(Group(tuple(leaves), counts, tiling, unit))
    return groups
