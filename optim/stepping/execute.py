"""One pass over leaves: it steps them, or measures them, wherever each runs.

Kernels cannot be partitioned automatically. Where it is known how leaves are sharded
over a mesh they run within `jax.shard_map`, each on its own shard, and nothing moves
but the sums of all leaves, in one reduction. Where it is not, XLA partitions the step.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from octavo.pallas_kernels import Leaf, Noise, Program, Scalars, run, run_all

from ..sharding.geometry import (
    fitting,
    is_explicit,
    of_state,
    origin,
    owned,
    resharded,
    starts,
)
from ..sharding.placement import constrained
from .tasks import Sharded, Task, Whole
from .turns import after, run_in_turn

# For each leaf, the structure of its operands and their places in a list.
_Layout: TypeAlias = tuple[tuple[Any, tuple[int, ...]], ...]


def run_tasks(
    tasks: Sequence[Task | None],
    leaves: Sequence[Leaf],
    scalars: Sequence[Scalars],
    step: jax.Array,
    ids: Sequence[int],
) -> list[Any]:
    """One pass over each leaf that has a task.

    Args:
      tasks: for each leaf.
      leaves: their arrays.
      scalars: their operands.
      step: key of the step, for random numbers.
      ids: number of each leaf, likewise.

    Returns:
      For each leaf what its program makes of it: a Leaf, or sums of shape (sums,
      layers). None where there is no task.
    """
    leaves = [_from_home(*pair) for pair in zip(tasks, leaves, strict=True)]
    found: list[Any] = [None] * len(tasks)
    whole = [k for k, task in enumerate(tasks) if isinstance(task, Whole)]
    inside = []
    for k, task in enumerate(tasks):
        if isinstance(task, Sharded) and task.in_shards:
            inside.append(k)
        elif isinstance(task, Sharded):
            args = (leaves[k], scalars[k], Noise(step, np.int32(ids[k]), jnp.int32(0)))
            found[k] = _at_home(task, _partitioned(task, *args))
    if whole:
        # On several devices these arrays may be anywhere.
        local = jax.device_count() == 1
        noises = [Noise(step, np.int32(i), jnp.int32(0)) for i in _some(ids, whole)]
        own: list[Any] = _some(tasks, whole)
        parts = [task.program for task in own]
        given = (_some(leaves, whole), _some(scalars, whole), noises)
        results = _run_parts(own, parts, *given, together=local)
        for k, result in zip(whole, results, strict=True):
            found[k] = result
    for some in _regions(tasks, inside):
        operands, layout = _shared(_some(scalars, some))
        statics = (tuple(_some(tasks, some)), tuple(_some(ids, some)), layout)
        given = _some(leaves, some)
        if any(task is not None and task.page_bytes is not None for task in tasks):
            found, given = after(found, given)
        results = _in_shards(*statics, given, operands, step)
        for k, result in zip(some, results, strict=True):
            found[k] = _at_home(tasks[k], result)
    return found


def _run_parts(
    tasks: Sequence[Task],
    parts: Sequence[Program],
    leaves: Sequence[Leaf],
    scalars: Sequence[Scalars],
    noises: Sequence[Noise],
    *,
    together: bool,
) -> list[Any]:
    """One pass over whole leaves, or one shard of each; chunk by chunk where paged."""
    found: list[Any] = [None] * len(tasks)
    here = [k for k, task in enumerate(tasks) if task.page_bytes is None]
    programs = [(tasks[k].backend, parts[k]) for k in here]
    columns = (_some(column, here) for column in (leaves, scalars, noises))
    results = run_all(programs, *columns, together=together)
    for k, result in zip(here, results, strict=True):
        found[k] = result
    paged = run_in_turn(tasks, parts, leaves, scalars, noises)
    for k, result in paged.items():
        found[k] = result
    return found


def _from_home(task: Any, leaf: Leaf) -> Leaf:
    """Where states are in smaller shards, XLA would take parameters there for good."""
    home = task.home if isinstance(task, Sharded) else None
    if home is None or leaf.p is None or is_explicit(home):
        return leaf
    return leaf._replace(p=lax.with_sharding_constraint(leaf.p, home))


def _at_home(task: Any, found: Any) -> Any:
    """The parameter, or its update, sharded as it came: gathered from all shards."""
    if task.home is None or task.program.sums:
        return found
    name = "p" if task.program.in_place else "g"
    x = getattr(found, name)
    return found._replace(**{name: constrained(x, task.home)})


def _regions(tasks: Sequence[Any], inside: Sequence[int]) -> list[Sequence[int]]:
    """Which leaves share a `shard_map`: all those that are summed, in one reduction.

    Steps go by 64. XLA's propagation of shardings takes longer than in proportion to
    what is in a region: 226 leaves compile for v6e:16x16 in 9.3 s, in one 12.0.
    """
    if not inside or tasks[inside[0]].program.sums:
        return [inside] if inside else []
    return [inside[k : k + 64] for k in range(0, len(inside), 64)]


def _some(items: Sequence[Any], indices: Sequence[int]) -> list[Any]:
    return [items[k] for k in indices]


# ---------------------------------------------------------------------- in shards


def _shared(scalars: Sequence[Scalars]) -> tuple[list[jax.Array], _Layout]:
    """The operands of several leaves, each array once, and which leaf has which."""
    places: dict[int, int] = {}
    arrays, layout = [], []
    for s in scalars:
        flat, treedef = jax.tree.flatten(s)
        for x in flat:
            if places.setdefault(id(x), len(arrays)) == len(arrays):
                arrays.append(x)
        layout.append((treedef, tuple(places[id(x)] for x in flat)))
    return arrays, tuple(layout)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _in_shards(
    tasks: tuple[Sharded, ...],
    ids: tuple[int, ...],
    layout: _Layout,
    leaves: list[Leaf],
    operands: list[jax.Array],
    step: jax.Array,
) -> list[Any]:
    """Passes over leaves on one mesh, each device on its own shards.

    Compiled, also outside of jit, where `shard_map` would run each operation on each
    device in turn; with static arguments that compare by value, once.
    """
    sums = bool(tasks[0].program.sums)
    everywhere = PartitionSpec()
    specs = [_specs(task, leaf) for task, leaf in zip(tasks, leaves, strict=True)]
    written = [
        task.program.written(spec) for task, spec in zip(tasks, specs, strict=True)
    ]
    mapped = jax.shard_map(
        functools.partial(_on_one_device, tasks, ids, layout),
        mesh=tasks[0].sharding.mesh,
        in_specs=(specs, everywhere, everywhere),
        out_specs=everywhere if sums else written,
        # A kernel's results have no type that says over which axes they vary:
        # docs/decisions.md, "All leaves in one shard_map".
        check_vma=False,
    )
    placed = [
        resharded(leaf, task.sharding, len(task.program.storage.shape))
        for task, leaf in zip(tasks, leaves, strict=True)
    ]
    found = mapped(placed, operands, step)
    if not sums:
        return found
    shapes = [(len(t.program.sums), _layers(t.program)) for t in tasks]
    ends = np.cumsum([math.prod(shape) for shape in shapes])[:-1]
    parts = zip(jnp.split(found, ends), shapes, strict=True)
    return [part.reshape(shape) for part, shape in parts]


def _on_one_device(
    tasks: tuple[Sharded, ...],
    ids: tuple[int, ...],
    layout: _Layout,
    leaves: list[Leaf],
    operands: list[jax.Array],
    step: jax.Array,
) -> Any:
    """Within shard_map: the same passes over this device's shards."""
    scalars = [d.unflatten([operands[i] for i in at]) for d, at in layout]
    shards = [task.shard for task in tasks]
    each = list(zip(tasks, shards, strict=True))
    # Once for all equal leaves: else it is most of what XLA has to compile.
    places = {t: (part.storage.blocks, t.sharding) for t, part in each}
    origins = {place: origin(*place) for place in places.values()}
    noises = [
        Noise(step, np.int32(i), origins[places[task]])
        for task, i in zip(tasks, ids, strict=True)
    ]
    own = [_of_shard(*x) for x in zip(tasks, shards, scalars, strict=True)]
    parts = [part for _, part in each]
    found = _run_parts(tasks, parts, leaves, own, noises, together=True)
    if not tasks[0].program.sums:
        return found
    rows = zip(tasks, shards, found, strict=True)
    vector = jnp.concatenate([_in_whole(*row).reshape(-1) for row in rows])
    return lax.psum(vector, tasks[0].sharding.mesh.axis_names)


