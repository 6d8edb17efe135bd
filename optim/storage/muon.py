"""The state of an optimizer that steps matrices otherwise than all other leaves."""

from typing import NamedTuple

from .state import State


class MuonState(NamedTuple):
    """What `octavo.optim.muon` remembers: two states, as optax' partition has them.

    Each has `optax.MaskedNode` where a leaf belongs to the other.

    Attributes:
      muon: of the matrices, with the slot `mu`.
      adam: of everything else, with the slots `mu` and `nu`.
    """

    muon: State
    adam: State
