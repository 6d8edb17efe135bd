"""Which parameters of a `state_dict` are which leaves of a state."""

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from octavo.pallas_kernels import StoredSlot

from ..stepping.optimizer import Optimizer
from ..stepping.transformation import Transformation
from ..storage.state import State
from ..storage.table import records_of
from .kinds import Kind
from .state_dict import Saved

Name: TypeAlias = int | str
Move: TypeAlias = Callable[..., Any]
Source: TypeAlias = Name | tuple[Name | Sequence[Name], Move] | None
NameMap: TypeAlias = Mapping[str, Source] | Callable[[str], Source]
_ROOT = "root of "


class Leaf(NamedTuple):
    """A leaf of a state: what it keeps, from the names of `Kind` to its slots."""

    path: str
    shape: tuple[int, ...]
    slots: Mapping[str, str]


class Match(NamedTuple):
    """What a leaf is made of.

    Attributes:
      leaf: of the state.
      saved: parameters of torch, and what wrote their moments.
      move: from their arrays to the leaf's; None: there is one, and it is equal.
    """

    leaf: Leaf
    saved: tuple[tuple[Saved, Kind], ...]
    move: Move | None

    def moments(self) -> dict[str, np.ndarray]:
        """The moments of the leaf, by slot.

        Raises:
          ValueError: if the function returns another shape.
        """
        parts = [saved.decoded(kind) for saved, kind in self.saved]
        found = {}
        for kept, slot in self.leaf.slots.items():
            arrays = [part[kept] for part in parts]
            x = np.asarray(arrays[0] if self.move is None else self.move(*arrays))
            if x.shape != self.leaf.shape:
                raise ValueError(
                    f"{self.leaf.path!r} has shape {self.leaf.shape}, but its function "
                    f"in name_map made {x.shape} of {[a.shape for a in arrays]}"
                )
            found[slot] = np.square(x) if kept.startswith(_ROOT) else x
        return found


def leaves_of(state: State, tx: Any) -> list[Leaf]:
    """The leaves of a state that have moments."""
    own = tx.optimizer if isinstance(tx, Transformation) else None
    adapts = isinstance(own, Optimizer) and own.rule.scales == "gradient"
    return [
        Leaf(path, record.shape, {_kept(x, adapts): x.name for x in record.slots})
        for path, record in records_of(state).items()
        if record.steps
    ]


def _kept(slot: StoredSlot, adapts: bool) -> str:
    """What is kept in a slot, as `Kind` names it."""
    if slot.in_optax == "root":
        return f"{_ROOT}{slot.name}"
    if slot.in_optax == "negated":
        return f"{slot.name} times the learning rate"
    return f"{slot.name} times the ratio" if adapts else slot.name


def matched(
    saved: Sequence[Saved], leaves: Sequence[Leaf], name_map: NameMap | None
) -> dict[str, Match]:
    """For the path of each leaf that does not start anew, what it is made of.

    Raises:
      ValueError: if one of them does not fit, or something saved is left over.
    """
    known: dict[Name, Saved] = {s.key: s for s in saved} | {s.name: s for s in saved}
    given: NameMap = {} if name_map is None else name_map
    paths = [leaf.path for leaf in leaves]
    for path in () if callable(given) else given:
        if path not in paths:
            near = difflib.get_close_matches(path, paths, 1) or paths[:3]
            raise ValueError(f"name_map has {path!r}, but leaves are such as {near}")
    found = {}
    for leaf in leaves:
        own = leaf.path.replace("/", ".")
        source = given(leaf.path) if callable(given) else given.get(leaf.path, own)
        if source is not None:
            found[leaf.path] = _match(leaf, source, known)
    used = {s.name for match in found.values() for s, _ in match.saved}
    unused = [s for s in saved if s.moments and s.name not in used]
    if unused:
        raise ValueError(
            f"{len(unused)} parameters of the state_dict belong to no leaf, such as "
            f"{unused[0]}: say in name_map where they belong, or delete them from it"
        )
    return found


def _match(leaf: Leaf, source: Any, known: dict[Name, Saved]) -> Match:
    """What one leaf is made of."""
    whole, move = source if isinstance(source, tuple) else (source, None)
    found = []
    for name in [whole] if isinstance(whole, int | str) else whole:
        if name not in known:
            raise ValueError(_unknown(leaf.path, name, known))
        if not known[name].moments:
            raise ValueError(
                f"{leaf.path!r}: {known[name]} has no moments, as if it never had a "
                "gradient: map the leaf to None, to start it anew"
            )
        found.append(known[name])
    if move is None and found[0].shape != leaf.shape:
        turned = found[0].shape[::-1] == leaf.shape
        how = "np.transpose" if turned else "function of the array"
        raise ValueError(
            f"{leaf.path!r} has shape {leaf.shape}, but {found[0]} {found[0].shape}: "
            f"write name_map={{{leaf.path!r}: ({whole!r}, {how})}}, if that is the leaf"
        )
    return Match(leaf, tuple((s, _kind(leaf, s)) for s in found), move)


def _unknown(path: str, name: Any, known: dict[Name, Saved]) -> str:
    """Of a name that the state_dict does not have."""
    texts = [str(x) for x in known]
    near = difflib.get_close_matches(str(name), texts, 1) or texts[:3]
    return (
        f"{path!r}: the state_dict has no parameter {name!r}, but {', '.join(near)}: "
        f"say which the leaf is, name_map={{{path!r}: name or number}}, or give names="
    )


def _kind(leaf: Leaf, saved: Saved) -> Kind:
    """What wrote saved moments, if they are those of a leaf."""
    for kind in saved.kinds:
        if set(kind.moments) == set(leaf.slots):
            return kind
    kind, hint = saved.kinds[0], "make tx the same optimizer"
    if any(" times " in kept for kept in leaf.slots):
        hint = (
            "for RMSprop write learning_rate_first=False; LARS of bitsandbytes is "
            "optim.preset('lars-bitsandbytes', ...)"
        )
    raise ValueError(
        f"{leaf.path!r}: {saved} is of {kind.writer} and has "
        f"{', '.join(kind.moments)}, but tx keeps {', '.join(leaf.slots)}: {hint}"
    )


def steps_of(matches: Sequence[Match]) -> int:
    """The steps that all saved parameters have taken.

    Raises:
      ValueError: if there is no such number.
    """
    steps = {saved.step: saved for match in matches for saved, _ in match.saved}
    counts = [step for step in steps if step is not None]
    if len(steps) == 1 and counts:
        return counts[0]
    found = ", ".join(f"{step} of {saved}" for step, saved in list(steps.items())[:2])
    raise ValueError(
        f"steps taken: {found or 'not saved'}; Octavo counts them once for all leaves: "
        "say how many, count="
    )
