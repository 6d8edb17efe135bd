"""The norms and ratios of the last step, for logging."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .checks import is_traced
from .state import State
from .tree import Leaves

_ABSENT = -1.0  # no norm is negative


class LayerNorms(NamedTuple):
    """Of one leaf: float32 scalars, or vectors with a value for each layer.

    Attributes:
      parameter: norm of the parameter before the step.
      gradient: norm of the gradient, clipped.
      direction: norm of what the ratio scales: LARS' gradient with its weight decay,
        the step before the learning rate for every other optimizer.
      ratio: what it was scaled by; 1 where nothing scales it.
    """

    parameter: jax.Array
    gradient: jax.Array
    direction: jax.Array
    ratio: jax.Array


def last_norms(state: Any) -> dict[str, LayerNorms]:
    """The norms and ratios of the last step, by the path of the parameter.

    Works inside jax.jit, too; a leaf with fewer layers than another then has NaN after
    its last, as arrays cannot be shortened there. Zeros before the first step.

    Args:
      state: the state of an Octavo optimizer made with `record_norms=True`, or of a
        chain (a TrainState, ...) that contains one.

    Raises:
      ValueError: if nothing was recorded.

    >>> import jax.numpy as jnp
    >>> from octavo import optim
    >>> tx = optim.lamb(0.1, record_norms=True)
    >>> params = {"w": jnp.full((64, 128), 2.0)}
    >>> params, state = tx.step({"w": jnp.ones((64, 128))}, tx.init(params), params)
    >>> print(f"{optim.last_norms(state)['w'].ratio:.4f}")
    2.0000
    """
    nodes = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, State))
    states = [x for x in nodes if isinstance(x, State)]
    recorded = [x for x in states if "norms" in x.extra]
    if not recorded:
        raise ValueError(
            "no norms in this state: make the optimizer with record_norms=True"
        )
    found = {}
    for x in recorded:
        paths = Leaves.of(next(iter(x.moments.values()))).paths
        for i, path in enumerate(paths):
            rows = (_shown(x.extra["norms"][name][i]) for name in LayerNorms._fields)
            found[path] = LayerNorms(*rows)
    return found


def _shown(row: jax.Array) -> jax.Array:
    if row.shape == (1,):
        return row[0]
    if is_traced(row):
        return jnp.where(row == _ABSENT, jnp.nan, row)
    row = row[row != _ABSENT]
    return row[0] if row.shape == (1,) else row


def no_norms(layers: Sequence[int]) -> dict[str, jax.Array]:
    """What is recorded before the first step of leaves with so many layers."""
    none = [LayerNorms(*(jnp.zeros(n),) * len(LayerNorms._fields)) for n in layers]
    return stacked(none)


def stacked(norms: Sequence[LayerNorms]) -> dict[str, jax.Array]:
    """Float32 arrays (leaves, layers) of vectors (layers,).

    Not trees like the parameters: those who shard a state give such leaves the
    parameter's own sharding, which does not fit.
    """
    most = max((x.ratio.size for x in norms), default=1)

    def padded(x: jax.Array) -> jax.Array:
        return jnp.pad(x, (0, most - x.size), constant_values=_ABSENT)

    return {
        name: jnp.stack([padded(getattr(x, name)) for x in norms])
        if norms
        else jnp.zeros((0, most))
        for name in LayerNorms._fields
    }
