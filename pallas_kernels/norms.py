"""Sums of squares over the layers of a leaf: what ratios, clipping and guards need."""

from collections.abc import Sequence
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp

from .step import Leaf, Program, Scalars, Wide, clipped, direction, gradient

# p: the parameter's squares. g: the clipped gradient's. x: those of what the ratio
# scales. bad: the number of values of the gradient that are NaN or infinite.
Sum: TypeAlias = Literal["p", "g", "x", "bad"]


def read(program: Program, leaf: Leaf, sums: Sequence[Sum]) -> Leaf:
    """The leaf with only the arrays that these sums depend on."""
    rule = program.rule
    stored = "x" in sums and rule.scales == "direction"
    joins = None if rule.decay is None or "x" not in sums else rule.decay.joins
    with_decay = joins == "gradient" or (joins == "direction" and stored)
    needs_p = "p" in sums or with_decay or (stored and rule.needs_params)
    return Leaf(
        leaf.g,
        leaf.p if needs_p else None,
        leaf.codes if stored else (),
        leaf.scales if stored else (),
    )


def tile_terms(
    program: Program,
    leaf: Leaf,
    scalars: Scalars,
    sums: Sequence[Sum],
    valid: jax.Array | None = None,
) -> list[jax.Array]:
    """What each of the sums adds up, for one tile, in float32.

    A value that is NaN or infinite counts as zero: a ratio must not carry it to the
    rest of its layer.

    Args:
      program: the algorithm and its formats.
      leaf: what `read` left of a leaf, or one tile of it.
      scalars: operands of the step; the ratio is not used.
      sums: which.
      valid: False on padding, which may hold anything; None if there is none.
    """
    tile = Wide.of(leaf, scalars)

    def squares(x: jax.Array) -> jax.Array:
        kept = jnp.abs(x) < jnp.inf
        return jnp.where(kept if valid is None else kept & valid, x * x, 0.0)

    terms = []
    for name in sums:
        if name == "bad":
            bad = ~(jnp.abs(tile.g) < jnp.inf)
            bad = bad if valid is None else bad & valid
            terms.append(jnp.where(bad, 1.0, 0.0).astype(tile.g.dtype))
        elif name == "p":
            terms.append(squares(tile.p))
        elif name == "g":
            terms.append(squares(clipped(tile.g, scalars)))
        else:
            x = gradient(program.rule, tile, scalars)
            if program.rule.scales == "direction":
                x, _ = direction(program, x, tile, scalars)
            terms.append(squares(x))
    return terms
