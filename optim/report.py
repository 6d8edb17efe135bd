"""How much memory an optimizer's state takes, from shapes alone."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import optax
from rich.console import Console
from rich.table import Table

from .state import State, scale_name
from .tree import Leaves


@dataclass(frozen=True)
class MemoryRow:
    """Leaves whose paths differ only in numbers, of one shape and format.

    Attributes:
      pattern: their path, with `*` for numbers.
      shape: of each leaf.
      count: number of leaves.
      formats: of the slots, joined by `/`.
      bytes: of their state, all leaves together.
      bytes_32bit: what it would be with 4 bytes for each moment.
    """

    pattern: str
    shape: tuple[int, ...]
    count: int
    formats: str
    bytes: int
    bytes_32bit: int

    @property
    def parameters(self) -> int:
        """Values in these leaves."""
        return self.count * math.prod(self.shape)


@dataclass(frozen=True)
class MemoryReport:
    """The state's bytes, by groups of leaves; `print` it for a table.

    Attributes:
      rows: groups of leaves, in the order of the tree.
      other_bytes: state that belongs to no leaf of an Octavo optimizer: counters, and
        the state of other transformations in a chain.
    """

    rows: tuple[MemoryRow, ...]
    other_bytes: int

    @property
    def bytes(self) -> int:
        """Of the whole state."""
        return sum(row.bytes for row in self.rows) + self.other_bytes

    @property
    def bytes_32bit(self) -> int:
        """Of the whole state, with 4 bytes for each moment."""
        return sum(row.bytes_32bit for row in self.rows) + self.other_bytes

    @property
    def parameters(self) -> int:
        """Values in all leaves."""
        return sum(row.parameters for row in self.rows)

    def __str__(self) -> str:
        table = Table("leaves", "shape", "format", "parameters", "state", "in 32 bits")
        for column in table.columns[3:]:
            column.justify = "right"
        for row in self.rows:
            name = row.pattern or "(the parameters)"
            times = f"{row.count} x " if row.count > 1 else ""
            table.add_row(
                name,
                times + str(row.shape),
                row.formats,
                f"{row.parameters:,}",
                shown_size(row.bytes),
                shown_size(row.bytes_32bit),
            )
        table.add_section()
        if self.other_bytes:
            other = shown_size(self.other_bytes)
            table.add_row("counters and others", "", "", "", other, other)
        per_parameter = self.bytes / max(self.parameters, 1)
        table.add_row(
            "total",
            "",
            f"{per_parameter:.3f} bytes per parameter",
            f"{self.parameters:,}",
            shown_size(self.bytes),
            shown_size(self.bytes_32bit),
        )
        console = Console(width=110, color_system=None)
        with console.capture() as text:
            console.print(table)
        return text.get().rstrip()


def memory_report(tx: optax.GradientTransformation, params: Any) -> MemoryReport:
    """How much memory the state of `tx` takes for these parameters.

    Nothing is computed and nothing allocated: parameters may be
    `jax.ShapeDtypeStruct`s, as from `jax.eval_shape(model.init, ...)`, of a model that
    fits no machine at hand.

    Args:
      tx: an Octavo optimizer, or any optax transformation that contains some.
      params: tree of arrays or of `jax.ShapeDtypeStruct`.

    Returns:
      The report: rows as data, a table as text.

    >>> import jax
    >>> from octavo import optim
    >>> shapes = {"kernel": jax.ShapeDtypeStruct((8192, 28672), "bfloat16")}
    >>> report = optim.memory_report(optim.adamw(1e-3), shapes)
    >>> print(f"{report.bytes / report.parameters:.3f}")
    2.125
    """
    state = jax.eval_shape(tx.init, params)
    nodes = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, State))
    states = [x for x in nodes if isinstance(x, State)]
    groups: dict[tuple[str, tuple[int, ...], str], list[tuple[int, int]]] = {}
    for pattern, shape, formats, size in (leaf for s in states for leaf in _leaves(s)):
        groups.setdefault((pattern, shape, formats), []).append(size)
    rows = tuple(
        MemoryRow(
            pattern,
            shape,
            len(sizes),
            formats,
            sum(stored for stored, _ in sizes),
            sum(full for _, full in sizes),
        )
        for (pattern, shape, formats), sizes in groups.items()
    )
    whole = sum(_nbytes(x) for x in jax.tree.leaves(state))
    return MemoryReport(rows, whole - sum(row.bytes for row in rows))


def _leaves(
    state: State,
) -> Iterator[tuple[str, tuple[int, ...], str, tuple[int, int]]]:
    """Pattern, shape, formats, and (bytes, bytes in 32 bits) of each leaf."""
    (tag,) = state.extra["format"]
    names = dict(part.split("_", 1) for part in tag.split("-"))
    trees = {slot: Leaves.of(tree) for slot, tree in state.moments.items()}
    scales = {
        slot: Leaves.of(state.scales[scale_name(slot)]).leaves
        for slot in trees
        if scale_name(slot) in state.scales
    }
    for i, path in enumerate(next(iter(trees.values())).paths):
        codes = {slot: tree.leaves[i] for slot, tree in trees.items()}
        stored = sum(_nbytes(x) for x in codes.values())
        stored += sum(_nbytes(tree[i]) for tree in scales.values())
        formats = [_format_name(x.dtype, names[slot]) for slot, x in codes.items()]
        shape = next(iter(codes.values())).shape
        full = 4 * math.prod(shape) * len(codes)
        pattern = re.sub(r"\d+", "*", path)
        unique = list(dict.fromkeys(formats))
        yield pattern, shape, "/".join(unique), (stored, full)


def _format_name(dtype: Any, quantized: str) -> str:
    names = {"float32": "32bit", "bfloat16": "bf16"}
    if dtype == "int8":
        return "int8" if quantized == "by_path" else quantized
    return names.get(str(dtype), str(dtype))


def _nbytes(x: Any) -> int:
    return math.prod(x.shape) * x.dtype.itemsize


def shown_size(n: int) -> str:
    """Bytes in the largest unit that they fill."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if n >= scale:
            return f"{n / scale:,.2f} {unit}"
    return f"{n} B"
