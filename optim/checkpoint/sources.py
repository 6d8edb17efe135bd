"""Where a checkpoint has the moments of an optimizer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from octavo.pallas_kernels import Blocks, Float32

from ..state import scale_name
from ..stored import StoredLeaf, stored_leaves
from .files import Saved


@dataclass(frozen=True)
class Source:
    """The moments of one optimizer in a checkpoint.

    Attributes:
      root: path below which everything of it lies.
      slots: its moments.
      how: how its leaves are stored; None: as they are, by optax.
      count: path of its counter.
    """

    root: str
    slots: tuple[str, ...]
    how: dict[str, StoredLeaf] | None
    count: str | None

    def codes(self, slot: str, leaf: str) -> str:
        """Path of a moment."""
        middle = () if self.how is None else ("moments",)
        return join(self.root, *middle, slot, leaf)

    def scales(self, slot: str, leaf: str) -> str:
        """Path of its scales, whether there are any or not."""
        return join(self.root, "scales", scale_name(slot), leaf)

    def stored(self, leaf: str, shape: tuple[int, ...], slot: int) -> StoredLeaf:
        """How a leaf is stored."""
        if self.how is not None:
            return self.how[leaf]
        return StoredLeaf((Float32(),) * (slot + 1), Blocks(shape, None, 1))


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
        # The tag names a slot and its format for each: mu_log8-nu_root8.
        tag = path.rpartition("/")[2]
        slots = tuple(part.split("_", 1)[0] for part in tag.split("-"))
        first = join(root, "moments", slots[0])
        named = [p for p in saved.arrays if below(p, first)]
        leaves = [p[len(first) :].lstrip("/") for p in named]
        shapes = [tuple(saved.arrays[p].shape) for p in named]
        how = stored_leaves(loaded[path], leaves, shapes, tag)
        sources.append(Source(root, slots, how, join(root, "count")))
    return sources


def optax_sources(
    arrays: Mapping[str, Any], slots: Sequence[str], leaves: Sequence[str]
) -> list[Source]:
    """The states in a checkpoint that have all these moments of all these leaves."""
    end = f"/{join(slots[0], leaves[0])}"
    roots = [p[: -len(end)] for p in (f"/{p}" for p in arrays) if p.endswith(end)]
    roots = [root.lstrip("/") for root in roots]
    complete = [
        root
        for root in roots
        if all(join(root, s, leaf) in arrays for s in slots for leaf in leaves)
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


def join(*parts: str) -> str:
    """A path from its parts; empty ones are the tree itself."""
    return "/".join(part for part in parts if part)


def below(path: str, root: str) -> bool:
    """Whether a path is another, or below it."""
    return not root or path == root or path.startswith(f"{root}/")
