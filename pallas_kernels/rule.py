"""The contract between an algorithm and everything that runs it.

An optimizer is a `Rule`: the moments it keeps and one pure function on float32
arrays. Formats decide how moments are stored, backends where the function runs;
neither knows which algorithm it serves, and a `Rule` knows neither of them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import jax

Tiles: TypeAlias = tuple[jax.Array, ...]
Direction: TypeAlias = Callable[
    [jax.Array, jax.Array | None, Tiles, Any], tuple[jax.Array, Tiles]
]


class Slot(NamedTuple):
    """One moment that a rule keeps for every parameter.

    Args:
      name: key of the moment in the state, as in optax (`mu`, `nu`).
      signed: whether values may be negative. Unsigned slots hold second moments,
        which are divided by: their formats never store a non-zero value as zero.
    """

    name: str
    signed: bool


@dataclass(frozen=True)
class Decay:
    """Weight decay: `value` times p is added, and where it joins makes its kind.

    Args:
      value: the factor of p.
      joins: `"gradient"`: before the moments, as L2 regularization does (LARS, SGD);
        `"direction"`: after the moments, measured and scaled by the ratio (LAMB);
        `"update"`: after the ratio, decoupled from both (AdamW).
    """

    value: Any
    joins: Literal["gradient", "direction", "update"]


class Norms(NamedTuple):
    """Euclidean norms of one layer: float32 arrays of one shape.

    Args:
      p: of the parameter.
      g: of the gradient, clipped, before weight decay joins it; only for ratios that
        scale the gradient.
      x: of what the ratio scales: the gradient with its decay, or the direction.
    """

    p: jax.Array
    g: jax.Array | None
    x: jax.Array


@dataclass(frozen=True)
class Rule:
    """An optimization algorithm, element by element, in float32.

    Step t on a parameter p with gradient g is

        g = g + decay p                            if the decay joins the gradient
        g = ratio(|p|, |g|) g                      if it scales the gradient
        u, slots = direction(g, p, slots, scalars(t, learning_rate))
        u = u + decay p                            if it joins the direction
        u = ratio(|p|, |u|) u                      if it scales the direction
        u = u + decay p                            if it joins the update
        p = p - learning_rate u                    (p - u where `rate_first`)

    Args:
      slots: the moments, in the order in which `direction` takes and returns them.
      scalars: step number t (float32, from 1) and learning rate to a tuple of float32
        scalars. They are computed once per step, outside any kernel, and reach it as
        operands, so that a changed hyperparameter never recompiles.
      direction: `(g, p, slots, scalars) -> (u, slots)` on arrays of any one shape;
        elementwise. `p` may be None where `needs_params` is False.
      needs_params: whether `direction` reads p.
      decay: weight decay, or None.
      ratio: a factor for each layer from its norms and its weight decay (0 where it has
        none); None: 1.
      scales: what the ratio multiplies, and whose norm is `Norms.x`: the
        `"gradient"`, with its decay, on its way into the moments (LARS), or the
        `"direction"` (LAMB).
      rate_first: whether `direction` has already multiplied by the learning rate.
    """

    slots: Sequence[Slot]
    scalars: Callable[[jax.Array, jax.Array], tuple[jax.Array, ...]]
    direction: Direction
    needs_params: bool = False
    decay: Decay | None = None
    ratio: Callable[[Norms, jax.Array], jax.Array] | None = None
    scales: Literal["gradient", "direction"] = "direction"
    rate_first: bool = False
