"""The two memories where arrays of a state may be; how arrays get there."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ..checks import is_traced

DEVICE = "device"
HOST = "pinned_host"  # of the host, where its devices reach it


def is_on_host(x: Any) -> bool:
    """Whether an array is in host memory."""
    where = getattr(x, "sharding", None)
    return where is not None and where.memory_kind == HOST


def on_device(x: Any) -> Any:
    """The same array in the memory of its devices: JAX computes nothing elsewhere.

    Within jit, its type says where it is.
    """
    if is_traced(x):
        there = jax.typeof(x).memory_space == jax.memory.Space.Host
        return jax.device_put(x, jax.memory.Space.Device) if there else x
    if not is_on_host(x):
        return x
    return jax.device_put(x, x.sharding.with_memory_kind(DEVICE))


def put(x: Any, sharding: Any) -> jax.Array:
    """An array with this sharding, whose type says in which memory it is.

    JAX 0.10 leaves that out of arrays on one device that were made of their shards, as
    Orbax does it; a step with one would be another program.
    """
    placed = jax.device_put(x, sharding)
    if not is_on_host(placed):
        return placed
    typed = jax.typeof(placed).memory_space == jax.memory.Space.Host
    return placed if typed else jax.device_put(placed, jax.memory.Space.Host)


def full_on_host(like: jax.ShapeDtypeStruct, value: Any) -> jax.Array:
    """Within jit: an array of one value in host memory, put there piece by piece.

    As a whole it would be made on the device first: docs/decisions.md, "Paged state".
    """
    shape = like.shape
    lengths = _piece(shape, _PIECE // like.dtype.itemsize)
    counts = [-(-n // length) for n, length in zip(shape, lengths, strict=True)]
    one = jnp.full(lengths, value, like.dtype)
    piece = jax.device_put(one, jax.memory.Space.Host)

    def turn(k: Any, array: jax.Array) -> jax.Array:
        # Of the last along an axis the start is moved back, so that it fits.
        at = jnp.unravel_index(k, counts)
        starts = [i * jnp.int32(n) for i, n in zip(at, lengths, strict=True)]
        return lax.dynamic_update_slice(array, piece, starts)

    array = jax.device_put(lax.empty(shape, like.dtype), jax.memory.Space.Host)
    return lax.fori_loop(0, math.prod(counts), turn, array)


_PIECE = 8 * 2**20  # bytes


def _piece(shape: tuple[int, ...], values: int) -> tuple[int, ...]:
    """The longest part of an array with at most so many values: outer axes are cut."""
    lengths = []
    for k, n in enumerate(shape):
        fits = max(1, values // math.prod(shape[k + 1 :]))
        lengths.append(min(n, fits))
    return tuple(lengths)


def shown_size(n: int) -> str:
    """Bytes in the largest unit that they fill."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if n >= scale:
            return f"{n / scale:,.2f} {unit}"
    return f"{n} B"
