"""Levanter: states of haliax' NamedArrays, with axes of the sizes of their arrays."""

from dataclasses import replace
from importlib import import_module
from typing import Any

import jax
import optax

from ..stepping.transformation import Transformation
from ..storage.muon import is_masked


def named(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """An optimizer of Octavo for models of NamedArrays.

    Scales are shorter than their parameter along one axis. Their NamedArray says so: it
    has the parameter's axes, and of that axis the size that the array has. So Levanter
    restores it, and shards it by the names of its axes, as it does with parameters.
    Give the optimizer `min_shards=` that lets all sizes divide.

    While a step is traced, haliax' axis mapping says how parameters are sharded. An
    optimizer of Octavo then steps them with kernels.

    Args:
      tx: the optimizer, or `optax.chain` of it and others.

    Returns:
      An optax transformation of trees with NamedArrays.
    """

    def init(params: Any) -> Any:
        plain = _plain(params)
        return _named(tx, _bound(tx, params).init(plain), params)

    def update(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, Any]:
        like = updates if params is None else params
        inner = optax.with_extra_args_support(_bound(tx, like))
        plain, new = inner.update(
            _plain(updates), _plain(state), _plain(params), **extra_args
        )
        out = jax.tree.unflatten(jax.tree.structure(updates), jax.tree.leaves(plain))
        return out, jax.tree.unflatten(jax.tree.structure(state), jax.tree.leaves(new))

    return optax.GradientTransformationExtraArgs(init, update)


def _haliax() -> Any:
    """Only who calls this file's function needs it."""
    return import_module("haliax")


def _is_named(x: Any) -> bool:
    return isinstance(x, _haliax().NamedArray)


def _plain(tree: Any) -> Any:
    """The arrays without their names."""
    return jax.tree.map(
        lambda x: x.array if _is_named(x) else x, tree, is_leaf=_is_named
    )


def _named(tx: optax.GradientTransformation, state: Any, params: Any) -> Any:
    """The state with names: those of the parameters."""

    def of(x: Any, p: Any) -> Any:
        if not _is_named(p) or len(p.axes) != x.ndim:
            return x
        sizes = zip(p.axes, x.shape, strict=True)
        axes = tuple(replace(axis, size=n) for axis, n in sizes)
        return _haliax().NamedArray(x, axes)

    boxes = jax.tree.map(_Box, params, is_leaf=_is_named)
    return optax.tree_map_params(
        tx,
        lambda x, box: x if is_masked(x) else of(x, box.inside),
        state,
        boxes,
        is_leaf=is_masked,
    )


class _Box:
    """A NamedArray as a leaf."""

    def __init__(self, inside: Any) -> None:
        self.inside = inside


def _bound(
    tx: optax.GradientTransformation, params: Any
) -> optax.GradientTransformation:
    """The optimizer for parameters that are sharded as haliax' axis mapping says."""
    partitioning = _haliax().partitioning
    mapping = partitioning.current_thread_local_mapping()
    if not isinstance(tx, Transformation) or mapping is None:
        return tx

    def of(x: Any) -> Any:
        axes = x.axes if _is_named(x) else ()
        return partitioning.sharding_for_axis(axes, mapping)

    return tx.bind(jax.tree.map(of, params, is_leaf=_is_named))
