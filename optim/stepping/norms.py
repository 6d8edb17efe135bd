"""What norms of layers are for: clipping, the limit of a step, and a log of them."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from octavo.pallas_kernels import Norms

from ..checks import is_traced
from ..storage.state import states_in

HISTORY = 100
_ABSENT = -1.0  # no norm is negative


def unlimited(norm: Norms, decay: jax.Array, hyperparameters: Any) -> jax.Array:
    """The ratio of rules that have none, for `limited`."""
    del decay, hyperparameters
    return jnp.ones_like(norm.p)


def limited(ratio: jax.Array, norm: Norms, max_unorm: Any) -> jax.Array:
    """The ratio of a step that is at most max_unorm times as long as the weights.

    bitsandbytes' rule, which never moves a layer whose weights are all 0; here those
    have no limit.
    """
    limit = max_unorm * norm.p
    exceeds = (ratio * norm.x > limit) & (norm.p > 0.0)
    return jnp.where(exceeds, limit / norm.x, ratio)


def clip_global(squares: jax.Array, max_norm: Any) -> jax.Array:
    """The factor of all gradients, from the sum of squares of each."""
    norm = jnp.sqrt(jnp.sum(squares))
    return jnp.where(norm > max_norm, max_norm / norm, 1.0)


def clip_percentile(
    squares: jax.Array, history: jax.Array, count: jax.Array, percentile: int
) -> tuple[jax.Array, jax.Array]:
    """The factor of each leaf's gradient, and the new history.

    The rule of bitsandbytes before 0.50: the first squared norm fills the history;
    later ones replace the oldest; the limit is the one at index `percentile` of the
    sorted history. Norms that are zero or not finite are no first one, though: a limit
    of zero would stop a leaf for the next hundred steps.

    Args:
      squares: sum of squares of each leaf's gradient, shape (leaves,); NaN where it has
        values that are not finite.
      history: of such sums, shape (leaves, 100).
      count: steps taken before.
      percentile: 1 to 99.
    """
    oldest = jnp.arange(HISTORY) == (count + 1) % HISTORY
    empty = jnp.max(history, axis=1) == 0.0
    replaced = (oldest[None, :] | empty[:, None]) & jnp.isfinite(squares)[:, None]
    history = jnp.where(replaced, squares[:, None], history)
    limit = jnp.sqrt(jnp.sort(history, axis=1)[:, percentile])
    norm = jnp.sqrt(squares)
    return jnp.where((norm > limit) & (limit > 0.0), limit / norm, 1.0), history


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
    recorded = [x for x in states_in(state) if "norms" in x.extra]
    if not recorded:
        raise ValueError(
            "no norms in this state: make the optimizer with record_norms=True"
        )
    found = {}
    for x in recorded:
        paths = x.codes(x.slots[0]).paths
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
