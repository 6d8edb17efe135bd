"""What ptxas and nvdisasm say of a kernel: the instructions that a warp issues.

A loop's trips are those of its counter, run through: where it starts, what is added to
it, and what it is compared with. Behind the last exit there is only what is rare, and a
branch to itself that nothing reaches.
"""

import importlib.util
import re
import shutil
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path

from _ways import Jump, Listing, Loop

_TOOLS = ("ptxas", "nvdisasm")
_MOST_TRIPS = 1 << 20
_LINE = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?);")
_LABEL = re.compile(r"(\.L\w+):")
_TARGET = re.compile(r"`\((\.L\w+)\)")
_REGISTER = r"(U?R\d+)(?:\.reuse)?"
_NUMBER = r"(-?0x[0-9a-f]+|U?RZ)"
_COMPARED = {
    "EQ": int.__eq__,
    "NE": int.__ne__,
    "LT": int.__lt__,
    "LE": int.__le__,
    "GT": int.__gt__,
    "GE": int.__ge__,
}


@dataclass(frozen=True)
class Instruction:
    """One line: the predicate that it needs, its name, and what it works on."""

    predicate: str | None
    name: str
    operands: str


@dataclass(frozen=True)
class Sass:
    """Of one kernel.

    Attributes:
      threads: of a program.
      count: instructions that each of its warps issues.
      aside: instructions that only some warps issue, if all did.
      stores: instructions that store to global memory.
      registers: of a thread.
      spills: bytes that a thread stores and loads for lack of registers.
      barriers: times that a program waits for all its warps.
    """

    threads: int
    count: int
    aside: int
    stores: int
    registers: int
    spills: int
    barriers: int


def missing_tool() -> str | None:
    """The first program that is needed and is not installed."""
    return next((name for name in _TOOLS if _tool(name) is None), None)


def ptxas_version() -> str:
    """As it says itself."""
    return re.findall(r"release [\d.]+, V([\d.]+)", _run("ptxas", "--version"))[0]


def sass_of(ptx: Path, kernel: str) -> Sass:
    """Assemble a file, and read what that gives.

    Raises:
      ValueError: a loop's trips are not known, or it always calls a function.
    """
    cubin = ptx.with_suffix(".cubin")
    said = _run("ptxas", "-v", "-arch=sm_90a", str(ptx), "-o", str(cubin))
    text = _run("nvdisasm", "-c", str(cubin))
    (body,) = re.findall(rf"^\.text\.{kernel}:\n(.*?)^//---", text, re.DOTALL | re.M)
    instructions, listing = listing_of(body)
    times = listing.times()
    count = sum(times)

    def issued(start: str) -> int:
        return sum(
            n
            for n, one in zip(times, instructions, strict=True)
            if one.name.startswith(start)
        )

    if issued("CALL"):
        raise ValueError(f"{kernel} calls what is not counted")
    spills = re.findall(r"(\d+) bytes spill", said)
    return Sass(
        threads=int(re.findall(r"\.reqntid (\d+)", ptx.read_text())[0]),
        count=count,
        aside=sum(listing.weights()) - count,
        stores=issued("STG"),
        registers=int(re.findall(r"Used (\d+) registers", said)[0]),
        spills=sum(int(n) for n in spills),
        barriers=issued("BAR.SYNC"),
    )


