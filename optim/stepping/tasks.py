"""One leaf's part in a pass over the parameters, and where it runs."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias

import jax
from jax.sharding import NamedSharding

from octavo.pallas_kernels import Choice, Program, Sum, choose

from ..checks import warn_once
from ..sharding.geometry import advice, aligned, shards
from ..sharding.hosting import Paging
from ..sharding.placement import platform_of
from .pages import first_chunk


class Work(NamedTuple):
    """What there is to do for one leaf, before it is decided where.

    Attributes:
      path: of the parameter.
      program: the step.
      sharding: of the state, and where it is stepped; None where it is not known, or is
        one device.
      home: the sharding of the parameter, where it is another one; else None.
      dtypes: of the gradient and the parameter.
      backend: the one that the user wants, or None.
      known: whether it is known where the leaf is, one device included.
      paging: whether its state is in host memory.
    """

    path: str
    program: Program
    sharding: NamedSharding | None
    home: NamedSharding | None
    dtypes: tuple[Any, ...]
    backend: str | None
    known: bool
    paging: Paging = Paging(None)

    @property
    def crosses_shards(self) -> bool:
        """Whether blocks cross the boundaries of known shards."""
        storage = self.program.storage
        if self.sharding is None or not storage.steps or not storage.quantized:
            return False
        return not aligned(storage.blocks, self.sharding)


@dataclass(frozen=True)
class Whole:
    """A leaf of unknown sharding, or on one device: its arrays are used as they are.

    Like `Sharded` it is static and hashable, and without the leaf's path: equal leaves
    have equal tasks.
    """

    program: Program
    backend: str
    page_bytes: int | None = None


@dataclass(frozen=True)
class Sharded:
    """A leaf of known sharding.

    Attributes:
      program: for the whole leaf.
      backend: of each shard.
      sharding: of the state.
      home: of the parameter, where it is another one; else None.
      in_shards: whether each device can work on its own shard. If not, XLA partitions
        the whole.
      page_bytes: where the state is in host memory, of a chunk of it; else None.
    """

    program: Program
    backend: str
    sharding: NamedSharding
    home: NamedSharding | None
    in_shards: bool
    page_bytes: int | None = None

    @property
    def shard(self) -> Program:
        """For one shard."""
        return self.program.shard(_parts(self.program, self.sharding))


Task: TypeAlias = Whole | Sharded


def tasks_of(
    work: Sequence[Work], sums: Sequence[tuple[Sum, ...]] | None = None
) -> list[Task | None]:
    """Where each leaf runs; None for leaves with nothing to do.

    Args:
      work: for each leaf.
      sums: what to measure of each; None: step them.
    """
    programs = [w.program for w in work]
    if sums is not None:
        rows = zip(programs, sums, strict=True)
        programs = [replace(program, sums=names) for program, names in rows]
    found: list[Task | None] = []
    for w, program in zip(work, programs, strict=True):
        if not program.storage.steps or (sums is not None and not program.sums):
            found.append(None)
            continue
        task, why = task_of(w._replace(program=program))
        if why == _UNKNOWN_SHARDING:
            warn_once(_REMEDY.format(devices=jax.device_count()))
        found.append(task)
    return found


def task_of(work: Work, platform: str | None = None) -> tuple[Task, str]:
    """Where a leaf runs, and why it is no kernel.

    Args:
      work: of the leaf.
      platform: of the device. Default None: that of the mesh, or of JAX' devices. Where
        it is given and the sharding is not known, there is one device.

    Raises:
      ValueError: if the backend that the user wants refuses it.
    """
    program, sharding = work.program, work.sharding
    if sharding is None:
        choice = _choose(work, program, platform or platform_of(None))
        several = platform is None and jax.device_count() > 1 and not work.known
        if several and work.backend is None and choice.backend != "xla":
            choice = Choice("xla", _UNKNOWN_SHARDING)
        return Whole(program, choice.backend, _page_bytes(work)), choice.why
    if work.crosses_shards:
        why = advice(work.path, program.storage, sharding)
        return Sharded(program, "xla", sharding, work.home, in_shards=False), why
    if not program.storage.elementwise:
        why = "slots of another shape than the parameter's need the whole leaf"
        return Sharded(program, "xla", sharding, work.home, in_shards=False), why
    shard = program.shard(_parts(program, sharding))
    choice = _choose(work, shard, platform or platform_of(sharding))
    where = (sharding, work.home, True, _page_bytes(work))
    return Sharded(program, choice.backend, *where), choice.why


def _page_bytes(work: Work) -> int | None:
    """None, too, for a pass that does not read the state."""
    return work.paging.page_bytes if work.program.reads_state else None


def _choose(work: Work, program: Program, platform: str) -> Choice:
    page_bytes = _page_bytes(work)
    if page_bytes is not None:
        program = first_chunk(program, work.dtypes, page_bytes)
    try:
        return choose(program, work.dtypes, platform, work.backend)
    except ValueError as error:
        raise ValueError(
            f"{work.path!r}: {error}. Leave backend out for the best one that takes "
            "each leaf, or give a function of the path"
        ) from None


def _parts(program: Program, sharding: NamedSharding) -> tuple[int, ...]:
    return shards(sharding, len(program.storage.shape))


_UNKNOWN_SHARDING = (
    "it is not known how it is sharded: write tx = tx.bind(params), or use a mesh with "
    "explicit axes; where it is on one device, pass backend="
)
_REMEDY = (
    "{devices} devices, and it is not known how parameters are sharded over them: "
    "Octavo leaves the step to XLA, which can partition it, instead of its fused "
    "kernel. Write tx = tx.bind(params) once parameters are on their devices (a model "
    "of nnx is fine, too), or use a mesh with explicit axes. Where the optimizer is "
    "made inside of something else, pass sharding=. Where each array is on one device, "
    "pass backend=, such as backend='triton' on a GPU."
)


def warn_of_crossing(work: Sequence[Work]) -> None:
    """Warn, once, of leaves whose blocks cross shard boundaries, and say what fits."""
    lines = [
        advice(w.path, w.program.storage, w.sharding)
        for w in work
        if w.sharding is not None and w.crosses_shards
    ]
    if lines:
        warn_once(
            "blocks that cross shard boundaries cost communication in every step; "
            "octavo.optim.explain shows all leaves:\n  " + "\n  ".join(lines)
        )
