"""Paged leaves one after the other, so that few chunks are on the device at once."""

from collections.abc import Sequence
from typing import Any, TypeVar

import jax
from jax import lax

from octavo.pallas_kernels import Leaf, Noise, Program, Scalars

from ..checks import is_traced
from .pages import run_paged
from .tasks import Task

_T = TypeVar("_T")


def run_in_turn(
    tasks: Sequence[Task],
    parts: Sequence[Program],
    leaves: Sequence[Leaf],
    scalars: Sequence[Scalars],
    noises: Sequence[Noise],
) -> dict[int, Any]:
    """One pass over the paged ones of whole leaves, or of one shard of each.

    Two are in flight: the first chunk of a leaf is on its way while the last one of the
    leaf before is stepped.
    """
    found: dict[int, Any] = {}
    order = [k for k, task in enumerate(tasks) if task.page_bytes is not None]
    for turn, k in enumerate(order):
        leaf = leaves[k]
        if turn > 1:
            before = order[turn - 2]
            found[before], leaf = after(found[before], leaf)
        paged: Any = (tasks[k].backend, parts[k], tasks[k].page_bytes)
        found[k] = run_paged(*paged, leaf, scalars[k], noises[k])
    return found


def after(found: Any, arrays: _T) -> tuple[Any, _T]:
    """Results, and arrays that are not read before those are written.

    Else XLA fetches the first chunks of all leaves at the start, and writes the last
    ones at the end: docs/decisions.md, "Paged state". Outside of jit steps are taken as
    they come.
    """
    if not all(is_traced(x) for x in jax.tree.leaves(arrays)):
        return found, arrays
    return lax.optimization_barrier((found, arrays))
