"""What a checkpoint is restored into."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from octavo.pallas_kernels import Storage

from ..sharding.geometry import fitting, of_state
from ..sharding.placement import abstract, full
from ..sharding.states import made
from ..storage.memory import HOST
from ..storage.state import State
from ..storage.table import own_table, records_of, tables_of
from ..storage.tree import Leaves, path_name
from .description import CheckpointError, flat, states_of
from .sources import below, join


@dataclass(frozen=True)
class Target:
    """What to restore into.

    Attributes:
      tree: as given; leaves are arrays, or their shapes.
      taken: paths of the leaves to restore.
      shardings: of those whose place is known.
      states: optimizers' states among them, by their paths.
      records: how each of their leaves is to be stored.
    """

    tree: Any
    taken: frozenset[str]
    shardings: dict[str, NamedSharding]
    states: dict[str, State]
    records: dict[str, dict[str, Storage]]

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
            if only is None or path.partition("/")[0] in chosen
        }
        tables = _tables(tx, tree, states)
        return cls(
            tree,
            taken,
            _shardings(tx, tree, leaves, sharding),
            states,
            {path: records_of(states[path], table) for path, table in tables.items()},
        )

    def filled(self, values: Mapping[str, Any]) -> Any:
        """The tree with some leaves replaced, by their paths.

        Raises:
          CheckpointError: where a leaf that stays is only a shape.
        """

        def leaf(path: Any, old: Any) -> Any:
            name = path_name(path)
            if name in values:
                return _like(old, values[name])
            if isinstance(old, jax.ShapeDtypeStruct):
                raise CheckpointError(
                    f"{name!r} is not restored, and the target has only its shape: "
                    "give an array"
                )
            return old

        return jax.tree_util.tree_map_with_path(leaf, self.tree)


def _like(old: Any, new: Any) -> Any:
    """A value of the kind that the target has: of Python, numpy or JAX."""
    if isinstance(old, bool | int | float | complex | np.generic):
        return type(old)(new)
    if isinstance(old, np.ndarray):
        return np.asarray(new)
    return new if isinstance(new, jax.Array) else jax.numpy.asarray(new)


def _tables(tx: Any, tree: Any, states: Mapping[str, State]) -> dict[str, Any]:
    """The format table of each state, concrete: its own, or that of a fresh one."""
    tables = {path: own_table(state) for path, state in states.items()}
    if all(_says_how(state) for state in states.values()):
        return tables
    made = tables_of(tx, _parameters(tree))
    if len(made) != len(tables):
        raise CheckpointError("the target's state is not one of the optimizer given")
    return dict(zip(tables, made, strict=True))


def _says_how(state: State) -> bool:
    """Whether a state says how it is stored: it is not only shapes, nor zeroed."""
    table = own_table(state)
    if isinstance(table, jax.ShapeDtypeStruct):
        return False
    return bool(np.asarray(table).any()) or not jax.tree.leaves(state.trees)


def _parameters(tree: Any) -> Any:
    params = tree.get("params") if isinstance(tree, dict) else None
    params = getattr(tree, "params", params)
    if params is None:
        raise ValueError("the target has no `params`: give a TrainState, or arrays")
    return params


def _shardings(
    tx: Any, tree: Any, leaves: Mapping[str, Any], sharding: Any
) -> dict[str, NamedSharding]:
    """The sharding of each leaf of JAX, as far as that is known."""
    ours = {p: x for p, x in leaves.items() if _is_of_jax(x)}
    if sharding is None:
        return {p: x.sharding for p, x in ours.items() if _is_placed(p, x)}
    params = Leaves.of(_parameters(tree))
    ranks = [len(np.shape(x)) for x in params.leaves]
    found_for = zip(full(sharding, params), ranks, strict=True)
    given = dict(zip(params.paths, found_for, strict=True))
    everywhere = NamedSharding(next(iter(given.values()))[0].mesh, PartitionSpec())
    states = states_of(tree)
    moments = {p for path, state in states.items() for p in _trees(path, state)}
    others = {p for p in ours if p not in moments and any(below(p, s) for s in states)}
    near = {p: _like_parameter(p, np.shape(x), given) for p, x in ours.items()}
    found = {p: s if s and p not in others else everywhere for p, s in near.items()}
    hosted = _hosted(tx, params, given, states)
    return {p: s.with_memory_kind(HOST) if p in hosted else s for p, s in found.items()}


def _hosted(
    tx: Any,
    params: Leaves,
    given: Mapping[str, tuple[NamedSharding, int]],
    states: Mapping[str, State],
) -> set[str]:
    """Paths of the arrays that the optimizer keeps in host memory."""
    if not hasattr(tx, "init"):
        return set()
    shapes = params.replaced([abstract(x) for x in params.leaves])
    _, spaces = made(tx, shapes, [sharding for sharding, _ in given.values()])
    fields = {path.partition("/")[0] for path in states}
    hosted = {p for p, s in flat(spaces).items() if s == jax.memory.Space.Host}
    return {join(field, path) for field in fields for path in hosted}


def _is_of_jax(x: Any) -> bool:
    return isinstance(x, jax.Array | jax.ShapeDtypeStruct)


def _is_placed(path: str, x: Any) -> bool:
    """Whether an array is bound to its devices: a fresh counter may go anywhere."""
    mesh = getattr(x.sharding, "mesh", None)
    if isinstance(mesh, AbstractMesh) and not mesh.empty:
        raise ValueError(
            f"{path!r}: the target's shapes are on a mesh without devices, as "
            "jax.eval_shape returns them: pass sharding=, such as "
            "jax.tree.map(lambda p: p.sharding, params)"
        )
    return x.sharding is not None and getattr(x, "committed", True)


def _trees(path: str, state: State) -> list[str]:
    """Paths of a state's leaves that are sharded like parameters."""
    return [join(path, leaf) for leaf in flat(state.trees)]


def _like_parameter(
    path: str,
    shape: tuple[int, ...],
    given: Mapping[str, tuple[NamedSharding, int]],
) -> NamedSharding | None:
    parts = path.split("/")
    for k in range(len(parts) + 1):
        found = given.get("/".join(parts[k:]))
        if found is not None and len(found[0].spec) <= len(shape):
            return fitting(of_state(found[0], shape, found[1]), shape)
    return None
