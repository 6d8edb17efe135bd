"""How often each instruction of a listing runs: its loops, and the ways through it.

Every loop runs as often as its listing says. Where a branch leaves a choice, the
shortest way is the one that counts: the others are for what is rare, as a block that
is not finite. Branches on one predicate agree with each other.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

_MOST_SHARED = 10  # predicates: every combination of them is a way


@dataclass(frozen=True)
class Jump:
    """A branch forward: after the instruction `last`, on to `target`.

    Attributes:
      last: the branch, or the last of its delay slots.
      target: where it goes on; the number of instructions is the end. None: back to
        where it came from, so that no way that is the shortest passes it.
      predicate: what decides it; None: it always jumps.
      when: the value of the predicate with which it jumps.
    """

    last: int
    target: int | None
    predicate: str | None = None
    when: bool = True


@dataclass(frozen=True)
class Loop:
    """Instructions `first` to `last`, `trips` times; None: that is not known."""

    first: int
    last: int
    trips: int | None

    def holds(self, at: int) -> bool:
        """Whether an instruction is in the loop."""
        return self.first <= at <= self.last


@dataclass
class Listing:
    """The instructions of a kernel, as many as `length`, and where they branch.

    Attributes:
      length: how many.
      loops: each of them once.
      jumps: branches forward.
      instead: first and last instruction of a region -> how often it runs, in place
        of the trips of the outermost loop.
    """

    length: int
    loops: list[Loop] = field(default_factory=list)
    jumps: list[Jump] = field(default_factory=list)
    instead: dict[tuple[int, int], int] = field(default_factory=dict)

    def times(self) -> list[int]:
        """How often each instruction runs on the shortest way; 0: it is aside.

        Raises:
          ValueError: a loop on that way has trips that are not known.
        """
        weights = self.weights()
        way = min(self._ways(weights), key=lambda w: sum(weights[at] for at in w))
        for loop in self.loops:
            if loop.trips is None and any(loop.holds(at) for at in way):
                raise ValueError(f"the trips of {loop} are not known")
        times = [0] * self.length
        for at in way:
            times[at] = weights[at]
        return times

    def weights(self) -> list[int]:
        """How often each instruction runs if the way passes it."""
        return [self._weight(at) for at in range(self.length)]

    def _weight(self, at: int) -> int:
        around = [loop for loop in self.loops if loop.holds(at)]
        trips = [1 if loop.trips is None else loop.trips for loop in around]
        for (first, last), count in self.instead.items():
            if trips and first <= at <= last:
                outermost = max(around, key=lambda loop: loop.last - loop.first)
                trips[around.index(outermost)] = count
        return math.prod(trips)

    def _ways(self, weights: Sequence[int]) -> list[list[int]]:
        """The shortest way for each combination of predicates that several share."""
        names = [jump.predicate for jump in self.jumps if jump.predicate]
        shared = sorted({x for x in names if names.count(x) > 1})
        if len(shared) > _MOST_SHARED:
            raise ValueError(f"too many predicates are shared: {shared}")
        choices = itertools.product((False, True), repeat=len(shared))
        ways = (
            self._way(weights, dict(zip(shared, values, strict=True)))
            for values in choices
        )
        return [way for way in ways if way is not None]

    def _way(
        self, weights: Sequence[int], known: Mapping[str, bool]
    ) -> list[int] | None:
        """The shortest, where some predicates are known; None if none reaches the end.

        From the end to the start: `rest` is what it takes from there on.
        """
        jumps = {jump.last: jump for jump in self.jumps}
        nowhere = self.length + 1
        rest = [math.inf] * self.length + [0.0, math.inf]
        follow = [nowhere] * self.length
        for at in reversed(range(self.length)):
            after = [at + 1]
            if (jump := jumps.get(at)) is not None:
                target = nowhere if jump.target is None else jump.target
                if jump.predicate is None:
                    after = [target]
                elif jump.predicate in known:
                    after = [target if known[jump.predicate] == jump.when else at + 1]
                else:
                    after = [target, at + 1]
            follow[at] = min(after, key=lambda k: rest[k])
            rest[at] = weights[at] + rest[follow[at]]
        if math.isinf(rest[0]):
            return None
        way, at = [], 0
        while at < self.length:
            way.append(at)
            at = follow[at]
        return way
