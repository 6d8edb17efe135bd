"""The one place where an algorithm meets a storage format."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

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
        """Whether p is an operand."""
        return self.in_place or self.rule.needs_params


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
    """Operands of a step that are one number each."""

    learning_rate: jax.Array
    rule: tuple[jax.Array, ...]


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
    dtype = scalars.learning_rate.dtype
    assert leaf.g is not None
    g = leaf.g.astype(dtype)
    p = None if leaf.p is None else leaf.p.astype(dtype)
    old = [_widen(c, dtype) for c in leaf.codes]
    old_scales = [None if s is None else s.astype(jnp.float32) for s in leaf.scales]
    slots = tuple(
        f.decode(c, s) for f, c, s in zip(formats, old, old_scales, strict=True)
    )

    u, slots = rule.direction(g, p, slots, scalars.rule)
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
    # Adding -0.0 leaves every number as it is, +0.0 included.
    delta = jnp.where(keep, -scalars.learning_rate * u, -0.0)
    if program.in_place:
        assert leaf.p is not None and p is not None
        g_out, p_out = None, (p + delta).astype(leaf.p.dtype)
    else:
        g_out, p_out = delta.astype(leaf.g.dtype), None
    return Leaf(
        g=g_out,
        p=p_out,
        codes=tuple(
            jnp.where(keep, c, o).astype(x.dtype)
            for (c, _), o, x in zip(new, old, leaf.codes, strict=True)
        ),
        scales=tuple(
            None
            if s is None or o is None
            else jnp.where(keep, s, o).astype(jnp.bfloat16)
            for (_, s), o in zip(new, old_scales, strict=True)
        ),
    )


def _widen(codes: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Integer codes as int32: no backend computes on int8."""
    wide = jnp.int32 if jnp.issubdtype(codes.dtype, jnp.integer) else dtype
    return codes.astype(wide)


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
