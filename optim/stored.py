"""A state tells how it is stored: a small table in `State.extra["format"]`.

One row for each leaf, in the order of the tree: the block size, the blocked axis (-1:
none), and for each slot the number of its format (`NUMBERS` of the kernels' formats).
Conversions and checkpoints read it, so that they need not be told how a state, maybe
deep in a chain of transformations, was made.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from octavo.pallas_kernels import NUMBERS, Blocks, Format, numbered

from .settings import LeafPlan
from .state import State
from .tree import Leaves


class StoredLeaf(NamedTuple):
    """How the moments of one leaf are stored: a format for each slot, and blocks."""

    formats: tuple[Format, ...]
    blocks: Blocks


def format_table(leaves: Sequence[StoredLeaf | LeafPlan], slots: int) -> jax.Array:
    """The table, int32 (leaves, 2 + slots); one row of zeros if there is no leaf."""
    rows = [
        (
            leaf.blocks.size,
            -1 if leaf.blocks.axis is None else leaf.blocks.axis,
            *(NUMBERS[f.name] for f in leaf.formats),
        )
        for leaf in leaves
    ]
    # Orbax saves no array of size 0.
    return jnp.asarray(np.array(rows or [(0,) * (2 + slots)], np.int32))


def stored(state: State, table: Any = None) -> dict[str, StoredLeaf]:
    """How each leaf of a state is stored, by its path.

    Args:
      state: arrays or their shapes.
      table: its format table, concrete; None: the state's own.

    Raises:
      ValueError: if the table does not say.
    """
    ((tag, own),) = state.extra["format"].items()
    if state.count.ndim:
        raise ValueError(
            "a stack of states: give one, such as jax.tree.map(lambda x: x[0], states)"
        )
    leaves = Leaves.of(next(iter(state.moments.values())))
    shapes = [tuple(leaf.shape) for leaf in leaves.leaves]
    return stored_leaves(own if table is None else table, leaves.paths, shapes, tag)


def stored_leaves(
    table: Any, paths: Sequence[str], shapes: Sequence[tuple[int, ...]], tag: str
) -> dict[str, StoredLeaf]:
    """How leaves are stored, from a table; see `stored`."""
    found = {}
    for path, shape, row in zip(paths, shapes, np.asarray(table), strict=False):
        size, axis, *numbers = (int(n) for n in row)
        try:
            formats = tuple(numbered(n) for n in numbers)
        except KeyError:
            raise ValueError(
                f"{path!r}: the state does not say how it is stored ({tag}, row "
                f"{row.tolist()}): it was written by a newer version, or zeroed; then "
                'take extra["format"] from a fresh tx.init(params)'
            ) from None
        found[path] = StoredLeaf(
            formats, Blocks(shape, None if axis < 0 else axis, size)
        )
    return found
