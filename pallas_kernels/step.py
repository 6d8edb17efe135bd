"""The one place where an algorithm meets a storage format."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from . import rounding
from .formats import Format
from .rule import Rule


@dataclass(frozen=True)
class Program:
    """What is compiled for a leaf: an algorithm, its formats, and what to write.

    Args:
      rule: the algorithm.
      formats: how each of the rule's slots is stored.
      in_place: write the new parameter (True), or the update to add to it (False).
    """

    rule: Rule
    formats: tuple[Format, ...]
    in_place: bool

    @property
    def quantized(self) -> bool:
        """Whether any slot has blocks."""
        return any(f.quantized for f in self.formats)

    @property
    def reads_parameter(self) -> bool:
        """Whether p is an operand of the step."""
        rule = self.rule
        return self.in_place or rule.needs_params or rule.decay is not None


class Leaf(NamedTuple):
    """One leaf's arrays, or one tile of them.

    On the way in, `g` is the gradient; on the way out it is the update (`in_place`
    False), or None and `p` is the new parameter. `scales` is None where a slot's
    format has none.
    """

    g: jax.Array | None
    p: jax.Array | None
    codes: tuple[jax.Array, ...]
    scales: tuple[jax.Array | None, ...]


class Scalars(NamedTuple):
    """Operands of a step that are one number for each leaf, or each of its layers.

    What is None is not computed.

    Args:
      learning_rate: the factor of the update; 1 for rules that are `rate_first`.
      rule: the rule's own scalars.
      decay: the rule's weight decay.
      clip: factor of the gradient.
      clip_value: largest magnitude of a gradient's value, after `clip`.
      take: whether to take the step at all, 1 or 0.
      ratio: the rule's ratio: float32 vector with one value for each layer; in a
        tile, something that broadcasts.
    """

    learning_rate: jax.Array
    rule: tuple[jax.Array, ...]
    decay: Any = None
    clip: jax.Array | None = None
    clip_value: jax.Array | None = None
    take: jax.Array | None = None
    ratio: Any = None


class Wide(NamedTuple):
    """A `Leaf` in the types that are computed in."""

    g: jax.Array
    p: Any
    codes: tuple[jax.Array, ...]
    scales: tuple[jax.Array | None, ...]

    @classmethod
    def of(cls, leaf: Leaf, scalars: Scalars) -> "Wide":
        dtype = scalars.learning_rate.dtype
        assert leaf.g is not None
        return cls(
            leaf.g.astype(dtype),
            None if leaf.p is None else leaf.p.astype(dtype),
            tuple(_widen(c, dtype) for c in leaf.codes),
            tuple(None if s is None else s.astype(jnp.float32) for s in leaf.scales),
        )


def _widen(codes: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Integer codes as int32: no backend computes on int8."""
    wide = jnp.int32 if jnp.issubdtype(codes.dtype, jnp.integer) else dtype
    return codes.astype(wide)


def tile_step(
    program: Program,
    leaf: Leaf,
    scalars: Scalars,
    *,
    axis: int,
    key: jax.Array,
    position: Callable[[], jax.Array],
    valid: jax.Array | None = None,
) -> Leaf:
    """Decode, apply the rule, write the parameter, encode: one tile, in float32.

    A block whose new moments would not be finite keeps its codes, scales and
    parameters: one NaN or infinity must not spread, through the shared scale, to its
    neighbours and for ever.

    Args:
      program: what to compute.
      leaf: arrays of one shape; scales have length 1 on `axis`.
      scalars: arrays of the type that is computed in.
      axis: the axis within a block.
      key: int32, for `rounding.uniform`.
      position: global position of each value; called if a format needs noise.
      valid: False on padding, which may hold anything; None if there is none.
    """
    rule, formats = program.rule, program.formats
    tile = Wide.of(leaf, scalars)
    g = gradient(rule, tile, scalars)
    if rule.ratio is not None and rule.scales == "gradient":
        g = scalars.ratio * g
    u, slots = direction(program, g, tile, scalars)
    if rule.ratio is not None and rule.scales == "direction":
        u = scalars.ratio * u
    if rule.decay is not None and rule.decay.joins == "update":
        u = u + scalars.decay * tile.p
    if valid is not None:
        slots = tuple(jnp.where(valid, x, 0.0) for x in slots)

    def noise(slot: int) -> jax.Array | float:
        if not formats[slot].unbiased:
            return 0.5
        return rounding.uniform(key, slot, position())

    new = [
        f.encode(x, axis, noise(k))
        for k, (f, x) in enumerate(zip(formats, slots, strict=True))
    ]
    keep = _finite(program, g, [s for _, s in new], axis)
    if scalars.take is not None:
        keep = keep & (scalars.take > 0.0)
    # Adding -0.0 leaves every number as it is, +0.0 included.
    delta = jnp.where(keep, -scalars.learning_rate * u, -0.0)
    if program.in_place:
        assert leaf.p is not None and tile.p is not None
        g_out, p_out = None, (tile.p + delta).astype(leaf.p.dtype)
    else:
        assert leaf.g is not None
        g_out, p_out = delta.astype(leaf.g.dtype), None
    return Leaf(
        g_out,
        p_out,
        _replaced(keep, [c for c, _ in new], tile.codes, leaf.codes),
        _replaced(keep, [s for _, s in new], tile.scales, leaf.scales),
    )


def _replaced(
    keep: jax.Array, new: Iterable[Any], old: Iterable[Any], stored: Iterable[Any]
) -> tuple[Any, ...]:
    """New values where a block is stepped, old ones elsewhere; as they are stored."""
    return tuple(
        None if n is None or o is None else jnp.where(keep, n, o).astype(x.dtype)
        for n, o, x in zip(new, old, stored, strict=True)
    )


def gradient(rule: Rule, tile: Wide, scalars: Scalars) -> jax.Array:
    """The gradient that the ratio, or else the moments, take."""
    g = clipped(tile.g, scalars)
    if rule.decay is not None and rule.decay.joins == "gradient":
        g = g + scalars.decay * tile.p
    return g


def clipped(g: jax.Array, scalars: Scalars) -> jax.Array:
    """The gradient, as limited by the options."""
    if scalars.clip is not None:
        g = scalars.clip * g
    if scalars.clip_value is not None:
        g = jnp.clip(g, -scalars.clip_value, scalars.clip_value)
    return g


def direction(
    program: Program, g: jax.Array, tile: Wide, scalars: Scalars
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """The direction that the ratio takes, and the new moments."""
    stored = zip(program.formats, tile.codes, tile.scales, strict=True)
    slots = tuple(f.decode(c, s) for f, c, s in stored)
    u, slots = program.rule.direction(g, tile.p, slots, scalars.rule)
    decay = program.rule.decay
    if decay is not None and decay.joins == "direction":
        u = u + scalars.decay * tile.p
    return u, slots


def _finite(
    program: Program, g: jax.Array, scales: list[jax.Array | None], axis: int
) -> jax.Array:
    """Which blocks (which values, if nothing is quantized) have finite new moments.

    `block_scale` has made the scale infinite where a value of a block is not finite.
    Without a scale it is the gradient that tells, and its square, which second
    moments take: asking the moments would tie the loops of XLA's CPU together.
    """
    finite = None
    for scale in scales:
        if scale is not None:
            ok = scale < jnp.inf
        else:
            ok = g * g < jnp.inf
            if program.quantized:  # blocks are kept whole
                bad = jnp.where(ok, 0.0, 1.0)
                ok = jnp.max(bad, axis=axis, keepdims=True) == 0.0
        finite = ok if finite is None else finite & ok
    assert finite is not None
    return finite
