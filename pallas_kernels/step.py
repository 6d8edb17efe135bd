"""The one place where an algorithm meets a storage format.

A step of a tile is `advance` (decode and apply the rule), the largest of each block,
`settle` (the new scales) and `write` (the parameter and the codes). Only the largest is
not elementwise: whoever holds a block in several registers or rows calls the three on
each of them, and finds the largest in between.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from . import rounding
from .program import Leaf, Noise, Program, Scalars, wide
from .rule import Rule


class Advanced(NamedTuple):
    """A tile after the rule, before it is stored.

    Args:
      u: the step, before the learning rate.
      moments: the new ones, one array for each slot.
      magnitudes: of which `settle` takes the largest of each block.
      finite: for each value, whether what no scale says of is finite; None: nothing.
    """

    u: jax.Array
    moments: tuple[jax.Array, ...]
    magnitudes: tuple[jax.Array, ...]
    finite: jax.Array | None


class Settled(NamedTuple):
    """What is known of each block: its new scales, and whether it takes the step."""

    scales: tuple[Any, ...]
    keep: jax.Array


def tile_step(
    program: Program,
    leaf: Leaf,
    scalars: Scalars,
    *,
    largest: Callable[[jax.Array], jax.Array],
    noise: Noise,
    position: Callable[[], jax.Array],
    valid: jax.Array | None = None,
) -> Leaf:
    """Decode, apply the rule, write the parameter, encode: one tile, in float32.

    A block whose new moments would not be finite keeps its codes, scales and
    parameters: one NaN or infinity must not spread, through the shared scale, to its
    neighbours and for ever.

    Args:
      program: what to compute.
      leaf: arrays of one shape, scales of one that broadcasts to it.
      scalars: arrays of the type that is computed in.
      largest: the largest of each block, of a shape that broadcasts.
      noise: what random numbers start from.
      position: global position of each value; called if a format needs them.
      valid: False on padding, which may hold anything; None if there is none.
    """
    tile = wide(leaf, scalars)
    new = advance(program, tile, scalars, valid)
    blocks = settle(program, [largest(x) for x in new.magnitudes], new.finite, scalars)
    return write(program, leaf, tile, new, blocks, scalars, noise, position)


def advance(
    program: Program, tile: Leaf, scalars: Scalars, valid: jax.Array | None = None
) -> Advanced:
    """The step and the new moments of a wide tile."""
    rule = program.rule
    g = gradient(rule, tile, scalars)
    if rule.scaled == "gradient":
        g = scalars.ratio * g
    u, moments = direction(program, g, tile, scalars)
    if rule.scaled == "direction":
        u = scalars.ratio * u
    if rule.decay == "update":
        u = u + scalars.decay * tile.p
    if valid is not None:
        moments = tuple(jnp.where(valid, x, 0.0) for x in moments)
    formats = program.storage.formats
    pairs = list(zip(formats, moments, strict=True))
    magnitudes = [f.magnitude(x) for f, x in pairs if f.quantized]
    finite = None
    if any(not f.quantized for f in formats) or not formats:
        # The gradient and its square, which second moments take: asking the moments
        # would tie the loops of XLA's CPU together.
        finite = g * g < jnp.inf
        if program.storage.quantized:  # blocks are kept whole
            magnitudes.append(jnp.where(finite, 0.0, jnp.inf))
            finite = None
    return Advanced(u, moments, tuple(magnitudes), finite)


def settle(
    program: Program,
    largest: Iterable[jax.Array],
    finite: jax.Array | None,
    scalars: Scalars,
) -> Settled:
    """The new scale of each block, and whether it takes the step."""
    found = list(largest)
    scales = []
    keep = finite
    for form in program.storage.formats:
        scales.append(form.scale(found.pop(0)) if form.quantized else None)
    for x in (*(s for s in scales if s is not None), *found):
        keep = x < jnp.inf if keep is None else keep & (x < jnp.inf)
    assert keep is not None
    if not program.storage.elementwise:
        keep = jnp.all(keep)
    if scalars.take is not None:
        keep = keep & (scalars.take > 0.0)
    return Settled(tuple(scales), keep)


def write(
    program: Program,
    leaf: Leaf,
    tile: Leaf,
    new: Advanced,
    blocks: Settled,
    scalars: Scalars,
    noise: Noise,
    position: Callable[[], jax.Array],
) -> Leaf:
    """The new parameter or the update, codes and scales, in the types of the leaf."""
    formats = program.storage.formats

    def random(slot: int) -> jax.Array | float:
        if not formats[slot].unbiased:
            return 0.5
        key = rounding.leaf_key(noise.step, noise.leaf)
        return rounding.uniform(key, slot, position())

    codes = [
        f.encode(x, s, random(k))
        for k, (f, x, s) in enumerate(
            zip(formats, new.moments, blocks.scales, strict=True)
        )
    ]
    # Adding -0.0 leaves every number as it is, +0.0 included.
    delta = jnp.where(blocks.keep, -scalars.learning_rate * new.u, -0.0)
    if program.in_place:
        g, p = None, (tile.p + delta).astype(leaf.p.dtype)
    else:
        g, p = delta.astype(leaf.g.dtype), None
    return Leaf(
        g,
        p,
        _replaced(blocks.keep, codes, tile.codes, leaf.codes),
        _replaced(blocks.keep, blocks.scales, tile.scales, leaf.scales),
    )


def _replaced(
    keep: jax.Array, new: Iterable[Any], old: Iterable[Any], stored: Iterable[Any]
) -> tuple[Any, ...]:
    """New values where a block is stepped, old ones elsewhere; as they are stored."""
    return tuple(
        None if n is None or o is None else jnp.where(keep, n, o).astype(x.dtype)
        for n, o, x in zip(new, old, stored, strict=True)
    )


def gradient(rule: Rule, tile: Leaf, scalars: Scalars) -> jax.Array:
    """The gradient that the ratio, or else the moments, take."""
    g = clipped(tile.g, scalars)
    return g + scalars.decay * tile.p if rule.decay == "gradient" else g


def clipped(g: jax.Array, scalars: Scalars) -> jax.Array:
    """The gradient, as limited by the options."""
    if scalars.clip is not None:
        g = scalars.clip * g
    if scalars.clip_value is not None:
        g = jnp.clip(g, -scalars.clip_value, scalars.clip_value)
    return g


def direction(
    program: Program, g: jax.Array, tile: Leaf, scalars: Scalars
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """The direction that the ratio takes, and the new moments."""
    stored = zip(program.storage.formats, tile.codes, tile.scales, strict=True)
    moments = tuple(f.decode(c, s) for f, c, s in stored)
    u, moments = program.rule.direction(g, moments, scalars.rule)
    if program.rule.decay == "direction":
        u = u + scalars.decay * tile.p
    return u, moments
