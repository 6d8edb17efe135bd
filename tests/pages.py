"""The fenced blocks of a page."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class Block(NamedTuple):
    """A fenced block: its language, the number of its first line, and its lines."""

    language: str
    line: int
    lines: list[str]


def blocks(path: Path) -> Iterator[Block]:
    """The fenced blocks of a file, without the indent of a list that they are in."""
    opened: Block | None = None
    indent = 0
    for number, line in enumerate(path.read_text().splitlines(), 1):
        fence = re.match(r"( *)```(\w*)$", line)
        if fence is None:
            if opened is not None:
                opened.lines.append(line[indent:])
        elif opened is None:
            opened, indent = Block(fence[2], number + 1, []), len(fence[1])
        else:
            yield opened
            opened = None
    assert opened is None, f"{path}: the block at line {opened.line} is never closed"
