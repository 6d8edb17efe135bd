"""The one place where an algorithm meets a storage format.

A step of a tile is `advance` (decode and apply the rule), the largest of each block,
`settle` (the new scales) and `write` (the parameter and the codes). Only the largest is
not elementwise: whoever holds a block in several registers or rows calls the three on
each of them, and finds the largest in between.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from . import rounding, weights
from .arithmetic import not_below
from .formats import Format
from .program import Leaf, Program, Scalars, wide
from .rule import Rule

# Noise for each value of a tile.
Random: TypeAlias = Callable[[rounding.Draw], jax.Array]


class Advanced(NamedTuple):
    """A tile after the rule, before it is stored.

    Args:
      u: the step, before the learning rate.
      stored: what each slot's format encodes.
      magnitudes: of which `settle` takes the largest of each block.
      finite: for each value, whether what no scale says of is finite; None: nothing.
    """

    u: jax.Array
    stored: tuple[jax.Array, ...]
    magnitudes: tuple[jax.Array, ...]
    finite: jax.Array | None


class Settled(NamedTuple):
    """What is known of each block: arrays of one shape, one number for each.

    Args:
      scales: the new ones.
      encoding: what each slot's format needs of a block.
      keep: whether it takes the step.
    """

    scales: tuple[Any, ...]
    encoding: tuple[Any, ...]
    keep: jax.Array


def tile_step(
    program: Program,
    leaf: Leaf,
    scalars: Scalars,
    *,
    largest: Callable[[jax.Array], jax.Array],
    random: Random,
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
      random: noise for a slot; called if its format needs some.
      valid: False on padding, which may hold anything; None if there is none.
    """
    tile = wide(program, leaf, scalars)
    new = advance(program, tile, scalars, valid)
    found = [largest(x) for x in new.magnitudes]
    blocks = settle(program, found, new.finite, scalars)
    return write(program, leaf, tile, new, blocks, scalars, random)


def advance(
    program: Program,
    tile: Leaf,
    scalars: Scalars,
    valid: jax.Array | None = None,
    decoding: Sequence[Any] | None = None,
) -> Advanced:
    """The step and the new moments of a wide tile.

    With `decoding`, for each slot, where the caller has made it of the scales.
    """
    rule = program.rule
    g = gradient(rule, tile, scalars)
    if rule.scaled == "gradient":
        g = scalars.ratio * g
    u, stored = direction(program, g, tile, scalars, decoding)
    if rule.scaled == "direction":
        u = scalars.ratio * u
    if rule.decay == "update":
        u = u + scalars.decay * tile.p
    if valid is not None:
        stored = tuple(jnp.where(valid, x, 0.0) for x in stored)
    formats = program.storage.formats
    pairs = list(zip(formats, stored, strict=True))
    magnitudes = [f.magnitude(x) for f, x in pairs if f.quantized]
    finite = None
    if any(not f.quantized for f in formats) or not formats:
        # The gradient and its square, which second moments take: asking the moments
        # would tie the loops of XLA's CPU together.
        finite = g * g < jnp.inf
        if program.storage.quantized:  # blocks are kept whole
            magnitudes.append(jnp.where(finite, 0.0, jnp.inf))
            finite = None
    return Advanced(u, stored, tuple(magnitudes), finite)


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
    limits = [s for s in scales if s is not None] + found
    if limits:
        inside = functools.reduce(jnp.maximum, limits) < jnp.inf
        keep = inside if keep is None else keep & inside
    assert keep is not None
    if not program.storage.elementwise:
        keep = jnp.all(keep)
    if scalars.take is not None:
        keep = keep & (scalars.take > 0.0)
    pairs = zip(program.storage.formats, scales, strict=True)
    encoding = tuple(() if s is None else form.encoding(s) for form, s in pairs)
    return Settled(tuple(scales), encoding, keep)


def write(
    program: Program,
    leaf: Leaf,
    tile: Leaf,
    new: Advanced,
    blocks: Settled,
    scalars: Scalars,
    random: Random,
    *,
    all_kept: bool = False,
) -> Leaf:
    """The new parameter or the update, codes and scales, in the types of the leaf.

    Args:
      program: what to compute.
      leaf: as stored. Without scales, it is left to `new_scales` to write them.
      tile: the same, wide.
      new: what `advance` made of it.
      blocks: what `settle` made of that.
      scalars: operands of the step.
      random: noise for a slot.
      all_kept: whether the caller knows that every block takes the step.
    """
    keep = None if all_kept else blocks.keep
    g, p, remainder = moved(program, leaf, tile, new, scalars, random, keep)
    codes = new_codes(program, leaf, tile, new, blocks, random, keep)
    scales = new_scales(blocks, tile.scales, leaf.scales, keep)
    return Leaf(g, p, codes, scales, remainder)


