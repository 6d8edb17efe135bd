"""Unbiased rounding whose random numbers are a pure function of where and when.

The noise of one stored value depends on (seed, step, leaf, slot, position in the
global array) and on nothing else: not on the mesh, the tile, the backend or the
number of restarts. Integer arithmetic wraps around alike everywhere, so the bits
are equal on every device.

One hash serves four values of a block, a quarter of it apart, four slots and the
parameter: each value takes another window of its bits, and another one for each slot.
Four windows of 14 bits overlap; the leading bits of each are the last ones of another,
which hardly ever decide. Those of a parameter of 16 bits have 16.
"""

import zlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

NOISE_BITS = 14
NEAREST = 1 << (NOISE_BITS - 1)  # the noise that rounds to the nearest
WEIGHT_BITS = 16  # of the noise of a parameter
WINDOWS = 4
_BETWEEN = (32 - NOISE_BITS) // (WINDOWS - 1)


def _int32(constant: int) -> np.int32:
    return np.uint32(constant).view(np.int32)


# The 32-bit finalizer of MurmurHash3 (Appleby): each input bit flips every output
# bit with a probability within 1 % of one half. Signed, because Mosaic has no
# unsigned multiply.
_MULTIPLIERS = (_int32(0x85EBCA6B), _int32(0xC2B2AE35))


def finalize(x: jax.Array) -> jax.Array:
    """Hash int32 to int32; no two values alike."""
    x = x ^ lax.shift_right_logical(x, np.int32(16))
    x = x * _MULTIPLIERS[0]
    x = x ^ lax.shift_right_logical(x, np.int32(13))
    x = x * _MULTIPLIERS[1]
    return x ^ lax.shift_right_logical(x, np.int32(16))


def step_key(seed: int, count: jax.Array) -> jax.Array:
    """int32 scalar that stands for (seed, step)."""
    start = np.int32(seed & 0x7FFFFFFF) * jnp.int32(1)
    return finalize(finalize(start) ^ count.astype(jnp.int32))


def leaf_number(path: str) -> np.int32:
    """What stands for a leaf."""
    return _int32(zlib.crc32(path.encode()))


def leaf_key(step: jax.Array, leaf: jax.Array) -> jax.Array:
    """int32 scalar that stands for (seed, step, leaf).

    Taken inside the kernels: outside, it would be a dozen operations for each leaf,
    which XLA compiles for longer than the kernels themselves.
    """
    return finalize(step ^ leaf)


def hashed(key: jax.Array, position: jax.Array) -> jax.Array:
    """32 random bits for each global `position` (int32, row-major)."""
    return finalize(position ^ key)


class Draw(NamedTuple):
    """Which noise is wanted: int32 in [0, 2**width).

    Args:
      slot: number of the slot; None: for the parameter.
      width: NOISE_BITS for a slot; at most WEIGHT_BITS for the parameter.
    """

    slot: int | None
    width: int = NOISE_BITS


def noise(bits: jax.Array, quarter: jax.Array | int, draw: Draw) -> jax.Array:
    """Noise for values in this quarter of their blocks, from 32 random bits."""
    if draw.slot is not None:
        return _window(bits, (quarter + draw.slot) % WINDOWS * _BETWEEN, draw.width)
    # Windows at 16, 0, 5 and 11: their leading bits are not those of the value's slots.
    start = ((quarter + 3) % WINDOWS * 11) >> 1
    return _window(bits, start + (WEIGHT_BITS - draw.width), draw.width)


def _window(bits: jax.Array, start: jax.Array | int, width: int) -> jax.Array:
    """So many bits from this one on."""
    if isinstance(start, int) and start + width == 32:
        return lax.shift_right_logical(bits, np.int32(start))
    first = np.int32(start) if isinstance(start, int) else start
    shift = jnp.broadcast_to(first, bits.shape)
    return lax.shift_right_logical(bits, shift) & np.int32((1 << width) - 1)


def period(block: int) -> int:
    """How far values that share a hash are apart in a block; its length: none do."""
    return block // WINDOWS if block % WINDOWS == 0 else block
