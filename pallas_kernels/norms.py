"""Sums of squares over the layers of a leaf: what ratios, clipping and guards need."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .program import Leaf, Program, Scalars, wide
from .step import clipped, direction, gradient


def tile_terms(
    program: Program,
    leaf: Leaf,
    scalars: Scalars,
    valid: jax.Array | None = None,
    decoding: Sequence[Any] | None = None,
) -> list[jax.Array]:
    """What each of the program's sums adds up, for one tile, in float32.

    A value that is NaN or infinite counts as zero: a ratio must not carry it to the
    rest of its layer.

    Args:
      program: the sums, the algorithm and its formats.
      leaf: what `program.read` left of a leaf, or one tile of it.
      scalars: operands of the step; the ratio is not used.
      valid: False on padding, which may hold anything; None if there is none.
      decoding: for each slot, where the caller has made it of the scales.
    """
    tile = wide(program, leaf, scalars)

    def squares(x: jax.Array) -> jax.Array:
        kept = jnp.abs(x) < jnp.inf
        return jnp.where(kept if valid is None else kept & valid, x * x, 0.0)

    terms = []
    for name in program.sums:
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
                x, _ = direction(program, x, tile, scalars, decoding)
            terms.append(squares(x))
    return terms
