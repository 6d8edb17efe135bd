"""Trees flattened with the paths of their leaves, and errors that name a path."""

from collections.abc import Callable
from itertools import zip_longest
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from octavo.pallas_kernels import Slot

from .settings import LeafPlan
from .state import State, scale_name


class Leaves(NamedTuple):
    """A tree, flat."""

    paths: tuple[str, ...]
    leaves: list[Any]
    treedef: Any

    @classmethod
    def of(cls, tree: Any) -> "Leaves":
        """Flatten, with paths like `encoder/kernel`."""
        with_paths, treedef = jax.tree_util.tree_flatten_with_path(tree)
        paths = (path_name(path) for path, _ in with_paths)
        return cls(tuple(paths), [leaf for _, leaf in with_paths], treedef)

    def replaced(self, leaves: list[Any]) -> Any:
        """The tree with other leaves."""
        return self.treedef.unflatten(leaves)


class StateLeaves(NamedTuple):
    """The trees of a state, flat: for each slot its codes, and its scales or None."""

    codes: list[Leaves]
    scales: list[Leaves | None]


def path_name(path: Any) -> str:
    """A key path as text, `encoder/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def flatten_state(state: State, slots: tuple[Slot, ...], fresh: State) -> StateLeaves:
    """The trees of a state.

    Args:
      state: the state.
      slots: those of the rule.
      fresh: a state of this optimizer for no parameters at all.

    Raises:
      ValueError: if another optimizer or another format made the state.
    """
    for field in ("moments", "scales", "extra"):
        _check_keys(field, getattr(state, field), getattr(fresh, field))
    _check_keys('extra["format"]', state.extra["format"], fresh.extra["format"])
    codes = [Leaves.of(state.moments[s.name]) for s in slots]
    scales = [state.scales.get(scale_name(s.name)) for s in slots]
    return StateLeaves(codes, [None if s is None else Leaves.of(s) for s in scales])


class Kind(NamedTuple):
    """What the values of a prefix may be, for `spread`."""

    fits: Callable[[Any], bool]
    description: str


BOOLS = Kind(lambda x: isinstance(x, bool | np.bool_), "bools")
AXES = Kind(
    lambda x: x is None or isinstance(x, int | np.integer) or _is_axes(x),
    "ints, tuples of ints, or None",
)


def _is_axes(x: Any) -> bool:
    return type(x) is tuple and all(isinstance(k, int | np.integer) for k in x)


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
        if not kind.fits(value):
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


def check_gradients(grads: Leaves, params: Leaves | None, moments: Leaves) -> None:
    """Raise ValueError where gradients, parameters and state do not fit together."""
    _check_paths("gradients", grads, moments)
    if params is not None:
        _check_paths("params", params, moments)
    for i, path in enumerate(grads.paths):
        g, expected = grads.leaves[i], jnp.shape(moments.leaves[i])
        _check(jnp.shape(g) == expected, path, "gradient", jnp.shape(g), expected)
        if params is None:
            continue
        p = params.leaves[i]
        _check(jnp.shape(p) == expected, path, "parameter", jnp.shape(p), expected)
        kinds = [
            next((k for k in _KINDS if jnp.issubdtype(jnp.result_type(x), k)), None)
            for x in (g, p)
        ]
        _check(
            kinds[0] == kinds[1] or kinds[1] is None,
            path,
            "gradient type",
            jnp.result_type(g),
            f"a type like the parameter's, {jnp.result_type(p)}",
        )


_KINDS = (jnp.floating, jnp.complexfloating)


def check_leaf(plan: LeafPlan, codes: tuple[Any, ...], scales: tuple[Any, ...]) -> None:
    """Raise ValueError unless the state of a leaf is stored as planned."""
    for k, (code, scale) in enumerate(zip(codes, scales, strict=True)):
        got, expected = jnp.result_type(code), plan.moment_dtype(k)
        _check(got == expected, plan.path, "state of type", got, expected)
        if scale is not None:
            shape = plan.blocks.scale_shape
            got = jnp.shape(scale)
            _check(got == shape, plan.path, "scales of shape", got, shape)


def _check(fits: bool, path: str, what: str, got: Any, expected: Any) -> None:
    if not fits:
        raise ValueError(
            f"{path!r}: {what} {got}, but this optimizer expected {expected}. "
            "The state belongs to other parameters or another configuration."
        )


def _check_keys(field: str, got: Any, expected: Any) -> None:
    if set(got) != set(expected):
        raise ValueError(
            f"state.{field} has {sorted(got)}, but this optimizer expected "
            f"{sorted(expected)}: it was made by another optimizer or with other "
            "options. Use the same options, or a fresh tx.init(params)."
        )


def _check_paths(what: str, got: Leaves, expected: Leaves) -> None:
    for mine, other in zip_longest(got.paths, expected.paths):
        if mine != other:
            raise ValueError(
                f"the tree of {what} does not fit the state: first difference at "
                f"{mine!r}, where the state has {other!r} (None: nothing). "
                "Call tx.init with parameters of the same tree."
            )
