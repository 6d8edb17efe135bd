"""All leaves are decoded, or encoded: on each device its own shards of them."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from octavo.pallas_kernels import Noise, Program

from ..sharding.geometry import (
    aligned,
    fitting,
    is_explicit,
    origin,
    resharded,
    shards,
)
from .coding import Moments, Stored, decoded, encoded

# Leaves in one shard_map: as in octavo.optim.stepping.execute.
_AT_ONCE = 64


class Task(NamedTuple):
    """What is static of a leaf.

    Args:
      program: its storage record, and the rule that is given its moments.
      sharding: of the parameter; None where it is not known, or is one device.
    """

    program: Program
    sharding: NamedSharding | None

    @property
    def in_shards(self) -> bool:
        """Whether each device can work on its own shard."""
        storage = self.program.storage
        if self.sharding is None:
            return False
        return 0 not in storage.shape and aligned(storage.blocks, self.sharding)

    @property
    def known(self) -> NamedSharding:
        """Its sharding, where that is known."""
        assert self.sharding is not None
        return self.sharding

    @property
    def shard(self) -> Program:
        """For one shard."""
        parts = shards(self.known, len(self.program.storage.shape))
        return self.program.shard(parts)


def decode(tasks: Sequence[Task], leaves: Sequence[Stored]) -> list[Moments]:
    """The moments of each leaf."""
    return _pass(decoded, tuple(tasks), (0,) * len(tasks), list(leaves), None)


def encode(
    tasks: Sequence[Task],
    ids: Sequence[int],
    leaves: Sequence[Stored],
    moments: Sequence[Moments],
    step: jax.Array | None,
) -> list[Stored]:
    """What stands for the moments of each leaf.

    Args:
      tasks: of each leaf.
      ids: number of each leaf, for random numbers.
      leaves: what was stored before: a block whose moments are not finite keeps it.
      moments: to store.
      step: key of the step; None: round to the nearest.
    """
    pairs = list(zip(leaves, moments, strict=True))
    return _pass(encoded, tuple(tasks), tuple(ids), pairs, step)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _pass(
    function: Callable[[Program, Any, Noise | None], Any],
    tasks: tuple[Task, ...],
    ids: tuple[int, ...],
    operands: list[Any],
    step: jax.Array | None,
) -> list[Any]:
    """A function of each leaf. Compiled, also outside of jit."""

    def noise(k: int, start: jax.Array) -> Noise | None:
        return None if step is None else Noise(step, np.int32(ids[k]), start)

    found: list[Any] = [None] * len(tasks)
    inside = [k for k, task in enumerate(tasks) if task.in_shards]
    for k, task in enumerate(tasks):
        if not task.in_shards:
            run = functools.partial(function, task.program)
            found[k] = _whole(task, run, operands[k], noise(k, jnp.int32(0)))
    for some in (inside[k : k + _AT_ONCE] for k in range(0, len(inside), _AT_ONCE)):
        chosen = tuple(tasks[k] for k in some)
        results = _in_shards(
            function,
            chosen,
            [ids[k] for k in some],
            [operands[k] for k in some],
            step,
        )
        for k, result in zip(some, results, strict=True):
            found[k] = result
    return found


def _in_shards(
    function: Callable[[Program, Any, Noise | None], Any],
    tasks: tuple[Task, ...],
    ids: Sequence[int],
    operands: list[Any],
    step: jax.Array | None,
) -> list[Any]:
    """Of leaves on one mesh, each device on its own shards: nothing moves."""

    def on_one_device(operands: list[Any], step: jax.Array | None) -> list[Any]:
        found = []
        for task, own, given in zip(tasks, ids, operands, strict=True):
            part = task.shard
            start = origin(part.storage.blocks, task.known)
            noise = None if step is None else Noise(step, np.int32(own), start)
            found.append(function(part, given, noise))
        return found

    specs = [task.known.spec for task in tasks]
    mapped = jax.shard_map(
        on_one_device,
        mesh=tasks[0].known.mesh,
        in_specs=(specs, PartitionSpec()),
        out_specs=specs,
        check_vma=False,
    )
    rows = zip(tasks, operands, strict=True)
    return mapped([resharded(given, task.known) for task, given in rows], step)


def _whole(task: Task, run: Any, given: Any, noise: Noise | None) -> Any:
    """Of a leaf of unknown sharding, or whose blocks cross shards: XLA partitions."""
    if task.sharding is None:
        return run(given, noise)

    def placed(x: Any) -> NamedSharding:
        return fitting(task.known, x.shape)

    # As if it were on one device: blocks that cross shards have no explicit type.
    plain = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (given, noise)
    )
    shapes = jax.eval_shape(run, *plain)
    if is_explicit(task.known):
        out = jax.tree.map(placed, shapes)
        free: Any = jax.sharding.auto_axes(run, out_sharding=out)
        return free(given, noise)
    found = run(given, noise)
    if AxisType.Explicit in task.known.mesh.axis_types:
        return found
    return jax.tree.map(lambda x: lax.with_sharding_constraint(x, placed(x)), found)
