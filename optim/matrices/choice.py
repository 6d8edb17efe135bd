"""Which leaves are stepped as matrices, and which of their axes are rows."""

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import jax.numpy as jnp
from optax.contrib import MuonDimensionNumbers

from ..storage.tree import AXES, BOOLS, Kind, Leaves, per_leaf, spread

Shape: TypeAlias = tuple[int, ...]


class Axes(NamedTuple):
    """The axes of a leaf that is a stack of matrices, none of them negative.

    Attributes:
      batch: those along which matrices are stacked.
      rows: those that together are the rows: what a product with the matrix sums over.
      columns: those that together are the columns.
    """

    batch: tuple[int, ...]
    rows: tuple[int, ...]
    columns: tuple[int, ...]

    @property
    def order(self) -> tuple[int, ...]:
        """All of them."""
        return (*self.batch, *self.rows, *self.columns)

    def sizes(self, shape: Shape) -> tuple[int, int, int]:
        """Matrices in a leaf of this shape, their rows and their columns."""
        count, rows, columns = (math.prod(shape[k] for k in own) for own in self)
        return count, rows, columns


_NUMBERS = Kind(
    lambda x: x is None or isinstance(x, MuonDimensionNumbers),
    "MuonDimensionNumbers, or None for AdamW",
)
# Their rows or columns are words, not features of one space.
_WORDS = re.compile(
    r"embed|(^|/)(wte|wpe|(\w+_)?head|logits(_\w+)?|classifier)(/|$)", re.IGNORECASE
)
_ARGUMENT = "muon_weight_dimension_numbers"


def matrices_in(
    dimension_numbers: Any, mask: Any, layer_axes: Any, params: Any, tree: Leaves
) -> list[Axes | None]:
    """For each leaf its axes, or None where it is no matrix.

    Args:
      dimension_numbers: the argument `muon_weight_dimension_numbers`.
      mask: the argument `muon_mask`.
      layer_axes: the option.
      params: the parameters, or gradients.
      tree: the same, flat.

    Raises:
      ValueError: where an argument does not fit a leaf.
    """
    if not tree.leaves:
        return []
    layers = [
        tuple(k % len(jnp.shape(leaf)) for k in _listed(axes))
        for axes, leaf in zip(
            per_leaf("layer_axes", layer_axes, tree, AXES), tree.leaves, strict=True
        )
    ]
    if dimension_numbers is not None:
        given = _called(dimension_numbers, params)
        numbers = spread(_ARGUMENT, given, tree, _NUMBERS)
        rows = zip(tree.names, tree.leaves, numbers, layers, strict=True)
        return [None if n is None else _axes(p, x, n, own) for p, x, n, own in rows]
    chosen: Sequence[Any] = [None] * len(tree.leaves)
    if mask is not None:
        chosen = spread("muon_mask", _called(mask, params), tree, BOOLS)
    rows = zip(tree.names, tree.leaves, chosen, layers, strict=True)
    return [_of_rank_2(*row) for row in rows]


def _called(value: Any, params: Any) -> Any:
    """Dimension numbers, a tree of them, or what a function says of the parameters."""
    return value(params) if callable(value) else value


def _listed(axes: Any) -> tuple[int, ...]:
    return () if axes is None else axes if isinstance(axes, tuple) else (axes,)


def _of_rank_2(
    path: str, leaf: Any, chosen: bool | None, layers: tuple[int, ...]
) -> Axes | None:
    shape = jnp.shape(leaf)
    inside = [k for k in range(len(shape)) if k not in layers]
    fits = len(inside) == 2 and _is_real(leaf) and 0 not in shape
    if chosen is None:
        chosen = fits and not _WORDS.search(path)
    if not chosen:
        return None
    if not fits:
        stacked = f" with layer_axes={layers}" if layers else ""
        raise ValueError(
            f"muon_mask is True for {path!r}, which is no matrix of real numbers: "
            f"shape {shape}{stacked}, {jnp.result_type(leaf)}. Make it False, for "
            "AdamW; name the axes that stack layers in layer_axes; or say which axes "
            f"are rows and columns: {_ARGUMENT}=lambda params: ..."
        )
    return Axes(tuple(sorted(layers)), (inside[0],), (inside[1],))


def _is_real(leaf: Any) -> bool:
    dtype = jnp.result_type(leaf)
    return jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize <= 4


def _axes(
    path: str, leaf: Any, numbers: MuonDimensionNumbers, layers: tuple[int, ...]
) -> Axes:
    """Checked dimension numbers."""
    shape = jnp.shape(leaf)
    rank = len(shape)
    both = [_listed(numbers.reduction_axis), _listed(numbers.output_axis)]
    both = [tuple(own) for own in both]
    named = [*both[0], *both[1]]
    wrong = ""
    if rank < 2 or not _is_real(leaf) or 0 in shape:
        wrong = "it is no matrix of real numbers"
    elif not both[0] or not both[1]:
        wrong = "rows and columns need an axis each"
    elif not all(-rank <= k < rank for k in named):
        wrong = f"its axes are 0 to {rank - 1}"
    elif len({k % rank for k in named}) < len(named):
        wrong = "an axis is named twice"
    elif {k % rank for k in named} & set(layers):
        wrong = f"layer_axes={layers} stack whole matrices, and are neither"
    if wrong:
        raise ValueError(
            f"{_ARGUMENT} of {path!r}, shape {shape}, {jnp.result_type(leaf)}, is "
            f"{numbers}: {wrong}. Give axes of the leaf, such as "
            "MuonDimensionNumbers(reduction_axis=0, output_axis=1), or None for AdamW"
        )
    rows, columns = (tuple(k % rank for k in own) for own in both)
    batch = tuple(k for k in range(rank) if k not in (*rows, *columns))
    return Axes(batch, rows, columns)
