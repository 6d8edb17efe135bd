"""Checkpoints that say what they hold: written and restored through Orbax.

The state of an Octavo optimizer is a tree of plain arrays, which Orbax saves and
restores without this module. It adds what Orbax does not do: a description of how
moments are stored, checks before anything is loaded, checksums, conversions between
formats and meshes, and partial restores.
"""

from .description import CheckpointError as CheckpointError
from .description import DamagedCheckpointError as DamagedCheckpointError
from .restoring import restore as restore
from .saving import save as save
