"""Where another transformation's state has trees like the parameters."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import optax

from ..storage.quantized import QuantizedState, part_key, slot_name
from ..storage.state import State
from ..storage.tree import path_name
from .roles import Field, Moment, moments_of, roles_of


@dataclass(frozen=True)
class Structure:
    """How a state splits into moments and the rest, whatever the parameters are.

    Attributes:
      treedef: of the state, in which a tree like the parameters counts as a leaf, and
        so does an Octavo state.
      paths: of these leaves.
      places: for those that are moments, the key and the slot; else None.
      parts: the moments, by their key.
    """

    treedef: Any
    paths: tuple[tuple[str, ...], ...]
    places: tuple[tuple[str, str] | None, ...]
    parts: dict[str, tuple[Moment, ...]]

    @classmethod
    def of(cls, tx: Any, slots: Mapping[str, str | None]) -> "Structure":
        """Of the states of a transformation.

        Raises:
          ValueError: where it cannot be seen, where nothing is like the parameters, or
            where it is not known what a moment is.
        """
        hole = _hole()

        def is_leaf(x: Any) -> bool:
            return isinstance(x, type(hole) | State | QuantizedState)

        shapes = _shapes(tx, hole)
        flat, treedef = jax.tree_util.tree_flatten_with_path(shapes, is_leaf=is_leaf)
        fields = {
            k: _field(shapes, path)
            for k, (path, x) in enumerate(flat)
            if isinstance(x, type(hole))
        }
        roles = dict(zip(fields, roles_of([*fields.values()], slots), strict=True))
        found = {k: field for k, field in fields.items() if roles[k][0] != "kept"}
        if not found:
            raise ValueError(_NOTHING.format(_listed(list(fields.values()))))
        places: list[tuple[str, str] | None] = [None] * len(flat)
        below: dict[str, list[int]] = {}
        for k, field in found.items():
            key = part_key(field.path[:-1])
            places[k] = key, field.name
            below.setdefault(key, []).append(k)
        parts = {
            key: moments_of([found[k].name for k in ks], [roles[k] for k in ks])
            for key, ks in below.items()
        }
        paths = tuple(_words(path) for path, _ in flat)
        return cls(treedef, paths, tuple(places), parts)

    def split(self, state: Any) -> tuple[dict[str, dict[str, Any]], Any]:
        """Moments, as trees by key and slot, and the rest of a state."""
        moments: dict[str, dict[str, Any]] = {key: {} for key in self.parts}
        rest: Any = {}
        rows = zip(self.paths, self.places, self._leaves(state), strict=True)
        for path, place, leaf in rows:
            if place is not None:
                moments[place[0]][place[1]] = leaf
                continue
            *outer, last = path
            inside = rest
            for name in outer:
                inside = inside.setdefault(name, {})
            inside[last] = leaf
        return moments, rest

    def joined(self, moments: Mapping[str, Mapping[str, Any]], rest: Any) -> Any:
        """The inverse of `split`."""
        leaves = []
        for path, place in zip(self.paths, self.places, strict=True):
            if place is not None:
                leaves.append(moments[place[0]][place[1]])
                continue
            inside = rest
            for name in path:
                inside = inside[name]
            leaves.append(inside)
        return self.treedef.unflatten(leaves)

    def _leaves(self, state: Any) -> list[Any]:
        try:
            return self.treedef.flatten_up_to(state)
        except ValueError as error:
            raise ValueError(
                "the state of this transformation has another structure with these "
                "parameters than without, so that its moments cannot be found: put "
                "optim.quantized around its parts"
            ) from error


_NOTHING = (
    "optim.quantized found no moments to store in 8 bits{}: give it a transformation "
    "that keeps some, or say which with slots=. Octavo's own optimizers are in 8 bits "
    "already"
)


def _listed(fields: Sequence[Field]) -> str:
    names = ", ".join(repr(field.shown) for field in fields)
    return f" ({names} would stay as they are)" if names else ""


def _hole() -> Any:
    """What optax puts in the place of parameters to see where a state is like them."""
    found = []

    def init(params: Any) -> Any:
        found.append(params)
        return params

    optax.tree_map_params(init, lambda x: x, ())
    return found[0]


def _shapes(tx: Any, hole: Any) -> Any:
    try:
        return jax.eval_shape(tx.init, hole)
    except Exception as error:
        raise ValueError(
            f"this transformation's init takes no tree without leaves ({error}), so "
            "that its moments cannot be found: put optim.quantized inside of it, "
            "around the part that has the moments"
        ) from error


def _words(path: Any) -> tuple[str, ...]:
    return tuple(path_name((key,)) for key in path)


def _field(state: Any, path: Any) -> Field:
    """A field, and the class of the named tuple that has it."""
    node: Any = state
    for key in path[:-1]:
        if isinstance(key, jax.tree_util.GetAttrKey):
            node = getattr(node, key.name)
        elif isinstance(key, jax.tree_util.SequenceKey):
            node = node[key.idx]
        else:
            node = node[key.key] if isinstance(node, Mapping) else None
    words = _words(path)
    name = slot_name(words[-1] if words else "")
    return Field(words, type(node).__name__ if path else "", name)
