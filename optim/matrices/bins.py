"""How matrices are shared out to devices: as equal in cost as it gets, and static."""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Kind:
    """Equal things that are shared out whole.

    Attributes:
      count: how many.
      cost: of each; only the ratio to that of other kinds matters.
      size: of what each device sends of one, in any unit.
    """

    count: int
    cost: int
    size: int


class Run(NamedTuple):
    """Bins side by side that get as many of each kind.

    Attributes:
      bins: how many bins.
      counts: what each of them gets, of each kind.
    """

    bins: int
    counts: tuple[int, ...]


def shared_out(kinds: Sequence[Kind], bins: int, most: int) -> list[list[Run]]:
    """Who gets what, in one round or several.

    The dearest go first, each to the bin that has the least to do. Things of a kind go
    to bins in order, so that few slices move all of them.

    Args:
      kinds: what is shared out.
      bins: how many there are.
      most: the size of all that goes in one round, if it is several things.

    Returns:
      For each round, all bins in order.
    """
    loads = [(0, k) for k in range(bins)]
    found = []
    for counts in _rounds(kinds, bins, most):
        own = [[0] * len(kinds) for _ in range(bins)]
        for k in _dearest_first(kinds):
            for _ in range(counts[k]):
                load, b = loads[0]
                own[b][k] += 1
                heapq.heapreplace(loads, (load + kinds[k].cost, b))
        found.append(_runs(own))
    return found


def _dearest_first(kinds: Sequence[Kind]) -> list[int]:
    return sorted(range(len(kinds)), key=lambda k: -kinds[k].cost)


def _rounds(kinds: Sequence[Kind], bins: int, most: int) -> list[list[int]]:
    """How many of each kind go in each round."""
    left = [kind.count for kind in kinds]
    found = []
    while any(left):
        counts, room = [0] * len(kinds), most
        for k in _dearest_first(kinds):
            taken = min(left[k], room // kinds[k].size)
            if taken < left[k]:
                taken -= taken % bins  # the rest would go to a few bins only
            if not any(counts):
                taken = max(taken, min(left[k], bins))
            counts[k], left[k] = taken, left[k] - taken
            room = max(0, room - taken * kinds[k].size)
            if left[k]:
                break
        found.append(counts)
    return found


def _runs(own: Sequence[Sequence[int]]) -> list[Run]:
    found: list[Run] = []
    for counts in map(tuple, own):
        if found and found[-1].counts == counts:
            found[-1] = found[-1]._replace(bins=found[-1].bins + 1)
        else:
            found.append(Run(1, counts))
    return found


def length(runs: Sequence[Run], kinds: Sequence[Kind]) -> int:
    """The size of what the fullest bin gets in a round."""
    return max(
        sum(n * kind.size for n, kind in zip(run.counts, kinds, strict=True))
        for run in runs
    )
