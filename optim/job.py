"""One leaf's part in a step."""

import warnings
from collections.abc import Sequence
from typing import NamedTuple

from jax.sharding import AxisType, NamedSharding

from octavo.pallas_kernels import Blocks, Leaf, Program

from .placement import advice, aligned, shard
from .settings import LeafPlan


class Job(NamedTuple):
    """One leaf: how it is stored, what to do, its arrays, and where they lie.

    `sharding` is None where that is not known.
    """

    plan: LeafPlan
    program: Program
    leaf: Leaf
    sharding: NamedSharding | None

    @property
    def idle(self) -> bool:
        """Integers and empty leaves, which no step changes."""
        return not self.plan.updated or 0 in self.plan.blocks.shape

    @property
    def straddles(self) -> bool:
        """Whether blocks lie across the borders of known shards."""
        known = self.sharding is not None and not self.idle
        if not known or not self.program.quantized:
            return False
        assert self.sharding is not None
        return not aligned(self.plan.blocks, self.sharding)

    @property
    def in_shards(self) -> bool:
        """Whether each device can work on its own shard."""
        return self.sharding is not None and not self.idle and not self.straddles

    @property
    def shard(self) -> Blocks:
        """The blocks of one shard."""
        assert self.sharding is not None
        return shard(self.plan.blocks, self.sharding)

    @property
    def explicit(self) -> bool:
        """Whether the types of its arrays say how they are cut."""
        if self.sharding is None:
            return False
        return all(t == AxisType.Explicit for t in self.sharding.mesh.axis_types)


_told: set[str] = set()


def tell_straddling(jobs: Sequence[Job]) -> None:
    """Warn, once, of leaves whose blocks straddle shards, and say what fits."""
    lines = [
        advice(job.plan.path, job.plan.blocks, job.sharding)
        for job in jobs
        if job.sharding is not None and job.straddles
    ]
    message = (
        "blocks that straddle shards cost communication in every step; "
        "octavo.optim.check_sharding shows all leaves:\n  " + "\n  ".join(lines)
    )
    if lines and message not in _told:
        _told.add(message)
        warnings.warn(message, stacklevel=2)
