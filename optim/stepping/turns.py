"""Paged leaves one after the other, so that few chunks are on the device at once."""

from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
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
    ready = [_first_chunk(noises[k].step) for k in order[:1] * 2]
    for turn, k in enumerate(order):
        leaf = leaves[k]
        if turn > 1:
            before = order[turn - 2]
            found[before], leaf = after(found[before], leaf)
        paged: Any = (tasks[k].backend, parts[k], tasks[k].page_bytes)
        given = (leaf, scalars[k], noises[k], ready[turn])
        found[k], done = run_paged(*paged, *given)
        ready.append(done)
    return found


def _first_chunk(step: jax.Array) -> jax.Array:
    """Number of the first chunk: zero, and on TPUs in such a way that XLA cannot know.

    It takes barriers out before it decides on the order of things, and unrolls short
    loops: without any that it cannot count, it would begin to fetch all leaves at once,
    and keep the last chunk of each until the end. GPUs run loops one after another, and
    wait for the host in each turn of those that they cannot count.
    """

    def unknown(x: jax.Array) -> jax.Array:
        return x * (x + 1) & 1  # of two numbers in a row, one is even

    return lax.platform_dependent(step, tpu=unknown, default=lambda _: jnp.int32(0))


def after(found: Any, arrays: _T) -> tuple[Any, _T]:
    """Results, and arrays that are not read before those are written.

    Else XLA fetches the first chunks of all leaves at the start, and writes the last
    ones at the end: docs/decisions.md, "Paged state". Outside of jit steps are taken as
    they come.
    """
    if not all(is_traced(x) for x in jax.tree.leaves(arrays)):
        return found, arrays
    return lax.optimization_barrier((found, arrays))
