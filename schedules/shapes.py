"""The few curves that schedules are made of, in f32 from int32 counts.

A fraction of the way is computed from whole numbers, and the way still to go from
its own whole number: ``1 - t / T`` loses its digits near the end of a long run (at
step 9,999,999 of 10,000,000 it is off by a fifth), ``(T - t) / T`` loses none. For
the same reason a rate between two others is ``start * fall + end * rise`` with both
weights computed on their own; it also hits both ends exactly.
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

# A length is a Python number, or an array for cycles that grow.
Span = jax.Array | float
Rise = Callable[[jax.Array, Span], jax.Array]


def to_f32(value: Span) -> jax.Array:
    """``value`` in f32, whatever x64 mode and promotion rules say."""
    return jnp.asarray(value, jnp.float32)


def ratio(part: Span, whole: Span) -> jax.Array:
    """``part / whole``, and exactly 1 where the two are equal or part is larger."""
    part, whole = to_f32(part), to_f32(whole)
    # Division on an accelerator may round x / x to just below 1.
    return jnp.where(part >= whole, 1.0, part / whole)


def cosine(part: jax.Array, whole: Span) -> jax.Array:
    """``(1 - cos(pi part / whole)) / 2`` as a squared sine, accurate at both ends."""
    part, whole = to_f32(part), to_f32(whole)
    near = jnp.minimum(part, whole - part)
    square = jnp.sin((math.pi / 2) * ratio(near, whole)) ** 2
    return jnp.where(part == near, square, 1.0 - square)


def anneal(
    start: float, end: float, done: jax.Array, total: Span, rise: Rise = ratio
) -> jax.Array:
    """From ``start`` to ``end`` over ``total`` steps, and constant on both sides.

    ``rise(part, whole)`` goes from 0 to 1 and has the same shape upside down, as
    lines and half cosines do: what has fallen is then the rise of what remains.
    """
    done = jnp.clip(done, 0, total)
    return start * rise(total - done, total) + end * rise(done, total)


def warm(
    count: jax.Array, steps: int, init: float, peak: float, then: jax.Array
) -> jax.Array:
    """A line from ``init`` to ``peak`` over ``steps``, and ``then`` after it."""
    if steps == 0:
        return then
    return jnp.where(count < steps, anneal(init, peak, count, steps), then)


def power(base: float, exponent: jax.Array, per: int = 1) -> jax.Array:
    """``base ** (exponent / per)`` for int32 exponents, to a few units in f32.

    A base rounded to f32 is of no use where ``n`` is in the millions: 0.999999 ** 1e7
    comes out 12 % off. Here the logarithm is taken in f64, and ``n log2(base)`` is
    split so that its whole part, which only shifts the binary point, is exact, and
    its fraction is small.
    """
    if base == 0.0:
        return jnp.where(exponent == 0, 1.0, 0.0)
    slope = math.log2(base) / per
    head = _round_bits(slope, 12)
    low = exponent % 4096
    # 12 bits times 12 bits: both products are exact up to step 2**24.
    parts = (to_f32(exponent - low) * head, to_f32(low) * head)
    whole = sum(jnp.floor(part) for part in parts)
    fraction = sum(part - jnp.floor(part) for part in parts)
    fraction += to_f32(exponent) * (slope - head)
    whole, fraction = whole + jnp.floor(fraction), fraction - jnp.floor(fraction)
    # Past 300 either way the result is 0 or infinite in f32 already.
    shift = jnp.clip(whole, -300.0, 300.0).astype(jnp.int32)
    return jnp.ldexp(jnp.exp2(fraction), shift)


def lookup(table: Sequence[float], index: jax.Array) -> jax.Array:
    """``table[index]`` in f32."""
    return jnp.asarray(np.asarray(table, np.float32))[index]


def passed(boundaries: Sequence[int], count: jax.Array) -> jax.Array:
    """How many of the increasing ``boundaries`` are at or before ``count``."""
    edges = jnp.asarray(np.asarray(boundaries, np.int32))
    return jnp.searchsorted(edges, count, side="right").astype(jnp.int32)


def _round_bits(value: float, bits: int) -> float:
    mantissa, exponent = math.frexp(value)
    return math.ldexp(round(mantissa * 2**bits), exponent - bits)
