"""Where a checkpoint has the moments of an optimizer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from octavo.pallas_kernels import Blocks, Float32, Storage, StoredSlot

from ..storage.state import REMAINDER, scale_name
from ..storage.table import read_table, slots_in
from .files import Saved


@dataclass(frozen=True)
class Source:
    """The moments of one optimizer in a checkpoint.

    Attributes:
      root: path below which everything of it is.
      slots: its moments.
      records: how its leaves are stored; None: as they are, by optax.
      count: path of its counter.
    """

    root: str
    slots: tuple[str, ...]
    records: dict[str, Storage] | None
    count: str | None

    def codes(self, slot: str, leaf: str) -> str:
        """Path of a moment."""
        return join(self.root, slot, leaf)

    def scales(self, slot: str, leaf: str) -> str:
        """Path of its scales, whether there are any or not."""
        return join(self.root, scale_name(slot), leaf)

    def record(self, leaf: str, like: Storage, dtype: Any) -> Storage:
        """How a leaf is stored; by optax, in a type, with the shapes of another."""
        if self.records is not None:
            return self.records[leaf]
        slots = tuple(
            StoredSlot(slot.name, Float32(), np.dtype(dtype), shape=slot.shape)
            for slot in like.slots
        )
        return Storage(like.dtype, Blocks(like.shape, None, 1), slots)


def octavo_sources(saved: Saved, verify: bool) -> list[Source]:
    """The states of Octavo optimizers in a checkpoint."""
    tables = {}
    for path in saved.arrays:
        root, found, _ = f"/{path}".rpartition("/extra/format/")
        root = root.lstrip("/")
        count = saved.arrays.get(join(root, "count"))
        if found and count is not None and not count.shape:
            tables[root] = path
    if not tables:
        return []
    loaded = saved.load(dict.fromkeys(tables.values()), verify)
    sources = []
    for root, path in tables.items():
        tag = path.rpartition("/")[2]
        slots = slots_in(tag)
        first = join(root, slots[0] if slots else REMAINDER)
        shapes = {
            p[len(first) :].lstrip("/"): tuple(x.shape)
            for p, x in saved.arrays.items()
            if below(p, first)
        }
        records = read_table(loaded[path], shapes, tag)
        sources.append(Source(root, slots, records, join(root, "count")))
    return sources


def optax_sources(
    arrays: Mapping[str, Any],
    slots: Sequence[str],
    leaves: Sequence[str],
    octavo: Sequence[Source],
) -> list[Source]:
    """The other states in a checkpoint that have all these moments of all leaves."""
    if not leaves:  # one part of Muon's state may have none: only steps are counted
        return [Source("", tuple(slots), None, _count_near(arrays, ""))]
    end = f"/{join(slots[0], leaves[0])}"
    roots = [p[: -len(end)] for p in (f"/{p}" for p in arrays) if p.endswith(end)]
    roots = [root.lstrip("/") for root in roots]
    ours = {source.root for source in octavo}
    complete = [
        root
        for root in roots
        if root not in ours
        and all(join(root, s, leaf) in arrays for s in slots for leaf in leaves)
    ]
    return [
        Source(root, tuple(slots), None, _count_near(arrays, root)) for root in complete
    ]


def _count_near(arrays: Mapping[str, Any], root: str) -> str | None:
    """A counter beside moments, or beside the transformation that has them."""
    for near in (root, root.rpartition("/")[0]):
        counts = [
            p for p in arrays if below(p, near) and p.rpartition("/")[2] == "count"
        ]
        if counts:
            return counts[0]
    return None


def unquantized(path: str, arrays: Mapping[str, Any]) -> str:
    """Where optax has what `optim.quantized` keeps in `rest`, if that is not there."""
    parts = path.split("/")
    places = [k for k, part in enumerate(parts) if part == "rest"]
    others = (join(*parts[:k], *parts[k + 1 :]) for k in places)
    found = [] if path in arrays else [other for other in others if other in arrays]
    return found[0] if found else path


def join(*parts: str) -> str:
    """A path from its parts; empty ones are the tree itself."""
    return "/".join(part for part in parts if part)


def below(path: str, root: str) -> bool:
    """Whether a path is another, or below it."""
    return not root or path == root or path.startswith(f"{root}/")
