"""Machines whose compilers need no device, and how fast their memory is.

No JAX here: the compilers' options have to be set before it is imported.
"""

import importlib.util
from typing import NamedTuple

from _sass import missing_tool


class Machine(NamedTuple):
    """A device for `_topologies.devices_of`, and what its memory allows.

    Attributes:
      topology: as `devices_of` takes it.
      unit: what is counted, and for how many values.
      values: that `unit` is for.
      allowed: how many of them take as long as the memory needs to move 16.25 bytes for
        each value, as 8-bit AdamW does with float32. From the vendors' figures.
    """

    topology: str
    unit: str
    values: int
    allowed: float


_BUNDLES = ("bundles for 1,024 values", 1024)
MACHINES: dict[str, Machine] = {
    "v5e": Machine("v5e:2x2", *_BUNDLES, 30),
    "v5p": Machine("v5p:2x2x1", *_BUNDLES, 21),
    "v6e": Machine("v6e:2x2", *_BUNDLES, 17.5),
    "tpu7x": Machine("tpu7x:2x2x1", *_BUNDLES, 10),
    "sm_90": Machine("h200:1x1", "instructions for a value", 1, 112),
}
_BYTES = 16.25


def allowed(machine: str, moved: float) -> float:
    """What may be counted while the memory moves so many bytes for each value."""
    return MACHINES[machine].allowed * moved / _BYTES


def missing(machine: str) -> str | None:
    """What has to be installed to count for a machine, if it is not here."""
    if machine != "sm_90":
        found = importlib.util.find_spec("libtpu")
        return None if found else "libtpu (extra 'aot', Linux x86-64 only)"
    if not (
        importlib.util.find_spec("jax_plugins")
        and importlib.util.find_spec("jax_plugins.xla_cuda13")
    ):
        return "the CUDA plugin (extra 'aot', Linux x86-64 only)"
    tool = missing_tool()
    return tool and f"{tool} (extra 'aot', Linux x86-64 only)"
