"""The contract between an algorithm and everything that runs it.

An optimizer is a `Rule`: the moments it keeps and one pure function on float32
arrays. Formats decide how moments are stored, backends where the function runs;
neither knows which algorithm it serves, and a `Rule` knows neither of them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import jax

Tiles: TypeAlias = tuple[jax.Array, ...]
Shape: TypeAlias = tuple[int, ...]
Direction: TypeAlias = Callable[[jax.Array, Tiles, Any], tuple[jax.Array, Tiles]]
Joins: TypeAlias = Literal["gradient", "direction", "update"]
InOptax: TypeAlias = Literal["same", "negated", "root"]


_FIELDS = ("count", "remainder", "extra")  # of a state, beside slots and scales


class Slot(NamedTuple):
    """One moment that a rule keeps for every parameter.

    Args:
      name: field of the moment in the state, as in optax (`mu`, `nu`).
      signed: whether values may be negative. Unsigned slots hold second moments,
        which are divided by: their formats never store a non-zero value as zero.
      initial: the value that every moment starts with; None: it is traced, and so
        known to `init` alone.
      shape: of the moment, from that of its parameter: of the same rank, such as
        `lambda shape: (shape[0], 1)` for one value in each row. Such a slot is never
        quantized. Default None: the parameter's own.
      in_optax: what optax keeps: the same, the moment with the other sign, or its root.
      relative_to: an unsigned slot of the same rule, a mean of squares whose root is
        of this moment's size. Quantized formats may store the moment divided by it.
      slow: whether its decay is so near 1, .999 and up, that 8 bits lose it in their
        own noise: see `SLOW` of the formats.
      nearest: whether unbiased formats round it to the nearest, too: a running maximum
        of noisy codes would grow.
      orthogonal: whether steps are the singular vectors of matrices of it, so that
        errors count in all directions alike: see `ORTHOGONAL` of the formats.
    """

    name: str
    signed: bool
    initial: float | None = 0.0
    shape: Callable[[Shape], Shape] | None = None
    in_optax: InOptax = "same"
    relative_to: str | None = None
    slow: bool = False
    nearest: bool = False
    orthogonal: bool = False


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

    Step t on a parameter p with gradient g is::

        g = g + decay p                            if the decay joins the gradient
        g = ratio(|p|, |g|) g                      if it scales the gradient
        u, slots = direction(g, slots, scalars(t, learning_rate, h))
        u = u + decay p                            if it joins the direction
        u = ratio(|p|, |u|) u                      if it scales the direction
        u = u + decay p                            if it joins the update
        p = p - learning_rate u                    (p - u where `rate_first`)

    A rule holds functions of a module and constants, and no number that may change: it
    is hashable, and what is compiled for it is compiled once. Hyperparameters `h` are
    the optimizer's.

    Args:
      slots: the moments, in the order in which `direction` takes and returns them.
      scalars: step number t (float32, from 1), learning rate and hyperparameters to a
        tuple of float32 scalars, maybe nested. They are computed once per step,
        outside any kernel, and reach it as operands, so that a changed hyperparameter
        never recompiles.
      direction: `(g, slots, scalars) -> (u, slots)` on arrays of any one shape;
        elementwise.
      decay: where weight decay, a multiple of p, joins: the `"gradient"`, before the
        moments, as L2 regularization does (LARS, SGD); the `"direction"`, measured and
        scaled by the ratio (LAMB); the `"update"`, decoupled from both (AdamW). None:
        there is none.
      ratio: `(norms, decay, h)` to a factor for each layer (the decay is 0 where a leaf
        has none); None: 1.
      scales: what the ratio multiplies, and whose norm is `Norms.x`: the
        `"gradient"`, with its decay, on its way into the moments (LARS), or the
        `"direction"` (LAMB).
      rate_first: whether `direction` has already multiplied by the learning rate.

    Raises:
      ValueError: for names of slots that a state cannot have.
    """

    slots: tuple[Slot, ...]
    scalars: Callable[[jax.Array, jax.Array, Any], tuple[Any, ...]]
    direction: Direction
    decay: Joins | None = None
    ratio: Callable[[Norms, jax.Array, Any], jax.Array] | None = None
    scales: Literal["gradient", "direction"] = "direction"
    rate_first: bool = False

    def __post_init__(self) -> None:
        names = [slot.name for slot in self.slots]
        for name in names:
            taken = name in _FIELDS or name.endswith("_scale")
            if taken or not name.isidentifier() or names.count(name) > 1:
                raise ValueError(
                    f"a slot cannot be called {name!r}: give each a Python name of its "
                    f"own, other than {', '.join(map(repr, _FIELDS))}, that does not "
                    "end in '_scale'"
                )
        squares = [slot.name for slot in self.slots if not slot.signed]
        for slot in self.slots:
            fits = slot.relative_to in squares and slot.signed and slot.initial == 0.0
            if slot.relative_to is not None and not fits:
                raise ValueError(
                    f"slot {slot.name!r} cannot be relative to {slot.relative_to!r}: "
                    "a signed slot that starts at 0 may be relative to an unsigned one "
                    "of its rule"
                )

    @property
    def scaled(self) -> Literal["gradient", "direction"] | None:
        """What is multiplied by a ratio; None if nothing is."""
        return None if self.ratio is None else self.scales
