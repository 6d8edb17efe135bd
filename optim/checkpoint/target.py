"""What a checkpoint is restored into."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from ..placement import fitting, full
from ..state import State
from ..stored import StoredLeaf, stored
from ..tree import Leaves, path_name
from .description import CheckpointError, flat, states_of


@dataclass(frozen=True)
class Target:
    """What to restore into.

    Attributes:
      tree: as given; leaves are arrays, or their shapes.
      taken: paths of the leaves to restore.
      shardings: of those whose place is known.
      states: optimizers' states among them, by their paths.
      stored: how each of their leaves is to be stored.
    """

    tree: Any
    taken: frozenset[str]
    shardings: dict[str, NamedSharding]
    states: dict[str, State]
    stored: dict[str, dict[str, StoredLeaf]]

    @classmethod
    def of(
        cls, tx: Any, tree: Any, sharding: Any, only: Collection[str] | None
    ) -> "Target":
        """Check a target.

        Raises:
          ValueError: for fields that it does not have, or shardings that do not fit.
        """
        leaves = flat(tree)
        fields = {path.partition("/")[0] for path in leaves}
        unknown = set(only or ()) - fields
        if unknown:
            raise ValueError(
                f"only={sorted(unknown)}: the target has {', '.join(sorted(fields))}"
            )
        chosen = fields if only is None else set(only)
        taken = frozenset(p for p in leaves if p.partition("/")[0] in chosen)
        states = {
            path: x
            for path, x in states_of(tree).items()
            if path.partition("/")[0] in chosen
        }
        tables = _tables(tx, tree, states)
        return cls(
            tree,
            taken,
            _shardings(tree, leaves, sharding),
            states,
            {path: stored(states[path], table) for path, table in tables.items()},
        )

    def filled(self, values: Mapping[str, Any]) -> Any:
        """The tree with some leaves replaced, by their paths.

        Raises:
          CheckpointError: where a leaf that stays is only a shape.
        """

        def leaf(path: Any, old: Any) -> Any:
            name = path_name(path)
            if name in values:
                new = values[name]
                return int(new) if isinstance(old, int) else new
            if isinstance(old, jax.ShapeDtypeStruct):
                raise CheckpointError(
                    f"{name!r} is not restored, and the target has only its shape: "
                    "give an array"
                )
            return old

        return jax.tree_util.tree_map_with_path(leaf, self.tree)


def _tables(tx: Any, tree: Any, states: Mapping[str, State]) -> dict[str, Any]:
    """The format table of each state, concrete."""
    tables = {
        path: next(iter(s.extra["format"].values())) for path, s in states.items()
    }
    if not any(isinstance(t, jax.ShapeDtypeStruct) for t in tables.values()):
        return tables
    params = jax.tree.map(
        lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), _parameters(tree)
    )
    made = jax.jit(lambda: [_table(s) for s in states_of(tx.init(params)).values()])()
    if len(made) != len(tables):
        raise CheckpointError("the target's state is not one of the optimizer given")
    return dict(zip(tables, made, strict=True))


def _table(state: State) -> Any:
    return next(iter(state.extra["format"].values()))


def _parameters(tree: Any) -> Any:
    params = tree.get("params") if isinstance(tree, dict) else None
    params = getattr(tree, "params", params)
    if params is None:
        raise ValueError("the target has no `params`: give a TrainState, or arrays")
    return params


def _shardings(
    tree: Any, leaves: Mapping[str, Any], sharding: Any
) -> dict[str, NamedSharding]:
    """Where each leaf is to lie: like the parameter whose path ends its own."""
    if sharding is None:
        own = {path: getattr(x, "sharding", None) for path, x in leaves.items()}
        return {path: s for path, s in own.items() if s is not None}
    params = Leaves.of(_parameters(tree))
    given = dict(zip(params.paths, full(sharding, params), strict=True))
    everywhere = NamedSharding(next(iter(given.values())).mesh, PartitionSpec())
    return {
        path: _like_parameter(path, np.shape(x), given) or everywhere
        for path, x in leaves.items()
    }


def _like_parameter(
    path: str, shape: tuple[int, ...], given: Mapping[str, NamedSharding]
) -> NamedSharding | None:
    parts = path.split("/")
    for k in range(len(parts)):
        sharding = given.get("/".join(parts[k:]))
        if sharding is not None and len(sharding.spec) <= len(shape):
            return fitting(sharding, shape)
    return None
