"""Trees flattened with the paths of their leaves, and errors that name a path."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from ..checks import is_number
from ..values import is_paged, is_tree


class Leaves(NamedTuple):
    """A tree, flat.

    Attributes:
      paths: like `encoder/kernel`.
      leaves: its leaves.
      treedef: its structure.
      names: the paths without the boxes around leaves, a `Variable` of nnx or a
        `Partitioned` of linen. So they are the same before and after these are unboxed;
        options and random numbers go by them.
    """

    paths: tuple[str, ...]
    leaves: list[Any]
    treedef: Any
    names: tuple[str, ...]

    @classmethod
    def of(cls, tree: Any) -> "Leaves":
        """Flatten."""
        with_paths, treedef = jax.tree_util.tree_flatten_with_path(tree)
        paths = tuple(path_name(path) for path, _ in with_paths)
        names = tuple(leaf_name(path) for path, _ in with_paths)
        return cls(paths, [leaf for _, leaf in with_paths], treedef, names)

    def replaced(self, leaves: list[Any]) -> Any:
        """The tree with other leaves."""
        return self.treedef.unflatten(leaves)


def path_name(path: Any) -> str:
    """A key path as text, `encoder/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def leaf_name(path: Any) -> str:
    """The same without the box around a leaf."""
    return path_name(path[:-1] if is_boxed(path) else path)


def is_boxed(path: Any) -> bool:
    """Whether a key path ends in a box."""
    return len(path) > 1 and path[-1] == _IN_BOX


_IN_BOX = jax.tree_util.GetAttrKey("value")


class Kind(NamedTuple):
    """What the values of a prefix may be, for `spread`."""

    fits: Callable[[Any], bool]
    description: str


NUMBERS = Kind(is_number, "numbers")
# Checked leaf by leaf, with better errors.
SIZES = Kind(lambda x: x is None or not is_tree(x), "ints, or None")
AXIS = Kind(lambda x: x is None or not is_tree(x), "ints, or None")
NAMES = Kind(lambda x: x is None or isinstance(x, str), "names, or None")
BOOLS = Kind(lambda x: isinstance(x, bool | np.bool_), "bools")
PAGED = Kind(is_paged, "True, False or 'auto'")
AXES = Kind(
    lambda x: x is None or isinstance(x, int | np.integer) or _is_axes(x),
    "ints, tuples of ints, or None",
)


SHARDINGS = Kind(
    lambda x: isinstance(x, NamedSharding | PartitionSpec),
    "NamedShardings (or PartitionSpecs, within jax.set_mesh)",
)


def _is_axes(x: Any) -> bool:
    return type(x) is tuple and all(isinstance(k, int | np.integer) for k in x)


def per_leaf(name: str, value: Any, tree: Leaves, kind: Kind) -> list[Any]:
    """For each leaf of a tree, its value of an option.

    Args:
      name: of the option, for errors.
      value: one for all, a function of the path, or a prefix of the tree: see `spread`.
      tree: the tree.
      kind: what values are.

    Raises:
      ValueError: where a value is of another kind, or a prefix does not fit.
    """
    if not callable(value):
        return spread(name, value, tree, kind)
    found = [value(name) for name in tree.names]
    for path, x in zip(tree.names, found, strict=True):
        if not kind.fits(x):
            raise ValueError(f"{name} for {path!r} is {x!r}, not {kind.description}")
    return found


def spread(name: str, prefix: Any, tree: Leaves, kind: Kind) -> list[Any]:
    """For each leaf of a tree, the value of a prefix of it.

    Args:
      name: of the argument that is the prefix, for errors.
      prefix: a tree like `tree`, or one that has a value where that has a subtree.
      tree: the tree.
      kind: what values are.

    Raises:
      ValueError: where the two do not fit, or a value is of another kind.
    """

    def is_value(x: Any) -> bool:
        return x is None or kind.fits(x)

    whole = tree.replaced(tree.leaves)
    values: list[Any] = []

    def visit(value: Any, subtree: Any) -> None:
        values.extend([value] * len(jax.tree.leaves(subtree)))

    flat, _ = jax.tree_util.tree_flatten_with_path(prefix, is_leaf=is_value)
    for path, value in flat:
        if value is not None and not kind.fits(value):
            at = f" at {path_name(path)!r}" if path else ""
            raise ValueError(f"{name}{at} is {value!r}, not {kind.description}")
    try:
        jax.tree.map(visit, prefix, whole, is_leaf=is_value)
    except (ValueError, TypeError) as error:
        named = [path_name(path) for path, _ in flat]
        raise ValueError(
            f"{name} does not fit the parameters at {_misfit(named, tree.paths)!r}: "
            f"give a tree of {kind.description} like them, or a prefix of that tree"
        ) from error
    for path, value in zip(tree.paths, values, strict=True):
        if not kind.fits(value):  # None, where the parameters are not
            raise ValueError(f"{name} at {path!r} is None, not {kind.description}")
    return values


def _misfit(prefixes: list[str], paths: tuple[str, ...]) -> str:
    """The first path that has no prefix, or prefix without a path."""
    for path in paths:
        if not any(f"{path}/".startswith(f"{p}/") for p in prefixes):
            return path
    unused = (
        p for p in prefixes if not any(f"{x}/".startswith(f"{p}/") for x in paths)
    )
    return next(unused, "")