def moved(
    program: Program,
    leaf: Leaf,
    tile: Leaf,
    new: Advanced,
    scalars: Scalars,
    random: Random,
    keep: jax.Array | None,
) -> tuple[Any, Any, Any]:
    """The update and None, or None and the new parameter; and its remainder."""
    delta = -scalars.learning_rate * new.u
    if keep is not None:
        # Adding -0.0 leaves every number as it is, +0.0 included.
        delta = jnp.where(keep, delta, -0.0)
    storage = program.storage
    if not storage.rounds:
        if program.in_place:
            return None, (tile.p + delta).astype(leaf.p.dtype), None
        return delta.astype(leaf.g.dtype), None, None
    assert storage.weights is not None
    width = weights.noise_bits(storage.weights)
    old = weights.Stored(leaf.p.astype(jnp.float32), tile.remainder)
    p, remainder = weights.moved(
        tile.p + delta,
        tile.p,
        old,
        storage.dtype,
        storage.weights,
        random(rounding.Draw(None, width)) if width else 0,
    )
    if remainder is not None:
        remainder = remainder.astype(leaf.remainder.dtype)
    if program.in_place:
        return None, p.astype(leaf.p.dtype), remainder
    return (p - old.p).astype(leaf.g.dtype), None, remainder


def new_codes(
    program: Program,
    leaf: Leaf,
    tile: Leaf,
    new: Advanced,
    blocks: Settled,
    random: Random,
    keep: jax.Array | None,
) -> tuple[Any, ...]:
    """The codes of each slot, or its moments where it is not quantized."""
    rows = zip(program.storage.formats, new.stored, blocks.encoding, strict=True)
    slots = program.rule.slots

    def noise(k: int, form: Format) -> jax.Array | int:
        chosen = form.unbiased and not slots[k].nearest
        return random(rounding.Draw(k)) if chosen else rounding.NEAREST

    codes = [
        form.encoded(x, block, noise(k, form))
        for k, (form, x, block) in enumerate(rows)
    ]
    return _replaced(keep, codes, tile.codes, leaf.codes)


def new_scales(
    blocks: Settled, old: Sequence[Any], like: Sequence[Any], keep: jax.Array | None
) -> tuple[Any, ...]:
    """The scales of each slot."""
    return _replaced(keep, blocks.scales, old, like)


def _replaced(
    keep: jax.Array | None, new: Iterable[Any], old: Iterable[Any], like: Iterable[Any]
) -> tuple[Any, ...]:
    """New values where a block is stepped, old ones elsewhere; as they are stored."""

    def chosen(n: Any, o: Any) -> Any:
        return n if keep is None else jnp.where(keep, n, o)

    return tuple(
        None if n is None or o is None else chosen(n, o).astype(x.dtype)
        for n, o, x in zip(new, old, like, strict=True)
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


def decoding_of(program: Program, scales: Iterable[Any]) -> list[Any]:
    """What each slot's format needs of a block to decode it."""
    pairs = zip(program.storage.formats, scales, strict=True)
    return [() if s is None else form.decoding(s) for form, s in pairs]


def direction(
    program: Program,
    g: jax.Array,
    tile: Leaf,
    scalars: Scalars,
    decoding: Sequence[Any] | None = None,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """The direction that the ratio takes, and what its moments are stored as."""
    storage = program.storage
    if decoding is None:
        decoding = decoding_of(program, tile.scales)
    rows = zip(storage.formats, tile.codes, decoding, strict=True)
    moments = storage.absolute([f.decoded(c, d) for f, c, d in rows])
    with not_below(_lowest(program, decoding)):
        u, moments = program.rule.direction(g, moments, scalars.rule)
        stored = storage.relative(moments)
    if program.rule.decay == "direction":
        u = u + scalars.decay * tile.p
    return u, stored


def _lowest(program: Program, decoding: Sequence[Any]) -> jax.Array | None:
    """The least that is stored of what moments are relative to.

    It is raised to that anyway. The root has to be of the same number, or else a moment
    over a smaller root would come back longer than it was, in every step.
    """
    formats = program.storage.formats
    slots = program.storage.slots
    others = {slot.reference for slot in slots if slot.reference is not None}
    limits = (formats[k].lowest(decoding[k]) for k in others)
    found = [x for x in limits if x is not None]
    return functools.reduce(jnp.minimum, found) if found else None
