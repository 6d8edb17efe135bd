"""The state of an optimizer: a named tuple of trees of plain arrays.

Codes have the parameter's own shape and scales its rank, so that whatever shards,
partitions, maps or stores parameters does the same to the state without knowing
Octavo: optax, Flax linen and nnx, Orbax, regular expressions on paths.
"""

from typing import Any, NamedTuple

import jax


class State(NamedTuple):
    """What an Octavo optimizer remembers.

    A state of zeros is a fresh one. Bytes per parameter of 8-bit Adam with blocks of
    32: 2 for the codes and 2 * 2 / 32 for the scales, 2.125 together.

    Attributes:
      count: int32, shape (): steps taken.
      moments: slot name (`mu`, `nu`) to a tree like the parameters: codes of p.shape
        (int8), or the moments themselves where a leaf is not quantized.
      scales: `mu_scale`, `nu_scale`, likewise: bf16, p.shape with the blocked axis
        shortened to one per block. Leaves that are not quantized have (unused) entries,
        too; slots that never are have no tree.
      extra: `format` holds one key, which names the formats of the slots, so that a
        state written with another code book has another structure and cannot be
        loaded by mistake; below it, for conversions, an int32 array tells how each
        leaf is stored (see `octavo.optim.stored`). No step reads it. Options add
        `skipped` (int32, steps not taken), `clip_history` (float32, (leaves, 100):
        squared norms) and `norms` (see `octavo.optim.last_norms`).
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    moments: dict[str, Any]
    scales: dict[str, Any]
    extra: dict[str, Any]


def scale_name(slot: str) -> str:
    """Key of a slot's scales."""
    return f"{slot}_scale"