def _layers(program: Any) -> int:
    return program.storage.blocks.layer_count


def _specs(task: Sharded, leaf: Leaf) -> Any:
    """Each array of a leaf is sharded like the parameter."""
    rank = len(task.program.storage.shape)
    return jax.tree.map(lambda x: of_state(task.sharding, x.shape, rank).spec, leaf)


def _of_shard(task: Sharded, part: Program, scalars: Scalars) -> Scalars:
    """With the ratios of only those layers that are in this shard.

    Taken here: XLA would take a sharded operand as a reason to shard the sums, too.
    """
    whole, own = task.program.storage.blocks, part.storage.blocks
    if scalars.ratio is None or whole.layer_count == own.layer_count:
        return scalars
    first = starts(own, task.sharding)
    layers = scalars.ratio.reshape([whole.shape[k] for k in whole.layers])
    ratio = lax.dynamic_slice(
        layers, [first[k] for k in whole.layers], [own.shape[k] for k in whole.layers]
    )
    return scalars._replace(ratio=ratio.reshape(-1))


def _in_whole(task: Sharded, part: Program, sums: jax.Array) -> jax.Array:
    """Sums (sums, layers of this shard), among zeros for the other layers.

    And zeros on all but one of the devices that hold the same shard.
    """
    whole, own = task.program.storage.blocks, part.storage.blocks
    sums = jnp.where(owned(task.sharding), sums, 0.0)
    if whole.layer_count == own.layer_count:
        return sums
    first = starts(own, task.sharding)
    wide = jnp.zeros((len(sums), *(whole.shape[k] for k in whole.layers)))
    sums = sums.reshape(len(sums), *(own.shape[k] for k in own.layers))
    at = (jnp.int32(0), *(first[k] for k in whole.layers))
    return lax.dynamic_update_slice(wide, sums, at)


