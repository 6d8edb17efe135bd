"""The two memories where arrays of a state may be; how arrays get there."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ..checks import is_traced

DEVICE = "device"
HOST = "pinned_host"  # of the host, where its devices reach it
CUT_AXES = 2  # along how many axes, at most, what a TPU copies from there is cut


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
    pieces = Pieces.of(like.shape, like.dtype)
    one = jnp.full(pieces.lengths, value, like.dtype)
    piece = jax.device_put(one, jax.memory.Space.Host)

    def turn(k: Any, array: jax.Array) -> jax.Array:
        return lax.dynamic_update_slice(array, piece, pieces.starts(k)[1])

    array = jax.device_put(lax.empty(like.shape, like.dtype), jax.memory.Space.Host)
    return lax.fori_loop(0, pieces.total, turn, array)


class Pieces(NamedTuple):
    """An array in equal pieces of at most 8 MiB. The last ones along an axis overlap.

    Attributes:
      shape: of the array.
      lengths: of a piece: outer axes are cut, but two at most.
    """

    shape: tuple[int, ...]
    lengths: tuple[int, ...]

    @classmethod
    def of(cls, shape: tuple[int, ...], dtype: Any) -> "Pieces":
        """Of an array."""
        values = _PIECE // jnp.dtype(dtype).itemsize
        lengths: list[int] = []
        for k, n in enumerate(shape):
            fits = max(1, values // max(1, math.prod(shape[k + 1 :])))
            cut = sum(map(int.__lt__, lengths, shape))
            lengths.append(n if cut == CUT_AXES else min(n, fits))
        return cls(shape, tuple(lengths))

    @property
    def counts(self) -> list[int]:
        """How many, along each axis."""
        return [-(-n // k) for n, k in zip(self.shape, self.lengths, strict=True)]

    @property
    def total(self) -> int:
        """In all."""
        return math.prod(self.counts)

    def starts(self, k: Any) -> tuple[list[Any], list[Any]]:
        """Where piece k has values that are in none before, and where it starts."""
        at = jnp.unravel_index(k, self.counts)
        own = [i * jnp.int32(n) for i, n in zip(at, self.lengths, strict=True)]
        last = (n - k for n, k in zip(self.shape, self.lengths, strict=True))
        return own, [
            jnp.minimum(i, jnp.int32(n)) for i, n in zip(own, last, strict=True)
        ]


_PIECE = 8 * 2**20  # bytes


def shown_size(n: int) -> str:
    """Bytes in the largest unit that they fill."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if n >= scale:
            return f"{n / scale:,.2f} {unit}"
    return f"{n} B"
