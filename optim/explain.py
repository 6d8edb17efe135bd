"""What a step does with each leaf, ahead of time: blocks, backend, and why."""

from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import PartitionSpec

from .sharding.finer import with_states
from .sharding.placement import abstract, full
from .stepping.tasks import Work, task_of
from .stepping.transformation import Transformation
from .storage.memory import DEVICE, HOST
from .storage.tree import Leaves


@dataclass(frozen=True)
class ExplanationRow:
    """What a step does with one leaf.

    Attributes:
      path: of the parameter.
      shape: its global shape.
      spec: how it is sharded; None where that is not known, or on one device.
      state_spec: how its state is sharded.
      blocks: of its state.
      weights: how a parameter of 16 bits is rounded: the option `weights`; else "".
      memory: where its state is: `"device"`, or `"pinned_host"` (see docs/paged.md).
      backend: what runs its step: `"tpu"`, `"triton"`, `"mosaic_gpu"`, `"xla"`, or
        `"none"`.
      why: the reason, if it is no kernel, or if the state of a leaf stays on the device
        although `paged` was asked for, or what `paged="auto"` chose; and what to do
        where something can be done.
      aligned: False where blocks cross shard boundaries, which costs communication.
    """

    path: str
    shape: tuple[int, ...]
    spec: PartitionSpec | None
    state_spec: PartitionSpec | None
    blocks: str
    weights: str
    memory: str
    backend: str
    why: str
    aligned: bool


@dataclass(frozen=True)
class Explanation:
    """What a step does with each leaf; `print` it for a table."""

    rows: tuple[ExplanationRow, ...]

    def __str__(self) -> str:
        from rich.console import Console
        from rich.table import Table

        # Where nothing is to be shown, there is no column.
        finer = any(row.spec != row.state_spec for row in self.rows)
        short = any(row.weights for row in self.rows)
        paged = any(row.memory != DEVICE for row in self.rows)
        columns = ["spec", *["state_spec"] * finer, "blocks", *["weights"] * short]
        columns += [*["memory"] * paged, "backend", "why"]
        titles = (name.replace("state_spec", "spec of state") for name in columns)
        table = Table("leaf", "shape", *titles)
        for row in self.rows:
            shown = row.path or "(the parameters)"
            cells = (_shown(getattr(row, name)) for name in columns)
            table.add_row(shown, str(row.shape), *cells)
        console = Console(width=140, color_system=None)
        with console.capture() as text:
            console.print(table)
        return text.get().rstrip()


def _shown(value: str | PartitionSpec | None) -> str:
    if isinstance(value, str):
        return value
    return "" if value is None else str(tuple(value))


def explain(
    tx: Transformation, params: Any, shardings: Any = None, platform: str | None = None
) -> Explanation:
    """Which backend takes each leaf, and why.

    From shapes alone: nothing is computed, compiled or allocated.

    Args:
      tx: an Octavo optimizer.
      params: tree of arrays or of `jax.ShapeDtypeStruct`.
      shardings: of the parameters: tree of `NamedSharding` like them, or a prefix of
        one. Default None: what a step would know of them: the option `sharding`, or the
        types of the arrays.
      platform: `"tpu"`, `"gpu"` or `"cpu"`: then of one device, if the sharding is not
        known. Default None: that of the mesh, or of JAX' devices.

    Raises:
      TypeError: if tx is not an Octavo optimizer itself.
      ValueError: where shardings do not fit the parameters, or a backend that was named
        refuses a leaf.

    >>> import jax
    >>> from octavo import optim
    >>> params = {"w": jax.ShapeDtypeStruct((4096, 512), "float32")}
    >>> row = optim.explain(optim.adamw(1e-3), params, platform="tpu").rows[0]
    >>> row.blocks, row.backend
    ('32 along axis 0', 'tpu')
    """
    if not isinstance(tx, Transformation):
        raise TypeError("explain takes an Octavo optimizer itself, no chain or wrapper")
    optimizer = tx.optimizer
    tree = Leaves.of(params)
    if shardings is None:
        where = optimizer.places(tree)
    else:
        given = full(shardings, tree)
        where = with_states(given, optimizer.settings.state_sharding, tree)
    shapes = jax.tree.map(abstract, params)
    records = optimizer.records(Leaves.of(shapes))
    dtypes = [(record.dtype,) for record in records]
    work = optimizer.work(tree, shapes, records, where, dtypes, True, platform)
    return Explanation(tuple(_row(w, platform) for w in work))


def _row(work: Work, platform: str | None) -> ExplanationRow:
    storage = work.program.storage
    backend, why = "none", "integers and empty leaves are left alone"
    if storage.steps:
        task, why = task_of(work, platform)
        backend = task.backend
    size, axis = storage.blocks.size, storage.blocks.axis
    spec = None if work.sharding is None else work.sharding.spec
    return ExplanationRow(
        work.path,
        storage.shape,
        spec if work.home is None else work.home.spec,
        spec,
        f"{size} along axis {axis}" if storage.quantized else "",
        storage.weights or "",
        HOST if work.paging.hosted else DEVICE,
        backend,
        "; ".join(x for x in (why, work.paging.why) if x),
        aligned=not work.crosses_shards,
    )
