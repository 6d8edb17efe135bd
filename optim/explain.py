"""What a step does with each leaf, ahead of time: blocks, backend, and why."""

from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import PartitionSpec

from .sharding.placement import abstract, full, placements
from .stepping.tasks import Work, task_of
from .stepping.transformation import Transformation
from .storage.tree import Leaves


@dataclass(frozen=True)
class ExplanationRow:
    """What a step does with one leaf.

    Attributes:
      path: of the parameter.
      shape: its global shape.
      spec: how it is sharded; None where that is not known, or on one device.
      blocks: of its state.
      weights: how a parameter of 16 bits is rounded: the option `weights`; else "".
      backend: what runs its step: `"tpu"`, `"triton"`, `"mosaic_gpu"`, `"xla"`, or
        `"none"`.
      why: the reason, if it is no kernel, and what to do where something can be done.
      aligned: False where blocks cross shard boundaries, which costs communication.
    """

    path: str
    shape: tuple[int, ...]
    spec: PartitionSpec | None
    blocks: str
    weights: str
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

        short = any(row.weights for row in self.rows)  # else there is nothing to show
        columns = ("weights", "backend", "why") if short else ("backend", "why")
        table = Table("leaf", "shape", "spec", "blocks", *columns)
        for row in self.rows:
            shown = row.path or "(the parameters)"
            spec = "" if row.spec is None else str(tuple(row.spec))
            last = (getattr(row, name) for name in ("blocks", *columns))
            table.add_row(shown, str(row.shape), spec, *last)
        console = Console(width=140, color_system=None)
        with console.capture() as text:
            console.print(table)
        return text.get().rstrip()


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
        where = placements(optimizer.settings.sharding, tree)
    else:
        where = full(shardings, tree)
    shapes = jax.tree.map(abstract, params)
    records = optimizer.records(Leaves.of(shapes))
    dtypes = [(record.dtype,) for record in records]
    work = optimizer.work(tree, shapes, records, where, dtypes, in_place=True)
    return Explanation(tuple(_row(w, platform) for w in work))


def _row(work: Work, platform: str | None) -> ExplanationRow:
    storage = work.program.storage
    backend, why = "none", "integers and empty leaves are left alone"
    if storage.steps:
        task, why = task_of(work, platform)
        backend = task.backend
    size, axis = storage.blocks.size, storage.blocks.axis
    return ExplanationRow(
        work.path,
        storage.shape,
        None if work.sharding is None else work.sharding.spec,
        f"{size} along axis {axis}" if storage.quantized else "",
        storage.weights or "",
        backend,
        why,
        aligned=not work.crosses_shards,
    )
