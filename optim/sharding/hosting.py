"""Which leaves have their state in host memory: the option `paged`."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding

from octavo.pallas_kernels import Storage

from ..checks import warn_once
from ..options import Settings
from ..storage.chunks import chunk_bytes, chunk_shape, least_shape
from ..storage.memory import CUT_AXES, HOST
from ..storage.tree import PAGED, Leaves, per_leaf
from ..values import at
from .budget import Choice, fitted, reported_bytes, shares_of
from .finer import Places
from .geometry import aligned, shards
from .placement import platform_of

LEAST_PAGED = 100_000  # values of a leaf
_LANES = 128  # of a tile


class Paging(NamedTuple):
    """Whether the state of a leaf is in host memory.

    Attributes:
      page_bytes: then the most bytes of a chunk; None: it is on the device.
      why: it is there although the option says otherwise, or leaves it open; else "".
      folded: whether its rows are in groups there, so that a TPU can stream it.
    """

    page_bytes: int | None
    why: str = ""
    folded: bool = False

    @property
    def hosted(self) -> bool:
        """Whether it is."""
        return self.page_bytes is not None


class _Obstacle(NamedTuple):
    """Why the state of a leaf cannot be, or need not be, in host memory.

    Attributes:
      why: of one leaf; "": it can.
      warning: about all such leaves, or "".
    """

    why: str = ""
    warning: str = ""


def hosted(
    settings: Settings,
    tree: Leaves,
    records: Sequence[Storage],
    where: Places,
    platform: str | None = None,
) -> tuple[list[Storage], list[Paging]]:
    """How each leaf is stored where its state is in host memory; and whether it is.

    As in `pagings`.
    """
    found = pagings(settings, tree, [r.unfolded for r in records], where, platform)
    pairs = zip(records, found, strict=True)
    return [replace(record, folded=page.folded) for record, page in pairs], found


def pagings(
    settings: Settings,
    tree: Leaves,
    records: Sequence[Storage],
    where: Places,
    platform: str | None = None,
) -> list[Paging]:
    """Where the state of each leaf is: the same in `init` and in every step.

    Args:
      settings: the options.
      tree: the parameters.
      records: how each leaf is stored.
      where: how each is sharded, and its state.
      platform: of devices that are not here. Default None: of those of the mesh, or of
        JAX' own.

    Raises:
      ValueError: where a chunk of `page_bytes` would hold no block row; or where it is
        not known how much memory there is, and has to be.
    """
    wanted = per_leaf("paged", settings.paged, tree, PAGED)
    if not any(wanted):
        return [Paging(None)] * len(records)
    pairs = zip(records, where.state, strict=True)
    obstacles = [_obstacle(settings, *pair, platform) for pair in pairs]
    chosen = [Choice(bool(asked)) for asked in wanted]
    if "auto" in wanted:
        free = [not why for why, _ in obstacles]
        limit = settings.device_bytes or reported_bytes(next(iter(where.state), None))
        shares = shares_of(tree.leaves, records, *where, settings.page_bytes)
        chosen = fitted(wanted, free, shares, limit)
    found = []
    rows = zip(tree.names, chosen, obstacles, strict=True)
    for k, (path, (asked, reason), (why, warning)) in enumerate(rows):
        if asked and warning:
            warn_once(warning)
        if not asked or why:
            found.append(Paging(None, why if asked else reason))
            continue
        own = _shard(records[k], where.state[k])
        _check_page(settings.page_bytes, path, own)
        folded = not _unfoldable(own, settings.page_bytes)
        found.append(Paging(settings.page_bytes, reason, folded))
    return found


def _shard(record: Storage, sharding: NamedSharding | None) -> Storage:
    """What one device has of a leaf."""
    return (
        record
        if sharding is None
        else record.shard(shards(sharding, len(record.shape)))
    )


def _unfoldable(record: Storage, page_bytes: int) -> str:
    """Why a TPU cannot stream the state of a leaf, or of a shard of it; else ""."""
    shape, unit, dtypes = record.shape, record.row_unit, (record.dtype, record.dtype)
    if len(shape) < 2 or shape[-2] % unit:
        return f"a TPU streams rows in groups of {unit}"
    arrays = [record.codes(k) for k in range(len(record.formats))]
    arrays += [record.scales(k) for k, f in enumerate(record.formats) if f.quantized]
    if any(x.shape[-1] % _LANES for x in arrays):
        # XLA would turn the array around, so that less of its tiles is empty.
        return f"a TPU streams rows, and scales of rows, of a multiple of {_LANES}"
    record = replace(record, folded=True)
    needed = chunk_bytes(record, dtypes, least_shape(record))
    if needed > page_bytes:
        return f"a TPU streams {unit} rows at once, with page_bytes={needed}"
    lengths = chunk_shape(record, dtypes, page_bytes)
    if sum(n < whole for n, whole in zip(lengths, shape, strict=True)) > CUT_AXES:
        return f"a TPU streams leaves that are cut along {CUT_AXES} axes at most"
    return ""


def _obstacle(
    settings: Settings,
    record: Storage,
    sharding: NamedSharding | None,
    platform: str | None,
) -> _Obstacle:
    """Why the state of a leaf stays on the device, whatever the option says."""
    if not record.steps or math.prod(record.shape) < LEAST_PAGED:
        return _Obstacle(f"state on the device: fewer than {LEAST_PAGED:,} values")
    if not record.elementwise:
        return _Obstacle(
            "state on the device: slots of another shape than the parameter's"
        )
    if sharding is not None and not aligned(record.blocks, sharding):
        return _Obstacle("state on the device: its blocks cross shard boundaries")
    unknown = sharding is None and settings.sharding is None and platform is None
    if unknown and jax.device_count() > 1:
        return _Obstacle(
            "state on the device: it is not known how the leaf is sharded",
            _UNKNOWN.format(devices=jax.device_count()),
        )
    if platform is None and not has_host_memory(sharding):
        return _Obstacle(
            "state on the device: there is no other memory",
            _NO_HOST.format(platform=platform_of(sharding)),
        )
    if (platform or platform_of(sharding)) == "tpu":
        odd = _unfoldable(_shard(record, sharding), settings.page_bytes)
        return _Obstacle(f"state on the device: {odd}" if odd else "")
    return _Obstacle()


def has_host_memory(sharding: NamedSharding | None) -> bool:
    """Whether the devices can use the memory of their hosts."""
    mesh = None if sharding is None else sharding.mesh
    device = mesh.devices.flat[0] if isinstance(mesh, Mesh) else jax.devices()[0]
    try:
        return HOST in {memory.kind for memory in device.addressable_memories()}
    except jax.errors.JaxRuntimeError:
        return True  # a device that is only described, for a compiler


def _check_page(page_bytes: int, path: str, record: Storage) -> None:
    dtypes = (record.dtype, record.dtype)
    least = least_shape(record)
    needed = chunk_bytes(record, dtypes, least)
    if needed > page_bytes:
        raise ValueError(
            f"page_bytes={page_bytes}{at(path)}: one row of blocks, {least} of its "
            f"shape {record.shape} with gradient, parameter and state, has {needed} "
            f"bytes. Write page_bytes={needed} or more; the default is {64 * 2**20}"
        )


_UNKNOWN = (
    "paged: {devices} devices, and it is not known how parameters are sharded over "
    "them, so the state stays on the devices. Write tx = tx.bind(params) once "
    "parameters are on their devices, or use a mesh with explicit axes"
)
_NO_HOST = (
    "paged: JAX has no memory of the host ('pinned_host') for the {platform} here, so "
    "the state stays on the device. Leave paged out; state='8bit' takes least of it"
)
