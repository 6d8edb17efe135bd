"""A checksum of an array that does not depend on how it is sharded."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from octavo.pallas_kernels.rounding import finalize

from ..convert import mesh_of
from ..storage.memory import is_on_host, on_device


def sums_of(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Those of arrays, by their paths.

    What is in host memory passes the devices, one array after the other: all at once
    would not fit.
    """
    sums = {}
    for path, x in arrays.items():
        sums[path] = checksum(x)
        if is_on_host(x):
            sums[path].block_until_ready()
    return jax.device_get(sums)


def checksum(x: Any) -> jax.Array:
    """Two uint32 that change if a bit of an array does.

    Each value's bits are hashed with its global position, and the hashes added up as
    integers: in any order, on any mesh, on the devices where they are. One changed
    value always shows, several with a probability of 1 - 2**-64.
    """
    if is_key(x):
        x = jax.random.key_data(x)
    if not isinstance(x, jax.Array):
        x = np.asarray(x)
        if is_shortened(x.dtype):
            x = x.reshape(*x.shape, 1).view(np.uint32)
    x = on_device(x)
    with mesh_of(x):
        return _sums(jnp.asarray(x))


def is_key(x: Any) -> bool:
    """Whether these are random keys, which are stored as their data."""
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def is_shortened(dtype: Any) -> bool:
    """Whether JAX, without x64, would make values of this type shorter."""
    return jax.dtypes.canonicalize_dtype(dtype) != dtype


def shown(sums: Any) -> str:
    """A checksum as 16 hexadecimal digits."""
    first, second = (int(n) for n in sums)
    return f"{first:08x}{second:08x}"


@jax.jit
def _sums(x: jax.Array) -> jax.Array:
    words = _words(x)
    strides = [math.prod(words.shape[k + 1 :]) for k in range(words.ndim)]
    position = jnp.zeros((1,) * words.ndim, jnp.uint32)
    for k, stride in reversed(list(enumerate(strides))):
        along = (*(1,) * k, words.shape[k], *(1,) * (words.ndim - k - 1))
        index = lax.broadcasted_iota(jnp.uint32, along, k)
        position = position + index * jnp.uint32(stride % 2**32)
    hashes = (_hash(words ^ _hash(position + jnp.uint32(salt))) for salt in _SALTS)
    return jnp.stack([jnp.sum(h, dtype=jnp.uint32) for h in hashes])


_SALTS = (0x9E3779B9, 0x7F4A7C15)


def _words(x: jax.Array) -> jax.Array:
    """The bits of each value as uint32, on a last axis for wider ones."""
    if jnp.iscomplexobj(x):
        x = jnp.stack([x.real, x.imag], axis=-1)
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    info = jnp.finfo if jnp.issubdtype(x.dtype, jnp.floating) else jnp.iinfo
    bits = info(x.dtype).bits
    same = jnp.uint32 if bits == 64 else jnp.dtype(f"uint{bits}")
    return lax.bitcast_convert_type(x, same).astype(jnp.uint32)


def _hash(x: jax.Array) -> jax.Array:
    hashed = finalize(lax.bitcast_convert_type(x, jnp.int32))
    return lax.bitcast_convert_type(hashed, jnp.uint32)
