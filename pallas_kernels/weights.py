"""How a parameter of 16 bits takes a step that is smaller than its unit.

A bfloat16 has 8 significant bits. Next to 1.0, its unit is 2**-7, and a step of 1e-3 is
rounded away, in every step anew. So it is rounded at random in proportion, or what
rounding lost is kept beside it, in 8 bits or in 16.

Everything here is integer arithmetic on magnitudes in units of 2**-16 of the type's own
unit: the upper 16 bits of such a number are those of the stored value, and one unit
more is the next larger value, over the border of an octave, too. Those of bfloat16 are
the bits of float32. Values between two stored ones are linear in it, so what is
unbiased here is unbiased.
"""

import math
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from . import rounding
from .formats.base import bits_of, float_of
from .layout import positions

Weights: TypeAlias = Literal["nearest", "stochastic", "remainder8", "remainder16"]
# By name, the bits of what is kept beside each parameter.
WEIGHTS: dict[Weights, int] = {
    "nearest": 0,
    "stochastic": 0,
    "remainder8": 8,
    "remainder16": 16,
}
_BITS = 16  # below a unit
_LOW = np.int32((1 << _BITS) - 1)
_HALF = np.int32(1 << (_BITS - 1))
_SIGN = np.int32(-(2**31))

# float16 below 2**-14 is in steps of 2**-24, as float32 is not. Above, an octave of it
# has 10 bits.
_NORMAL = 2.0**-14
_NORMAL_BITS = np.int32(np.float32(_NORMAL).view(np.int32))
_NORMAL_UNITS = np.int32(1024 << _BITS)
_OF_UNIT = 2.0 ** (24 + _BITS)


class Stored(NamedTuple):
    """A parameter as it is stored.

    Args:
      p: a value of its type, as float32.
      remainder: what is kept beside it, int32, of which only those low bits count that
        a cast to its type keeps; None: nothing.
    """

    p: jax.Array
    remainder: jax.Array | None


def has_16_bits(dtype: Any) -> bool:
    """Whether parameters of this type are those that this is for."""
    return dtype in (jnp.bfloat16, jnp.float16)


def remainder_dtype(weights: Weights | None) -> np.dtype[Any] | None:
    """Of what is kept beside a parameter; None if nothing is."""
    if weights is None or WEIGHTS[weights] == 0:
        return None
    return np.dtype(f"int{WEIGHTS[weights]}")


def keeping(kept: int) -> Weights:
    """The name by which so many bytes are kept beside each parameter.

    Raises:
      KeyError: if there is none.
    """
    names: dict[int, Weights] = {bits // 8: x for x, bits in WEIGHTS.items() if bits}
    return names[kept]


def noise_bits(weights: Weights) -> int:
    """Of random bits that a parameter takes in a step: those that are not kept."""
    return 0 if weights == "nearest" else _BITS - WEIGHTS[weights]


def full(stored: Stored, dtype: Any, weights: Weights) -> jax.Array:
    """The float32 value that a parameter of this type stands for.

    From a remainder as it is once it was cast.
    """
    if stored.remainder is None:
        return stored.p
    below = stored.remainder << (_BITS - WEIGHTS[weights])
    value = _value(_units(stored.p, dtype) + below, dtype)
    if dtype == jnp.bfloat16:
        return value
    # Units are those of numbers; of bfloat16, of what is infinite or none, too.
    return jnp.where(jnp.abs(stored.p) < jnp.inf, value, stored.p)


def moved(
    x: jax.Array,
    before: jax.Array,
    stored: Stored,
    dtype: Any,
    weights: Weights,
    noise: jax.Array | int = 0,
) -> Stored:
    """A parameter after a step.

    Where its value does not change, or would leave the range of its type, or is not a
    number, it stays as it is, bit for bit: denormal numbers, too, which devices take
    for zeros when they add.

    Args:
      x: its new value, float32.
      before: the value that it had: `full`.
      stored: as it was stored.
      dtype: of the parameter.
      weights: how it is stored.
      noise: int32 in [0, 2**noise_bits(weights)), the shape of x.
    """
    largest = float(jnp.finfo(dtype).max)
    moves = (jnp.abs(x) <= largest) & (x != before)
    if dtype == jnp.bfloat16 and weights != "nearest":
        # One choice for both: what the units of the old value give is what is stored.
        units = jnp.where(moves, bits_of(x) + noise, bits_of(before))
        return _parts(units, dtype, weights)
    new = split(x, dtype, weights, noise)
    return jax.tree.map(lambda n, o: jnp.where(moves, n, o), new, stored)


def split(x: jax.Array, dtype: Any, weights: Weights, noise: jax.Array | int) -> Stored:
    """What is stored of a value within the range of the type; see `moved`.

    Half of what noise may be rounds to the nearest.
    """
    if weights == "nearest":
        return Stored(x, None)
    return _parts(_units(x, dtype) + noise, dtype, weights)


def unbiased(x: jax.Array, dtype: Any, step: jax.Array, leaf: int) -> jax.Array:
    """A float32 array in a type of 16 bits, rounded up or down in proportion.

    Random bits are a function of the step, the leaf and the position, as everywhere.

    Args:
      x: what is not finite stays so.
      dtype: bfloat16 or float16.
      step: `step_key`.
      leaf: `leaf_number`.
    """
    strides = tuple(math.prod(x.shape[k + 1 :]) for k in range(x.ndim))
    at = positions(x.shape, strides, 0)
    bits = rounding.hashed(rounding.leaf_key(step, jnp.int32(leaf)), at)
    noise = rounding.noise(bits, 0, rounding.Draw(None, noise_bits("stochastic")))
    rounded = split(x, dtype, "stochastic", noise).p
    return jnp.where(jnp.isfinite(x), rounded, x).astype(dtype)


def _parts(units: jax.Array, dtype: Any, weights: Weights) -> Stored:
    """What is stored of a value in units, of which it has those bits that are kept."""
    if weights == "stochastic":
        return Stored(_value(units & ~_LOW, dtype), None)
    # To the nearest, and from the middle to the larger one: then a remainder of half a
    # unit has one meaning.
    nearest = (units + _HALF) & ~_LOW
    return Stored(_value(nearest, dtype), units >> (_BITS - WEIGHTS[weights]))


def _units(x: jax.Array, dtype: Any) -> jax.Array:
    """The magnitude in units, and the sign as the highest bit."""
    if dtype == jnp.bfloat16:
        return bits_of(x)
    size = jnp.abs(x)
    low = size * _OF_UNIT
    # Half of a unit more would round numbers that have no fraction any more.
    low = (low + jnp.where(low < 2.0**22, 0.5, 0.0)).astype(jnp.int32)
    high = ((bits_of(size) - _NORMAL_BITS) << 3) + _NORMAL_UNITS
    return jnp.where(size < _NORMAL, low, high) | (bits_of(x) & _SIGN)


def _value(units: jax.Array, dtype: Any) -> jax.Array:
    """The inverse of `_units`."""
    if dtype == jnp.bfloat16:
        return float_of(units)
    size = units & ~_SIGN
    low = size.astype(jnp.float32) * (1 / _OF_UNIT)
    high = float_of(((size - _NORMAL_UNITS) >> 3) + _NORMAL_BITS)
    value = jnp.where(size < _NORMAL_UNITS, low, high)
    return float_of(bits_of(value) | (units & _SIGN))
