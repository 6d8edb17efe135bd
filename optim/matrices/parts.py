"""A tree's two optimizers: that of its matrices, and that of the rest."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import optax

from ..sharding.hosting import Paging
from ..stepping.optimizer import Optimizer
from ..storage.tree import Leaves
from .choice import Axes


class Parts(NamedTuple):
    """A tree's two optimizers.

    Attributes:
      axes: of each leaf; None where it is no matrix.
      muon: of the matrices.
      adam: of the rest.
    """

    axes: list[Axes | None]
    muon: Optimizer
    adam: Optimizer

    def split(self, tree: Leaves) -> tuple[Any, Any]:
        """The matrices, and the rest."""
        return tuple(
            tree.replaced(
                [
                    x if (axes is None) == rest else optax.MaskedNode()
                    for x, axes in zip(tree.leaves, self.axes, strict=True)
                ]
            )
            for rest in (False, True)
        )  # type: ignore[return-value]

    def merged(self, muon: Sequence[Any], adam: Sequence[Any]) -> list[Any]:
        """What belongs to each leaf, in the order of the tree."""
        one, other = iter(muon), iter(adam)
        return [next(other if axes is None else one) for axes in self.axes]

    def paged(self, tree: Leaves, pages: Sequence[Paging]) -> "Parts":
        """With what `paged="auto"` is for each leaf; as they are, if there is none."""
        if not pages:
            return self
        pairs = zip(tree.names, pages, strict=True)
        own = {path: paging.hosted for path, paging in pairs}.__getitem__
        muon, adam = (
            replace(x, settings=replace(x.settings, paged=own)) for x in self[1:]
        )
        return Parts(self.axes, muon, adam)
