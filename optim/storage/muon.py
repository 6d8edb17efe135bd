"""The state of an optimizer that steps matrices otherwise than all other leaves."""

from typing import Any, NamedTuple

import jax
import optax

from .state import State
from .tree import Leaves


class MuonState(NamedTuple):
    """What `octavo.optim.muon` remembers: two states, as optax' partition has them.

    Each has `optax.MaskedNode` where a leaf belongs to the other.

    Attributes:
      muon: of the matrices, with the slot `mu`.
      adam: of everything else, with the slots `mu` and `nu`.
    """

    muon: State
    adam: State


def apart(state: MuonState, tree: Any) -> list[Any]:
    """A tree like the parameters, as each part has it.

    Raises:
      ValueError: where the trees of the state are others.
    """
    full = Leaves.of(tree)
    parts = [set(_paths(part)) for part in state]
    if parts[0] | parts[1] != set(full.paths):
        raise ValueError("the tree is not like that of the parameters of this state")
    pairs = list(zip(full.paths, full.leaves, strict=True))
    return [
        full.replaced([x if path in own else optax.MaskedNode() for path, x in pairs])
        for own in parts
    ]


def merged(muon: Any, adam: Any) -> Any:
    """The inverse of `apart`: all leaves that one of them has."""
    return jax.tree.map(
        lambda one, other: other if is_masked(one) else one,
        muon,
        adam,
        is_leaf=is_masked,
    )


def is_masked(x: Any) -> bool:
    """Whether a leaf is the other part's."""
    return isinstance(x, optax.MaskedNode)


def _paths(state: State) -> tuple[str, ...]:
    return state.codes(state.slots[0]).paths