# ------------------------------------------------------------- partitioned by XLA


@functools.partial(jax.jit, static_argnums=0)
def _partitioned(task: Sharded, leaf: Leaf, scalars: Scalars, noise: Noise) -> Any:
    """A pass over a leaf that XLA partitions, with explicit axes, too."""

    def function(leaf: Leaf, scalars: Scalars, noise: Noise) -> Any:
        return run(task.backend, task.program, leaf, scalars, noise)

    if is_explicit(task.sharding):
        # An axis whose blocks cross shards has no type once it is reshaped to blocks:
        # docs/decisions.md, "Blocks that cross shard boundaries".
        out = _replicated(task) if task.program.sums else _as_read(task, leaf)
        freely: Any = jax.sharding.auto_axes(function, out_sharding=out)
        return freely(leaf, scalars, noise)
    found = function(leaf, scalars, noise)
    if AxisType.Explicit in task.sharding.mesh.axis_types:
        return found
    # XLA would leave a leaf on every device, once it is gathered.
    return jax.tree.map(
        lambda x: lax.with_sharding_constraint(
            x,
            _replicated(task) if task.program.sums else fitting(task.sharding, x.shape),
        ),
        found,
    )


def _as_read(task: Sharded, leaf: Leaf) -> Leaf:
    """Under explicit axes, the shardings of what a step writes: those that it read."""

    def of(x: jax.Array) -> NamedSharding:
        sharding = jax.typeof(x).sharding
        return _replicated(task) if sharding.mesh.empty else sharding

    return task.program.written(jax.tree.map(of, leaf))


def _replicated(task: Sharded) -> NamedSharding:
    return NamedSharding(task.sharding.mesh, PartitionSpec())
