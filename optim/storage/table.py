"""A state says how it is stored: a tag, and a small table under it.

`State.extra["format"]` has one key, the tag, which names each slot and its format, and
what is kept of parameters: `mu=ratio8,nu=bits8,weights=remainder8`. Its value has one
row for each leaf, in the order of the tree: the type of the parameter where moments
take it over or something is kept of it (else float32), plus 256 for each byte that is
kept; its shape, the block size and the blocked axis (-1: none); and for each slot the
number of its format, what optax keeps of it (its index in `_IN_OPTAX`), the bits of its
initial value, the number of the slot that it is relative to (-1: none), and its shape
where that is not the parameter's. Conversions and checkpoints read it, so that they
need not know how a state, maybe deep in a chain of transformations, was made.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from octavo.pallas_kernels import (
    Blocks,
    InOptax,
    Slot,
    Storage,
    StoredSlot,
    keeping,
    numbered,
)

from ..options import Settings
from ..values import formats_of
from .plan import has_own_moments, moment_dtype
from .state import State, states_in

_BY_PATH, _WEIGHTS = "by_path", "weights"
# Never reorder.
_DTYPES = (
    *("float32", "bfloat16", "float16", "float64", "complex64", "complex128"),
    *("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("bool", "int4", "uint4", "int2", "uint2"),
)
_KEPT = 256  # in the first column, for each byte of a remainder
_IN_OPTAX: tuple[InOptax, ...] = ("same", "negated", "root")


def tag_of(settings: Settings, slots: tuple[Slot, ...]) -> str:
    """The tag of the states that an optimizer makes."""
    names = [slot.name for slot in slots]
    if settings.state_by_leaf(slots):
        formats = [_BY_PATH] * len(names)
    else:
        formats = [f.name for f in formats_of(settings.state, slots)]
    pairs = list(zip(names, formats, strict=True))
    if settings.keeps_remainders:
        by_path = settings.rounds_by_leaf
        pairs.append((_WEIGHTS, _BY_PATH if by_path else str(settings.weights)))
    return ",".join(f"{name}={form}" for name, form in pairs)


def slots_in(tag: str) -> tuple[str, ...]:
    """The names of the slots in a tag."""
    names = (part.partition("=")[0] for part in tag.split(",") if part)
    return tuple(name for name in names if name != _WEIGHTS)


def table_of(records: Sequence[Storage], slots: int) -> jax.Array:
    """The table, int32, one row for each leaf; one of -1 if there is none."""
    ranks = [len(shape) for r in records for shape in (r.shape, *_own_shapes(r))]
    rank = max(ranks, default=0)
    rows = [_row(record, rank) for record in records]
    # Orbax saves no array of size 0.
    width = 4 + rank + slots * (5 + rank)
    return jnp.asarray(np.array(rows or [(-1,) * width], np.int64).astype(np.int32))


def _own_shapes(record: Storage) -> list[tuple[int, ...]]:
    return [slot.shape for slot in record.slots if slot.shape is not None]


def _row(record: Storage, rank: int) -> list[int]:
    def listed(shape: tuple[int, ...] | None) -> list[int]:
        own = () if shape is None else shape
        count = -1 if shape is None else len(own)
        return [count, *own, *(0,) * (rank - len(own))]

    axis = record.blocks.axis
    named = has_own_moments(record.dtype) or record.has_remainder
    dtype = record.dtype.name if named else "float32"
    kept = record.remainder.dtype.itemsize if record.has_remainder else 0
    row = [_DTYPES.index(dtype) + _KEPT * kept, *listed(record.shape)]
    row += [record.blocks.size, -1 if axis is None else axis]
    for slot in record.slots:
        initial = int(np.float32(slot.initial or 0.0).view(np.int32))
        other = -1 if slot.reference is None else slot.reference
        row += [slot.format.number, _IN_OPTAX.index(slot.in_optax), initial, other]
        row += listed(slot.shape)
    return row


def records_of(state: State, table: Any = None) -> dict[str, Storage]:
    """How each leaf of a state is stored, by its path.

    Args:
      state: arrays or their shapes.
      table: its table, concrete; None: the state's own.

    Raises:
      ValueError: if the table does not say.
    """
    ((tag, own),) = state.extra["format"].items()
    if state.count.ndim:
        raise ValueError(
            "a stack of states: give one, such as jax.tree.map(lambda x: x[0], states)"
        )
    first = state.codes(state.slots[0]) if state.slots else state.remainders
    if first is None:
        return read_table(own if table is None else table, {}, tag)
    shapes = dict(zip(first.paths, map(jnp.shape, first.leaves), strict=True))
    return read_table(own if table is None else table, shapes, tag)


def tables_of(tx: Any, params: Any) -> list[Any]:
    """The table of each state that a transformation would make, concrete.

    XLA leaves out whatever else `init` makes.
    """
    shapes = [(jnp.shape(p), jnp.result_type(p)) for p in jax.tree.leaves(params)]

    def made() -> list[Any]:
        zeros = [jnp.zeros(shape, dtype) for shape, dtype in shapes]
        state = tx.init(jax.tree.unflatten(jax.tree.structure(params), zeros))
        return [own_table(state) for state in states_in(state)]

    return jax.jit(made)()


def own_table(state: State) -> Any:
    """The table in a state."""
    (table,) = state.extra["format"].values()
    return table


def read_table(
    table: Any, shapes: Mapping[str, tuple[int, ...]], tag: str
) -> dict[str, Storage]:
    """How leaves are stored, from a table; see `records_of`.

    Args:
      table: the table.
      shapes: by the path of each leaf, that of the first array of its state. It alone
        says whether that is folded.
      tag: of the state.
    """
    rows, slots = np.asarray(table), slots_in(tag)
    rank = (rows.shape[1] - 4 - 5 * len(slots)) // (1 + len(slots))
    found = {}
    for (path, shape), row in zip(shapes.items(), rows, strict=False):
        try:
            record = _record(iter(row.tolist()), rank, slots)
            own = record.elementwise and len(shape) > len(record.shape)
            found[path] = replace(record, folded=own)
        except (KeyError, IndexError):
            raise ValueError(
                f"{path!r}: the state does not say how it is stored ({tag}, row "
                f"{row.tolist()}): it was written by a newer version, or zeroed; then "
                'take extra["format"] from a fresh tx.init(params)'
            ) from None
    return found


def _record(row: Iterator[int], rank: int, slots: Sequence[str]) -> Storage:
    def shape() -> tuple[int, ...] | None:
        count, *lengths = (next(row) for _ in range(rank + 1))
        return None if count < 0 else tuple(lengths[:count])

    kept, dtype = divmod(next(row), _KEPT)
    dtype = jnp.dtype(_DTYPES[dtype])
    whole, size, axis = shape(), next(row), next(row)
    if whole is None or size == 0:
        raise KeyError(row)
    stored = []
    for name in slots:
        form, in_optax = numbered(next(row)), _IN_OPTAX[next(row)]
        initial = float(np.int32(next(row)).view(np.float32))
        other = next(row)
        reference = None if other < 0 else other
        of = moment_dtype(form, dtype)
        stored.append(StoredSlot(name, form, of, initial, shape(), in_optax, reference))
    blocks = Blocks(whole, None if axis < 0 else axis, size)
    weights = keeping(kept) if kept else None
    return Storage(dtype, blocks, tuple(stored), weights)
