"""The state of an optax transformation whose moments are stored as Octavo's are."""

from typing import Any, NamedTuple

from .state import State


class QuantizedState(NamedTuple):
    """What `octavo.optim.quantized` keeps of another transformation's state.

    Attributes:
      moments: Octavo's own state for each part of it that has moments, by the path of
        that part: `"0"` in a chain, `"inner_state/0"`; `"state"` for the whole.
      rest: everything else as it is, in dicts named as the other state's fields are.
    """

    moments: dict[str, State]
    rest: Any


_WHOLE = "state"
_UNNAMED = "moment"  # an element of a tuple: fields of a state need names


def part_key(part: tuple[str, ...]) -> str:
    """The key in `moments` of a part of the other state."""
    return "/".join(part) or _WHOLE


def slot_name(name: str) -> str:
    """The slot of a field of the other state."""
    return name if name.isidentifier() else _UNNAMED + name


def inner_path(key: str, slot: str, leaf: str) -> str:
    """Where the other state has a moment of a leaf: `0/mu/encoder/kernel`."""
    numbered = slot.removeprefix(_UNNAMED)
    field = numbered if numbered.isdigit() or not numbered else slot
    parts = ("" if key == _WHOLE else key, field, leaf)
    return "/".join(part for part in parts if part)
