"""How much memory an optimizer's state takes, from shapes alone."""

import math
import re
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from octavo.pallas_kernels import Storage, StoredSlot, nbytes

from .sharding.states import made
from .storage.memory import shown_size
from .storage.state import REMAINDER, State, scale_name, states_in
from .storage.table import records_of, tables_of
from .storage.tree import Leaves


@dataclass(frozen=True)
class MemoryRow:
    """Leaves whose paths differ only in numbers, of one shape and format.

    Attributes:
      pattern: their path, with `*` for numbers.
      shape: of each leaf.
      count: number of leaves.
      formats: of the slots, and of the remainder if there is one, joined by `/`.
      bytes: of their state, all leaves together.
      bytes_32bit: what it would be with 4 bytes for each moment, and no remainder.
      host_bytes: of `bytes`, those in host memory (see docs/paged.md).
    """

    pattern: str
    shape: tuple[int, ...]
    count: int
    formats: str
    bytes: int
    bytes_32bit: int
    host_bytes: int = 0

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
      parameters: values in all leaves, with state or without.
    """

    rows: tuple[MemoryRow, ...]
    other_bytes: int
    parameters: int

    @property
    def bytes(self) -> int:
        """Of the whole state."""
        return sum(row.bytes for row in self.rows) + self.other_bytes

    @property
    def bytes_32bit(self) -> int:
        """Of the whole state, with 4 bytes for each moment."""
        return sum(row.bytes_32bit for row in self.rows) + self.other_bytes

    @property
    def host_bytes(self) -> int:
        """Of the state, those in host memory."""
        return sum(row.host_bytes for row in self.rows)

    @property
    def device_bytes(self) -> int:
        """Of the state, those on devices."""
        return self.bytes - self.host_bytes

    def __str__(self) -> str:
        from rich.console import Console
        from rich.table import Table

        paged = ["on the host"] * bool(self.host_bytes)
        names = ("leaves", "shape", "format", "parameters", "state", *paged)
        table = Table(*names, "in 32 bits")
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
                *([shown_size(row.host_bytes)] * len(paged)),
                shown_size(row.bytes_32bit),
            )
        table.add_section()
        if self.other_bytes:
            other = shown_size(self.other_bytes)
            none = [shown_size(0)] * len(paged)
            table.add_row("counters and others", "", "", "", other, *none, other)
        per_parameter = self.bytes / max(self.parameters, 1)
        table.add_row(
            "total",
            "",
            f"{per_parameter:.3f} bytes per parameter",
            f"{self.parameters:,}",
            shown_size(self.bytes),
            *([shown_size(self.host_bytes)] * len(paged)),
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
    state, spaces = made(tx, params)
    groups: dict[tuple[str, tuple[int, ...], str], list[tuple[int, int, int]]] = {}
    each = (states_in(state), states_in(spaces), tables_of(tx, params))
    for one, where, table in zip(*each, strict=True):
        for path, record in records_of(one, table).items():
            pattern = re.sub(r"\d+", "*", path)
            formats = dict.fromkeys(_shown(slot) for slot in record.slots)
            if record.has_remainder:
                formats[str(record.weights)] = None
            key = pattern, record.shape, "/".join(formats)
            groups.setdefault(key, []).append(_sizes(one, where, path, record))
    rows = tuple(
        MemoryRow(
            pattern,
            shape,
            len(sizes),
            formats,
            *(sum(column) for column in zip(*sizes, strict=True)),
        )
        for (pattern, shape, formats), sizes in groups.items()
    )
    whole = sum(nbytes(x) for x in jax.tree.leaves(state))
    values = sum(math.prod(jnp.shape(p)) for p in jax.tree.leaves(params))
    return MemoryReport(rows, whole - sum(row.bytes for row in rows), values)


def _shown(slot: StoredSlot) -> str:
    """The format of a slot, or the type of what is wider."""
    own = slot.dtype == np.dtype(slot.format.dtype)
    return slot.format.name if own else slot.dtype.name


def _sizes(
    state: State, spaces: State, path: str, record: Storage
) -> tuple[int, int, int]:
    """Bytes of a leaf's state, what they would be in 32 bits, those on the host."""
    arrays, full = {}, 0
    for k, slot in enumerate(record.slots):
        arrays[slot.name] = record.codes(k)
        full += 4 * math.prod(record.shape if slot.shape is None else slot.shape)
        if scale_name(slot.name) in state._fields:
            arrays[scale_name(slot.name)] = record.scales(k)
    if state.remainders is not None:
        arrays[REMAINDER] = record.remainder
    host = 0
    for field, x in arrays.items():
        tree = Leaves.of(getattr(spaces, field))
        if tree.leaves[tree.paths.index(path)] == jax.memory.Space.Host:
            host += nbytes(x)
    return sum(nbytes(x) for x in arrays.values()), full, host