def listing_of(body: str) -> tuple[list[Instruction], Listing]:
    """Instructions without the padding at the end, their loops and their branches."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in body.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif found := _LINE.match(line):
            instructions.append(Instruction(*found.groups()))
    last = max(k for k, one in enumerate(instructions) if one.name == "EXIT")
    while len(instructions) > last + 1 and _is_padding(instructions, labels):
        instructions.pop()
    listing = Listing(len(instructions))
    stored = False
    for at, one in enumerate(instructions):
        stored |= one.name.startswith("STG")
        if one.name == "EXIT":
            # Before anything is stored, it is for threads that have nothing to do.
            if one.predicate is None or stored:
                listing.jumps.append(_jump(at, len(instructions), one.predicate))
        elif one.name.split(".")[0] == "BRA" and (to := _TARGET.search(one.operands)):
            _branch(instructions, listing, at, labels[to[1]])
    return instructions, listing


def _is_padding(instructions: list[Instruction], labels: dict[str, int]) -> bool:
    """Whether the last instruction does nothing, or branches to itself."""
    one = instructions[-1]
    to = _TARGET.search(one.operands)
    at = len(instructions) - 1
    return one.name == "NOP" or bool(to and labels[to[1]] == at)


def _branch(
    instructions: list[Instruction], listing: Listing, at: int, target: int
) -> None:
    """Back over the end of a kernel is no loop: what is rare is behind that."""
    one = instructions[at]
    predicate = one.predicate
    if not one.operands.startswith("`"):  # it is among the operands
        predicate = one.operands.split(",")[0]
    if target > at:
        listing.jumps.append(_jump(at, target, predicate))
        return
    between = instructions[target : at + 1]
    if any(x.name == "EXIT" and x.predicate is None for x in between):
        listing.jumps.append(Jump(at, None))
        return
    trips = None
    if predicate is not None:
        trips = _trips(instructions, target, at, predicate)
    listing.loops.append(Loop(target, at, trips))


def _jump(at: int, target: int, predicate: str | None) -> Jump:
    """Registers are used again: no two branches are known to share a predicate."""
    return Jump(at, target, predicate and f"{predicate} of {at}")


def _trips(
    instructions: list[Instruction], first: int, last: int, predicate: str
) -> int | None:
    """By running the counter of a loop; None where it is not a plain one."""
    name, again = re.escape(predicate.lstrip("!")), not predicate.startswith("!")
    for at in range(last - 1, first - 1, -1):
        one = instructions[at]
        copied = re.match(rf"{name}, PT, PT, PT, (UP\d), 0x80, 0x0", one.operands)
        if one.name.startswith("PLOP3") and copied:
            name = copied[1]
        tested = re.match(rf"{name}, U?PT, {_REGISTER}, {_NUMBER}, U?PT", one.operands)
        if one.name.startswith(("ISETP", "UISETP")) and tested:
            compare = _COMPARED.get(one.name.split(".")[1])
            start = _start(instructions[:first], tested[1])
            before = _added(instructions[first:at], tested[1])
            after = _added(instructions[at : last + 1], tested[1])
            if compare is None or start is None or before + after == 0:
                return None
            value = start
            for trip in range(1, _MOST_TRIPS):
                value += before
                if compare(value, _number(tested[2])) != again:
                    return trip
                value += after
            return None
    return None


def _start(instructions: list[Instruction], register: str) -> int | None:
    """The number in a register, from where it was last written."""
    for one in reversed(instructions):
        if not re.match(rf"{register}\b", one.operands):
            continue
        halves = re.fullmatch(r"\w+, -RZ, RZ, (\S+), (\S+)", one.operands.strip())
        if one.name.startswith("HFMA2") and halves:
            packed = struct.pack("<2e", float(halves[2]), float(halves[1]))
            return int.from_bytes(packed, "little")
        moved = re.fullmatch(
            rf"\w+, (?:RZ, RZ, )?(?:{_NUMBER}|S?U?RZ)", one.operands.strip()
        )
        known = ("MOV", "UMOV", "IMAD.MOV", "CS2R")
        if one.predicate is None and one.name.startswith(known) and moved:
            return _number(moved[1] or "RZ")
        return None
    return None


def _added(instructions: list[Instruction], register: str) -> int:
    """What a part of a loop adds to a register."""
    total = 0
    form = rf"{register}, (?:U?P\d, )?{register}(?:\.reuse)?, {_NUMBER}(?:, U?RZ)?"
    for one in instructions:
        if one.name.split(".")[0] in ("IADD3", "UIADD3", "VIADD", "IADD"):
            found = re.fullmatch(form, one.operands.strip())
            total += _number(found[1]) if found else 0
    return total


def _number(text: str) -> int:
    return 0 if text.endswith("RZ") else int(text, 16)


def _tool(name: str) -> str | None:
    """From the wheels, or the one that is installed."""
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec and spec.submodule_search_locations) or []:
        for path in sorted(Path(folder).glob(f"*/bin/{name}")):
            return str(path)
    return shutil.which(name)


def _run(name: str, *arguments: str) -> str:
    """What a program prints, on either stream."""
    done = subprocess.run(
        [_tool(name) or name, *arguments], capture_output=True, text=True, check=True
    )
    return done.stdout + done.stderr
