"""AXLearn: a transformation that says how its state is partitioned."""

from dataclasses import replace
from importlib import import_module
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ..sharding.states import state_sharding
from ..stepping.optimizer import Optimizer
from ..stepping.transformation import Transformation
from ..storage.muon import is_masked
from ..storage.tree import NUMBERS, Leaves, per_leaf


def partitioned(tx: Transformation) -> Any:
    """An optimizer of Octavo as AXLearn's `PartitionedGradientTransformation`.

    Codes are partitioned like the parameter, and so are scales, as far as their number
    divides; `min_shards=` of the optimizer lets all divide. AXLearn's trainer asks for
    that before it makes a state. From then on the optimizer knows how parameters are
    sharded, and steps them with kernels. The decay of each parameter is multiplied by
    its `weight_decay_scale`, if it has one.

    Args:
      tx: the optimizer. Put AXLearn's own transformations beside it, in its `chain`.

    Returns:
      A `PartitionedGradientTransformation(init, update, partition)`.

    Raises:
      TypeError: if it is another transformation.
    """
    if not isinstance(tx, Transformation):
        raise TypeError(
            f"partitioned({type(tx).__name__}): give an optimizer of Octavo, and chain "
            "it with others by axlearn.common.optimizers.chain"
        )
    known = _Known(tx)
    made = _axlearn().PartitionedGradientTransformation
    return made(init=known.init, update=known.update, partition=known.partition)


def _axlearn() -> Any:
    """Only who calls this file's function needs it."""
    return import_module("axlearn.common.optimizer_base")


class _Known:
    """The optimizer, and what is known of the parameters' shardings."""

    def __init__(self, tx: Transformation) -> None:
        self.tx = tx

    def init(self, params: Any) -> Any:
        return self.tx.init(_values(params))

    def update(self, updates: Any, state: Any, params: Any) -> tuple[Any, Any]:
        return _decayed(self.tx, params).update(updates, state, _values(params))

    def partition(self, specs: Any) -> Any:
        shapes = jax.tree.map(
            lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype or jnp.float32), specs
        )
        shardings = jax.tree.map(lambda p: p.sharding, specs)
        self.tx = self.tx.bind(shardings)
        state = jax.eval_shape(self.tx.init, shapes)
        kinds = optax.tree_map_params(
            self.tx,
            lambda x, p: x if is_masked(x) else _Kind(p.memory_kind),
            state,
            specs,
            transform_non_params=lambda _: _Kind(None),
            is_leaf=is_masked,
        )
        return jax.tree.map(
            lambda x, where, kind: _axlearn().OptStateSpec(
                shape=x.shape,
                dtype=x.dtype,
                mesh_axes=where.spec,
                memory_kind=kind.name,
            ),
            state,
            state_sharding(self.tx, shapes, shardings),
            kinds,
        )


class _Kind:
    """A memory kind as a leaf, also where it is None."""

    def __init__(self, name: str | None) -> None:
        self.name = name


def _values(params: Any) -> Any:
    """The arrays in AXLearn's `OptParam`s."""
    return jax.tree.map(lambda p: p.value, params)


def _decayed(tx: Transformation, params: Any) -> Transformation:
    """The optimizer whose decay of each parameter is scaled as its `OptParam` says."""
    tree = Leaves.of(params)
    scales = [p.weight_decay_scale for p in tree.leaves]
    if all(s is None or s == 1 for s in scales):
        return tx
    values = Leaves.of(_values(params))

    def scaled(own: Optimizer) -> Optimizer:
        if own.weight_decay is None:
            return own
        decays = per_leaf("weight_decay", own.weight_decay, values, NUMBERS)
        by_path = {
            path: d if scale is None else d * scale
            for path, d, scale in zip(tree.paths, decays, scales, strict=True)
        }
        return replace(own, weight_decay=by_path.__getitem__)

    return Transformation(tx.optimizer.each(scaled))
