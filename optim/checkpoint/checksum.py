"""A checksum of an array that does not depend on how it is sharded."""

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from octavo.pallas_kernels.rounding import finalize

from ..convert import mesh_of
from ..sharding.geometry import padded_spec
from ..storage.memory import Pieces, is_on_host, on_device, put
from ..storage.shards import mesh_axes


def sums_of(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Checksums of arrays, by their paths."""
    return jax.device_get({path: checksum(x) for path, x in arrays.items()})


def checksum(x: Any) -> jax.Array:
    """Two uint32 that change if a bit of an array does.

    Each value's bits are hashed with its global position, and the hashes added up as
    integers: in any order, on any mesh, on the devices where they are; what is in host
    memory passes these in pieces. One changed value always shows, several with a
    probability of 1 - 2**-64.
    """
    if is_key(x):
        x = jax.random.key_data(x)
    if not isinstance(x, jax.Array):
        x = np.asarray(x)
        if is_shortened(x.dtype):
            x = x.reshape(*x.shape, 1).view(np.uint32)
    with mesh_of(x):
        if is_on_host(x) and math.prod(x.shape):
            return _in_pieces(put(x, x.sharding), x.sharding)
        return _sums(on_device(jnp.asarray(x)))


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
    return _added(x, x.shape, [0] * x.ndim)


@functools.partial(jax.jit, static_argnums=1)
def _in_pieces(x: jax.Array, sharding: Any) -> jax.Array:
    """Of an array in host memory."""
    if not isinstance(sharding, NamedSharding):
        return _of_shard(x, x.shape, [jnp.int32(0)] * x.ndim)
    axes = [mesh_axes(axis) for axis in padded_spec(sharding, x.ndim)]

    def on_one_device(shard: jax.Array) -> jax.Array:
        places = (lax.axis_index(over) if over else jnp.int32(0) for over in axes)
        first = [k * jnp.int32(n) for k, n in zip(places, shard.shape, strict=True)]
        return lax.psum(_of_shard(shard, x.shape, first), sum(axes, ()))

    mapped = jax.shard_map(
        on_one_device,
        mesh=sharding.mesh,
        in_specs=(sharding.spec,),
        out_specs=PartitionSpec(),
        check_vma=False,
    )
    return mapped(x)


def _of_shard(x: jax.Array, shape: tuple[int, ...], first: list[Any]) -> jax.Array:
    pieces = Pieces.of(x.shape, x.dtype)

    def turn(k: Any, sums: jax.Array) -> jax.Array:
        own, starts = pieces.starts(k)
        piece = lax.dynamic_slice(x, starts, pieces.lengths)
        piece = jax.device_put(piece, jax.memory.Space.Device)
        at = [a + b for a, b in zip(first, starts, strict=True)]
        seen = [a - b for a, b in zip(own, starts, strict=True)]
        return sums + _added(piece, shape, at, seen)

    return lax.fori_loop(0, pieces.total, turn, jnp.zeros(len(_SALTS), jnp.uint32))


def _added(
    x: jax.Array, shape: tuple[int, ...], first: list[Any], seen: Any = None
) -> jax.Array:
    """The sums of a part of an array.

    Args:
      x: the part.
      shape: of the array.
      first: index of the part's first value.
      seen: how many values along each axis are in another part, too; None: none.
    """
    words = _words(x)
    shape = (*shape, *words.shape[x.ndim :])
    position, counts = jnp.zeros((1,) * words.ndim, jnp.uint32), True
    for k in reversed(range(words.ndim)):
        along = (*(1,) * k, words.shape[k], *(1,) * (words.ndim - k - 1))
        index = lax.broadcasted_iota(jnp.uint32, along, k)
        if k < x.ndim:
            counts = (
                counts if seen is None else counts & (index >= seen[k].astype("uint32"))
            )
            index = index + jnp.asarray(first[k]).astype(jnp.uint32)
        stride = math.prod(shape[k + 1 :])
        position = position + index * jnp.uint32(stride % 2**32)
    hashes = (_hash(words ^ _hash(position + jnp.uint32(salt))) for salt in _SALTS)
    kept = (jnp.where(counts, h, jnp.uint32(0)) for h in hashes)
    return jnp.stack([jnp.sum(h, dtype=jnp.uint32) for h in kept])


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
