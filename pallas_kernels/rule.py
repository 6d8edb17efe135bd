"""The contract between an algorithm and everything that runs it.

An optimizer is a `Rule`: the moments it keeps and one pure function on float32
arrays. Formats decide how moments are stored, backends where the function runs;
neither knows which algorithm it serves, and a `Rule` knows neither of them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import jax

Tiles: TypeAlias = tuple[jax.Array, ...]
Scalars: TypeAlias = tuple[jax.Array, ...]
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
class Rule:
    """An optimization algorithm, element by element, in float32.

    One step on a parameter p with gradient g is

        u, slots = direction(g, p, slots, scalars(t));   p = p - learning_rate * u

    Args:
      slots: the moments, in the order in which `direction` takes and returns them.
      scalars: step number t (float32, from 1) to a tuple of float32 scalars. They
        are computed once per step, outside any kernel, and reach it as operands, so
        that a changed hyperparameter never recompiles.
      direction: `(g, p, slots, scalars) -> (u, slots)` on arrays of any one shape;
        elementwise. `p` is None where `needs_params` is False.
      needs_params: whether `direction` reads p.
    """

    slots: Sequence[Slot]
    scalars: Callable[[jax.Array], Scalars]
    direction: Direction
    needs_params: bool = False
