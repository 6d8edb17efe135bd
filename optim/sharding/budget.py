"""Which leaves `paged="auto"` takes: the largest, until what is left fits.

From declared numbers alone, so that `init`, each step and a restore choose the same.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from octavo.pallas_kernels import Storage, nbytes

from ..checks import warn_once
from ..storage.chunks import chunk_bytes, chunk_shape
from ..storage.memory import shown_size
from .geometry import aligned, fitting, shards

_CHUNKS = 4  # at once, as the option `page_bytes` says


class Share(NamedTuple):
    """What a leaf takes on one device, in bytes.

    Attributes:
      rest: parameter, gradient, and what of its state is never in host memory.
      state: what may be there.
      chunk: of a step through it.
    """

    rest: int
    state: int
    chunk: int


class Choice(NamedTuple):
    """Whether the state of a leaf should be in host memory, and why, if it is open."""

    hosted: bool
    why: str = ""


def fitted(
    wanted: Sequence[bool | str],
    able: Sequence[bool],
    shares: Sequence[Share],
    limit: int,
) -> list[Choice]:
    """What `"auto"` is for each leaf, so that all fit if they can.

    Args:
      wanted: the option, of each leaf.
      able: whether each can be paged.
      shares: of each.
      limit: bytes of a device.
    """
    hosted = [asked is True and can for asked, can in zip(wanted, able, strict=True)]
    needed = first = _needed(shares, hosted)
    for k in sorted(range(len(shares)), key=lambda k: (-shares[k].state, k)):
        if needed > limit and wanted[k] == "auto" and able[k]:
            hosted[k] = True
            needed = _needed(shares, hosted)
    if needed > limit:
        warn_once(_TOO_MUCH.format(needed=needed, limit=limit, size=shown_size(needed)))
    over = first > limit
    sizes = f"{shown_size(first)} of device_bytes={shown_size(limit)}"
    why = {
        True: f"paged: parameters, gradients and state would take {sizes}",
        False: f"not paged: what is left fits, {shown_size(needed)}"
        if over
        else f"not paged: all fits, {sizes}",
    }

    def of(k: int) -> Choice:
        if wanted[k] != "auto":
            return Choice(bool(wanted[k]))
        # What cannot be paged although it should says why itself.
        asked = hosted[k] or (over and not able[k])
        return Choice(asked, why[asked])

    return [of(k) for k in range(len(shares))]


def _needed(shares: Sequence[Share], hosted: Sequence[bool]) -> int:
    pairs = list(zip(shares, hosted, strict=True))
    arrays = sum(share.rest + (0 if there else share.state) for share, there in pairs)
    return arrays + _CHUNKS * max((s.chunk for s, there in pairs if there), default=0)


def shares_of(
    leaves: Sequence[Any],
    records: Sequence[Storage],
    params: Sequence[NamedSharding | None],
    states: Sequence[NamedSharding | None],
    page_bytes: int,
) -> list[Share]:
    """What each leaf takes on a device.

    Args:
      leaves: the parameters.
      records: how the state of each is stored.
      params: their shardings.
      states: those of their states.
      page_bytes: most bytes of a chunk.
    """
    # Other leaves have entries that no step reads where one has scales, or a remainder.
    most = max((len(r.formats) for r in records), default=0)
    scaled = [
        any(r.formats[k].quantized for r in records if k < len(r.formats))
        for k in range(most)
    ]
    rounded = any(r.has_remainder for r in records)
    found = []
    rows = zip(leaves, records, params, states, strict=True)
    for leaf, record, own, sharding in rows:
        read, unread = [], []
        for k in range(len(record.formats)):
            read.append(record.codes(k))
            if scaled[k]:
                into = read if record.formats[k].quantized else unread
                into.append(record.scales(k))
        if rounded:
            (read if record.has_remainder else unread).append(record.remainder)
        weight = jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf))
        weights = _per_device([weight], own) * (2 if record.steps else 1)
        state, rest = _per_device(read, sharding), _per_device(unread, sharding)
        chunk = _chunk(record, sharding, page_bytes)
        found.append(Share(weights + rest, state, chunk))
    return found


def _per_device(
    arrays: Sequence[jax.ShapeDtypeStruct], sharding: NamedSharding | None
) -> int:
    """Bytes of arrays on one device, which are sharded as far as they divide."""
    if sharding is None:
        return sum(nbytes(x) for x in arrays)
    pairs = [(x, shards(fitting(sharding, x.shape), len(x.shape))) for x in arrays]
    return sum(nbytes(x) // math.prod(parts) for x, parts in pairs)


def _chunk(record: Storage, sharding: NamedSharding | None, page_bytes: int) -> int:
    """Bytes of the largest chunk: what is stepped, and what is on its way."""
    if not record.steps or not record.elementwise:
        return 0
    if sharding is not None:
        if not aligned(record.blocks, sharding):
            return 0
        record = record.shard(shards(sharding, len(record.shape)))
    dtypes = (record.dtype, record.dtype)
    return chunk_bytes(record, dtypes, chunk_shape(record, dtypes, page_bytes))


def reported_bytes(sharding: NamedSharding | None) -> int:
    """The memory of a device, as it reports it.

    Raises:
      ValueError: if it does not; or if there are several processes, which may be told
        different numbers and would then run different programs.
    """
    mesh = None if sharding is None else sharding.mesh
    here = jax.local_devices()[0]
    device = mesh.devices.flat[0] if isinstance(mesh, Mesh) else here
    if jax.process_count() > 1:
        raise ValueError(_SEVERAL.format(processes=jax.process_count()))
    limit = memory_of(device)
    if not limit:
        raise ValueError(_SILENT.format(kind=device.device_kind))
    return limit


def memory_of(device: Any) -> int:
    """Bytes of a device's memory; 0 where it does not report them."""
    try:
        return (device.memory_stats() or {}).get("bytes_limit", 0)
    except (jax.errors.JaxRuntimeError, NotImplementedError):
        return 0  # a device that is only described


_WRITE = (
    "Write device_bytes=, what parameters, gradients and state may take on each device"
)
_SILENT = (
    "paged='auto': the {kind} here does not report how much memory it has. " + _WRITE
)
_SEVERAL = (
    "paged='auto': {processes} processes may be told different sizes of memory, and "
    "would then run different programs. " + _WRITE
)
_TOO_MUCH = (
    "paged='auto': parameters, gradients and the rest of the state take {needed:,} "
    "bytes ({size}) on each device, although all that can be paged is: device_bytes is "
    "{limit:,}. Shard them over more devices, or raise device_bytes"
)
