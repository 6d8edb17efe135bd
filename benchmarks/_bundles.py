"""What libtpu's final bundles say of a kernel: one bundle is one cycle, or a wait.

Dumped with `--xla_jf_dump_to` and `--xla_jf_dump_llo_text`. Of each kernel's files,
`*-final_bundles.txt` has a line for each bundle, with loops and branches, and
`*-final_hlo-static-per-bundle-utilization.txt` a row with the slots that it uses.

The pipeline over the grid is a loop of two trips more than there are tiles. Its own
branch around the kernel's body is taken in those two.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path

from _ways import Jump, Listing, Loop

_BUNDLE = re.compile(r"\s*(0x[0-9a-f]+|0)\s+(?:[A-Z]{2})?\s*:[\s>]*\{(.*)", re.DOTALL)
_BRANCH = re.compile(r"sbr\.rel\s+(?:\((!?)%(p\d+)\w*\)\s+)?target = \$region(\d+)")
_REGION = re.compile(r"Start(?:/End empty)? region (\d+)")
_NEGATED = re.compile(r"%(p\d+)\w* = pneg %(p\d+)")
_IF = r"(?:\(!?%p\w+\), )?"  # an operation may depend on a predicate
_TEST = re.compile(
    rf"%(p\d+)\w* = scmp\.ge\.s32\.totalorder {_IF}"
    r"%(s\d+)\w*, (\d+) /\* loop exit test"
)
_ARITHMETIC = re.compile(r"%v\w+ = v(?!ld\b)")
_BOUNDS = re.compile(r"iteration_bounds: \(([\d, ]+)\)")
_WINDOW = re.compile(r"window shape is \w+\[([\d,]+)\]")
_DELAY_SLOTS = {"tpu7x": 6}  # after a branch; 4 elsewhere


@dataclass(frozen=True)
class Bundles:
    """Of one kernel on one core.

    Attributes:
      values: that the core works on.
      count: bundles that run.
      aside: bundles that run only where something is rare, if it always were.
      uses: unit -> how many of its slots are used; spills are in `VLOAD` and `VSTORE`.
      slots: unit -> how many it has in a bundle.
    """

    values: int
    count: int
    aside: int
    uses: dict[str, int]
    slots: dict[str, int]

    @property
    def spills(self) -> int:
        """Vector registers that are stored for lack of room, or loaded again."""
        return self.uses["VSTORE:SPILL"] + self.uses["VLOAD:FILL"]

    @property
    def stores(self) -> int:
        """Vector registers that are stored, without those that are spilled."""
        return self.uses["VSTORE"] - self.uses["VSTORE:SPILL"]

    @property
    def shares(self) -> dict[str, float]:
        """Unit -> the share of its slots that is used."""
        return {
            unit: self.uses[unit] / self.count / slots
            for unit, slots in self.slots.items()
            if ":" not in unit
        }


def bundles_of(folder: Path, kernel: str, machine: str) -> Bundles:
    """Read the files of a kernel.

    Raises:
      ValueError: they are not as expected, or a loop's trips are not known.
    """
    lines = _bundles(_file(folder, kernel, "-final_bundles.txt").read_text())
    text = "".join(lines)
    bounds = [int(n) for n in _the(_BOUNDS, text).split(",")]
    tiles = math.prod(bounds)
    listing = listing_of(lines, tiles, _DELAY_SLOTS.get(machine, 4))
    units, capacity, rows = _utilization(folder, kernel)
    if len(rows) != len(lines):
        raise ValueError(f"{kernel}: {len(lines)} bundles, {len(rows)} rows of slots")
    times, weights = listing.times(), listing.weights()
    window = max(
        math.prod(int(n) for n in shape.split(",")) for shape in _WINDOW.findall(text)
    )
    return Bundles(
        values=tiles * window,
        count=sum(times),
        aside=sum(weights) - sum(times),
        uses={
            unit: sum(n * row[k] for n, row in zip(times, rows, strict=True))
            for k, unit in enumerate(units)
        },
        slots=dict(zip(units, capacity, strict=True)),
    )


def listing_of(lines: list[str], tiles: int, delay_slots: int) -> Listing:
    """Loops and branches of bundles; the grid is a loop if it has several tiles."""
    starts = {
        region: at for at, line in enumerate(lines) for region in _REGION.findall(line)
    }
    text = "".join(lines)
    negated = dict(_NEGATED.findall(text))
    tests = {test[0]: test for test in _TEST.findall(text)}
    listing = Listing(len(lines))
    for at, line in enumerate(lines):
        branches = _BRANCH.findall(line)
        if line.count("sbr.") != len(branches):
            raise ValueError(f"a branch that is not known: {line}")
        for inverted, predicate, region in branches:
            if region not in starts:  # the end, for a core that has no tile
                continue
            target, last = starts[region], at + delay_slots
            if target <= at:
                trips = _trips(tests.get(predicate), text) if inverted else None
                listing.loops.append(Loop(target, last, trips))
                continue
            when = not inverted
            if predicate in negated:
                predicate, when = negated[predicate], not when
            listing.jumps.append(Jump(last, target, predicate or None, when))
    if tiles > 1:
        _settle_pipeline(listing, lines, tiles)
    return listing


def _settle_pipeline(listing: Listing, lines: list[str], tiles: int) -> None:
    """The branches of the grid's own loop are not taken in the trips with a tile.

    One is around the kernel's body, others are around copies of a tile.
    """
    grid = max(listing.loops, key=lambda loop: loop.last - loop.first)
    if grid.trips is None or not tiles <= grid.trips <= tiles + 2:
        raise ValueError(f"{grid} is no loop over {tiles} tiles")
    inner = [loop for loop in listing.loops if loop != grid]
    skipped = {
        jump: range(jump.last + 1, jump.target or 0)
        for jump in listing.jumps
        if grid.holds(jump.last) and not any(loop.holds(jump.last) for loop in inner)
    }
    for jump, region in skipped.items():
        inside = any(jump.last in other for other in skipped.values())
        if not inside or _copies("".join(lines[region.start : region.stop])):
            listing.jumps.remove(jump)
            listing.instead[region.start, region.stop - 1] = tiles


def _copies(text: str) -> bool:
    """Whether a region is a copy: by DMA, or of what XLA has put in VMEM as a whole."""
    return "dma." in text or not _ARITHMETIC.search(text)


def _trips(test: tuple[str, str, str] | None, text: str) -> int | None:
    """From `next >= bound`, where `next = index + step` and `index` starts somewhere.

    Where the index is kept in memory, it is one of the compiler's own loops: from 0.
    """
    if test is None:
        return None
    _, following, bound = test
    step = re.search(rf"%{following}_\w+ = sadd\.s32 {_IF}(\d+), %(s\d+)", text)
    if step is None:
        return None
    first = 0
    phi = re.search(rf"%{step[2]}_\w+ = sphi {_IF}%(s\d+)", text)
    if phi is not None:
        start = re.search(rf"%{phi[1]}_\w+ = smov\.u32 {_IF}(\d+)", text)
        if start is None:
            return None
        first = int(start[1])
    return -(-(int(bound) - first) // int(step[1]))


def _bundles(text: str) -> list[str]:
    """One string for each bundle, with the lines that it goes on for."""
    bundles: list[str] = []
    for line in text.splitlines(keepends=True):
        found = _BUNDLE.match(line)
        if found is None:
            if bundles:
                bundles[-1] += line
            continue
        if int(found[1], 16) != len(bundles):
            raise ValueError(f"not bundle {len(bundles)}: {line}")
        bundles.append(found[2])
    return bundles


def _utilization(
    folder: Path, kernel: str
) -> tuple[list[str], list[int], list[list[int]]]:
    """Units, their slots in a bundle, and how many of them each bundle uses."""
    ending = "-final_hlo-static-per-bundle-utilization.txt"
    _, names, slots, _, *rows = _file(folder, kernel, ending).read_text().splitlines()
    units = [name.strip() for name in names.split(",")]
    return units, _numbers(slots), [_numbers(row) for row in rows]


def _numbers(line: str) -> list[int]:
    return [int(n) for n in line.split()]


def _file(folder: Path, kernel: str, ending: str) -> Path:
    """The name has a time, the kernel with a number, and one that counts files."""
    named = re.compile(rf"\d+-{re.escape(kernel)}(\.\d+)?-\d+{re.escape(ending)}")
    found = [path for path in folder.iterdir() if named.fullmatch(path.name)]
    if len(found) != 1:
        raise ValueError(f"{len(found)} files of {kernel} that end with {ending}")
    return found[0]


def _the(pattern: re.Pattern[str], text: str) -> str:
    """What all places that match say."""
    found = set(pattern.findall(text))
    if len(found) != 1:
        raise ValueError(f"{pattern.pattern}: {sorted(found)}")
    return found.pop()
