"""Unbiased rounding whose random numbers are a pure function of where and when.

The noise of one stored value depends on (seed, step, leaf, slot, position in the
global array) and on nothing else: not on the mesh, the tile, the backend or the
number of restarts. Integer arithmetic wraps around alike everywhere, so the bits
are equal on every device.
"""

import zlib

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def _int32(constant: int) -> np.int32:
    return np.uint32(constant).view(np.int32)


# The 32-bit finalizer of MurmurHash3 (Appleby): each input bit flips every output
# bit with a probability within 1 % of one half. Signed, because Mosaic has no
# unsigned multiply.
_MULTIPLIERS = (_int32(0x85EBCA6B), _int32(0xC2B2AE35))
_GOLDEN = _int32(0x9E3779B9)  # 2**32 / golden ratio: spreads consecutive integers


def _mix(x: jax.Array) -> jax.Array:
    x = x ^ lax.shift_right_logical(x, np.int32(16))
    x = x * _MULTIPLIERS[0]
    x = x ^ lax.shift_right_logical(x, np.int32(13))
    return x * _MULTIPLIERS[1]


def finalize(x: jax.Array) -> jax.Array:
    """Hash int32 to int32; no two values alike."""
    x = _mix(x)
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


def uniform(key: jax.Array, slot: int, position: jax.Array) -> jax.Array:
    """Float32 in [0, 1), one for each global `position` (int32, row-major)."""
    salt = key + _GOLDEN * np.int32(slot)
    # The last xor-shift of the finalizer only improves low bits, which are dropped.
    bits = _mix(position ^ salt)
    return lax.shift_right_logical(bits, np.int32(8)).astype(jnp.float32) * 2.0**-24
