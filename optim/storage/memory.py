"""The two memories where arrays of a state may be, and sizes in words."""

from typing import Any

import jax

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


def shown_size(n: int) -> str:
    """Bytes in the largest unit that they fill."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if n >= scale:
            return f"{n / scale:,.2f} {unit}"
    return f"{n} B"
