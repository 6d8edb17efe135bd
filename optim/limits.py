"""What scales a gradient or a step: clipping by norms, and the limit of a step."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from octavo.pallas_kernels import Norms, Rule

HISTORY = 100


def limited(rule: Rule, max_unorm: Any) -> Rule:
    """The rule, with steps at most max_unorm times as long as the layer's weights.

    bitsandbytes' LAMB and LARS, which never move a layer whose weights are all 0; here
    those have no limit.
    """

    def ratio(norm: Norms, decay: jax.Array) -> jax.Array:
        limit = max_unorm * norm.p
        r = jnp.ones_like(norm.p) if rule.ratio is None else rule.ratio(norm, decay)
        exceeds = (r * norm.x > limit) & (norm.p > 0.0)
        return jnp.where(exceeds, limit / norm.x, r)

    assert rule.ratio is None or rule.scales == "direction"
    return replace(rule, ratio=ratio, scales="direction")


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
