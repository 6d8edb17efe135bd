"""Options of two optimizers that share a tree: trees of values as functions of paths.

A tree is like all parameters, and each optimizer has some of them.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from octavo.pallas_kernels import Rule

from ..options import Settings
from ..storage.shards import mesh_axes
from ..storage.tree import (
    AXES,
    AXIS,
    NAMES,
    NUMBERS,
    PAGED,
    SHARDINGS,
    SIZES,
    Kind,
    Leaves,
    per_leaf,
)
from ..values import is_by_leaf, is_state

_PER_LEAF: dict[str, Kind] = {
    "state": Kind(
        lambda x: isinstance(x, str) or _names_slots(x), "formats, or one for each slot"
    ),
    "weights": NAMES,
    "block_size": SIZES,
    "block_axis": AXIS,
    "layer_axes": AXES,
    "lr_scale": NUMBERS,
    "backend": NAMES,
    "paged": PAGED,
    "sharding": SHARDINGS,
}


def by_path(settings: Settings, tree: Leaves) -> Settings:
    """Settings whose trees, which are like all parameters, are functions of paths."""
    made: dict[str, Any] = {}
    if not tree.leaves:  # a placeholder of optax, which no tree fits
        return settings
    for name, kind in _PER_LEAF.items():
        value = getattr(settings, name)
        whole = name == "state" and _names_slots(value)
        if is_by_leaf(value) and not callable(value) and not whole:
            made[name] = function_of(name, value, tree, kind)
    value = settings.state_sharding
    if value is not None and not callable(value) and not mesh_axes(value):
        made["state_sharding"] = function_of("state_sharding", value, tree, SHARDINGS)
    return replace(settings, **made) if made else settings


def function_of(
    name: str, value: Any, tree: Leaves, kind: Kind
) -> Callable[[str], Any]:
    """A tree of values, or a prefix of one, as a function of the leaves' paths."""
    given = per_leaf(name, value, tree, kind)
    return dict(zip(tree.names, given, strict=True)).__getitem__


def _names_slots(value: Any) -> bool:
    return isinstance(value, Mapping) and bool({"mu", "nu"} & set(value))


def of_mu(state: Any, rule: Rule) -> Any:
    """The option `state` for matrices, which have one slot."""
    if callable(state):
        return lambda path: of_mu(state(path), rule)
    if isinstance(state, Mapping) and is_state(state, rule.slots) and "mu" in state:
        return {"mu": state["mu"]}
    return state
