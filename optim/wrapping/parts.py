"""How the moments of each part of another transformation's state are stored."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from octavo.pallas_kernels import Float32, Program, Slot, Storage, leaf_number

from ..options import Settings
from ..storage.plan import moment_dtype, plan, quantizes
from ..storage.state import fields_of
from ..storage.table import tag_of
from ..storage.tree import Kind, Leaves, per_leaf
from .coding import storing
from .passes import Task
from .roles import Moment

_FORMAT = Kind(
    lambda x: isinstance(x, str), "a format; for a format of one moment write slots="
)


class Part(NamedTuple):
    """The moments of one part of a state, for some parameters.

    Args:
      slots: what they are.
      fields: of the Octavo state that they are stored in.
      tag: its format tag.
      trees: the moments as the other transformation has them, by slot; maybe shapes.
      records: how each leaf is stored.
    """

    slots: tuple[Slot, ...]
    fields: tuple[str, ...]
    tag: str
    trees: dict[str, Leaves]
    records: list[Storage]

    @property
    def paths(self) -> tuple[str, ...]:
        """Of its leaves: in all slots the same."""
        return self.trees[self.slots[0].name].paths


class Row(NamedTuple):
    """A leaf of a part.

    Args:
      key: of the part.
      leaf: its number.
      like: the numbers of the slots that have the parameter's shape.
      task: what there is to do for these.
      number: stands for the leaf in random numbers.
    """

    key: str
    leaf: int
    like: tuple[int, ...]
    task: Task
    number: int


def part_of(
    key: str,
    found: Sequence[Moment],
    state: Any,
    settings: Settings,
    tree: Leaves,
    moments: Mapping[str, Any],
) -> Part:
    """A part of a state.

    Args:
      key: of the part, for errors.
      found: what its moments are.
      state: the option of that name.
      settings: the other options.
      tree: the parameters.
      moments: trees of arrays or shapes, by slot.

    Raises:
      ValueError: where a moment is not a tree like the parameters.
    """
    slots = tuple(moment.slot for moment in found)
    trees = {slot.name: Leaves.of(moments[slot.name]) for slot in slots}
    settings = _with_formats(settings, state, found, tree)
    alone = tuple(slot._replace(relative_to=None) for slot in slots)
    related, unrelated = (
        dict(zip(tree.paths, plan(settings, some, tree), strict=True))
        for some in (slots, alone)
    )
    paths = trees[slots[0].name].paths
    for name, of in trees.items():
        unknown = [path for path in of.paths if path not in related]
        if unknown or of.paths != paths:
            raise ValueError(_OTHER_TREE.format(name=name, key=key))
    records = []
    for i, path in enumerate(paths):
        shapes = [jnp.shape(trees[slot.name].leaves[i]) for slot in slots]
        fits = all(shape == related[path].shape for shape in shapes)
        other = unrelated[path]
        record = related[path] if fits else _with_shapes(other, shapes)
        records.append(replace(record, weights=None))  # it steps no parameters
    fields = fields_of([slot.name for slot in slots], quantizes(settings, slots))
    return Part(slots, fields, tag_of(settings, slots), trees, records)


def _with_formats(
    settings: Settings, state: Any, found: Sequence[Moment], tree: Leaves
) -> Settings:
    """With a format for each slot of a part."""

    def each(form: str) -> dict[str, str]:
        return {moment.slot.name: moment.form or form for moment in found}

    if isinstance(state, str):
        return replace(settings, state=each(state))
    formats = per_leaf("state", state, tree, _FORMAT) if tree.leaves else []
    by_path = dict(zip(tree.paths, formats, strict=True))
    return replace(settings, state=lambda path: each(by_path[path]))


def _with_shapes(record: Storage, shapes: Sequence[tuple[int, ...]]) -> Storage:
    """A record of which some slots have another shape than the parameter."""
    wide = moment_dtype(Float32(), record.dtype)
    slots = tuple(
        slot
        if shape == record.shape
        else replace(slot, format=Float32(), dtype=wide, shape=shape)
        for slot, shape in zip(record.slots, shapes, strict=True)
    )
    return replace(record, slots=slots)


def like_parameter(record: Storage) -> tuple[int, ...]:
    """The numbers of the slots that have the parameter's shape."""
    return tuple(k for k, slot in enumerate(record.slots) if slot.shape is None)


def rows_of(parts: Mapping[str, Part], where: Mapping[str, Any]) -> list[Row]:
    """All leaves of all parts that have something to decode.

    Args:
      parts: of the state.
      where: the sharding of each parameter, or None, by its path.
    """
    rows = []
    for key, part in parts.items():
        for i, (path, record) in enumerate(zip(part.paths, part.records, strict=True)):
            like = like_parameter(record)
            if like:
                task = Task(_program(part.slots, record, like), where[path])
                number = int(np.int32(leaf_number(f"{key}/{path}")))
                rows.append(Row(key, i, like, task, number))
    return rows


def _program(slots: Sequence[Slot], record: Storage, like: tuple[int, ...]) -> Program:
    """What stores the slots of a leaf that have the parameter's shape."""
    own = []
    for k in like:
        relative = record.slots[k].reference is not None
        own.append(slots[k] if relative else slots[k]._replace(relative_to=None))
    kept = replace(record, slots=tuple(record.slots[k] for k in like))
    return Program(storing(tuple(own)), kept, in_place=False)


_OTHER_TREE = (
    "{name!r} of {key!r} is not a tree like the parameters: write "
    "slots={{{name!r}: 'kept'}} to leave it as it is"
)
