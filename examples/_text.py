"""Text that every machine with Python has: the source of its standard library."""

import re
import sys
import sysconfig
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

# Tests, tables, what depends on the build and what some distributions leave out.
SKIPPED = (
    "test|tests|idle_test|encodings|pydoc_data|config-.*|_sysconfigdata.*|"
    "idlelib|lib2to3|distutils|ensurepip|tkinter|turtledemo|"
    "site-packages|dist-packages"
)
HELD_OUT = 256  # windows


@dataclass(frozen=True)
class Text:
    """Bytes to train on, and windows of bytes from files that training never sees."""

    train: np.ndarray
    held_out: np.ndarray
    unigram_entropy: float


def read_text(length: int) -> Text:
    """The standard library's source, split by file into training and held-out text."""
    root = Path(sysconfig.get_paths()["stdlib"])
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for path in source_files(root):
        name = path.relative_to(root).as_posix()
        is_held_out = zlib.crc32(name.encode()) % 10 == 0
        parts[is_held_out].append(path.read_bytes())
    train, held_out = (np.frombuffer(b"\n".join(part), np.uint8) for part in parts)
    if min(train.size, held_out.size) <= length:
        sys.exit(f"{root} holds too little source: this Python comes without it")
    p = np.bincount(train) / train.size
    entropy = -np.sum(p[p > 0] * np.log(p[p > 0]))
    starts = np.linspace(0, held_out.size - length - 1, HELD_OUT).astype(int)
    return Text(train, windows(held_out, starts, length), float(entropy))


def source_files(folder: Path) -> Iterator[Path]:
    """Python files in an order that is the same everywhere."""
    for path in sorted(folder.iterdir()):
        if re.fullmatch(SKIPPED, path.stem):
            continue
        if path.is_dir():
            yield from source_files(path)
        elif path.suffix == ".py":
            yield path


def windows(text: np.ndarray, starts: np.ndarray, length: int) -> np.ndarray:
    """One row of `length` inputs and the byte that follows them for each start."""
    return text[starts[:, None] + np.arange(length + 1)].astype(np.int32)


def batch_of(text: Text, seed: int, step: int, size: int, length: int) -> np.ndarray:
    """A function of seed and step alone, so that a resumed run goes on the same."""
    rng = np.random.default_rng((seed, step))
    starts = rng.integers(text.train.size - length, size=size)
    return windows(text.train, starts, length)
