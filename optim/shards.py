"""Where the work on a tree happens: in the shards of its leaves, or on whole arrays.

Kernels cannot be partitioned automatically. Where it is known how leaves lie on a mesh
they run within `jax.shard_map`, each on its own shard, and nothing moves but the sums
of all leaves, in one reduction. Other leaves are left to XLA, as whole arrays.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from octavo import pallas_kernels as kernels
from octavo.pallas_kernels import Blocks, Leaf, Noise, Program, Scalars, Sum

from .placement import advice, aligned, origin, owned, padded_spec, shard, starts
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


def tree_sums(
    backend: str | None,
    jobs: Sequence[Job],
    scalars: Sequence[Scalars],
    wanted: Sequence[Sequence[Sum]],
) -> list[dict[Sum, jax.Array]]:
    """Sums over each layer of every leaf: for each of its sums, one value a layer."""
    shapes = [
        (len(w), j.plan.blocks.layer_count) for j, w in zip(jobs, wanted, strict=True)
    ]
    found = [jnp.zeros(shape) for shape in shapes]
    work = [k for k, job in enumerate(jobs) if wanted[k] and not job.idle]
    inside = [k for k in work if jobs[k].in_shards]
    for k in set(work) - set(inside):
        found[k] = _whole_sums(backend, jobs[k], scalars[k], wanted[k])

    def local(leaves: list[Leaf], scalars: list[Scalars]) -> jax.Array:
        parts = []
        for k, leaf, s in zip(inside, leaves, scalars, strict=True):
            job = jobs[k]
            args = (job.program, job.shard, leaf, s, wanted[k])
            sums = kernels.leaf_sums(_inside(backend, job), *args)
            parts.append(_in_whole(job, sums).reshape(-1))
        sharding = jobs[inside[0]].sharding
        assert sharding is not None
        return lax.psum(jnp.concatenate(parts), sharding.mesh.axis_names)

    if inside:
        chosen = [jobs[k] for k in inside]
        given = [scalars[k] for k in inside]
        specs = ([_leaf_spec(job) for job in chosen], [_scalar_spec(s) for s in given])
        vector = _sharded(chosen, local, specs, PartitionSpec())(
            [_resharded(job) for job in chosen], given
        )
        sizes = [math.prod(shapes[k]) for k in inside]
        ends = [sum(sizes[: n + 1]) for n in range(len(sizes))]
        for k, part in zip(inside, jnp.split(vector, ends[:-1]), strict=True):
            found[k] = part.reshape(shapes[k])
    return [dict(zip(w, x, strict=True)) for w, x in zip(wanted, found, strict=True)]


def tree_step(
    backend: str | None,
    jobs: Sequence[Job],
    scalars: Sequence[Scalars],
    keys: Sequence[jax.Array],
) -> list[Leaf]:
    """One step of every leaf."""
    results = [job.leaf._replace(g=_zeros_like(job.leaf.g)) for job in jobs]
    inside = [k for k, job in enumerate(jobs) if job.in_shards]
    for k, job in enumerate(jobs):
        if not job.idle and not job.in_shards:
            results[k] = _whole_step(backend, job, scalars[k], keys[k])

    def local(
        leaves: list[Leaf], scalars: list[Scalars], keys: list[jax.Array]
    ) -> list[Leaf]:
        stepped = []
        for k, leaf, s, key in zip(inside, leaves, scalars, keys, strict=True):
            job = jobs[k]
            assert job.sharding is not None
            if s.ratio is not None:
                s = s._replace(ratio=s.ratio.reshape(-1))
            noise = Noise(key, origin(job.shard, job.sharding))
            args = (job.program, job.shard, leaf, s, noise)
            stepped.append(kernels.leaf_step(_inside(backend, job), *args))
        return stepped

    if inside:
        chosen = [jobs[k] for k in inside]
        given = [_by_layer(jobs[k], scalars[k]) for k in inside]
        leaf_specs = [_leaf_spec(job) for job in chosen]
        scalar_specs = [_scalar_spec(s, j) for s, j in zip(given, chosen, strict=True)]
        written = [
            spec._replace(g=None) if job.program.in_place else spec._replace(p=None)
            for spec, job in zip(leaf_specs, chosen, strict=True)
        ]
        key_specs = [PartitionSpec() for _ in chosen]
        run = _sharded(chosen, local, (leaf_specs, scalar_specs, key_specs), written)
        leaves = [_resharded(job) for job in chosen]
        for k, out in zip(
            inside, run(leaves, given, [keys[k] for k in inside]), strict=True
        ):
            results[k] = out
    return results


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


def _sharded(
    jobs: Sequence[Job], local: Callable[..., Any], in_specs: Any, out_specs: Any
) -> Callable[..., Any]:
    assert jobs[0].sharding is not None
    mesh = jobs[0].sharding.mesh
    return jax.shard_map(
        local, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )


def _leaf_spec(job: Job) -> Any:
    """Each array of a leaf is cut as the parameter is."""
    assert job.sharding is not None
    spec = job.sharding.spec
    return jax.tree.map(lambda _: spec, job.leaf)


def _scalar_spec(scalars: Scalars, job: Job | None = None) -> Any:
    """Scalars are everywhere, but for a ratio of layers that are spread out."""
    specs = jax.tree.map(lambda _: PartitionSpec(), scalars)
    if scalars.ratio is None or job is None:
        return specs
    assert job.sharding is not None
    spec = padded_spec(job.sharding, len(job.plan.blocks.shape))
    layers = PartitionSpec(*(spec[k] for k in job.plan.blocks.layers))
    return specs._replace(ratio=layers)


def _by_layer(job: Job, scalars: Scalars) -> Scalars:
    """The ratio with one axis for each that stacks layers."""
    if scalars.ratio is None:
        return scalars
    blocks = job.plan.blocks
    shape = tuple(blocks.shape[k] for k in blocks.layers)
    return scalars._replace(ratio=scalars.ratio.reshape(shape))


def _in_whole(job: Job, sums: jax.Array) -> jax.Array:
    """Sums (sums, layers of this shard), among zeros for the other layers.

    And zeros on all but one of the devices that hold the same shard.
    """
    assert job.sharding is not None
    whole, part = job.plan.blocks, job.shard
    sums = jnp.where(owned(job.sharding), sums, 0.0)
    if whole.layer_count == part.layer_count:
        return sums
    first = starts(part, job.sharding)
    wide = jnp.zeros((len(sums), *(whole.shape[k] for k in whole.layers)))
    sums = sums.reshape(len(sums), *(part.shape[k] for k in part.layers))
    at = (jnp.int32(0), *(first[k] for k in whole.layers))
    return lax.dynamic_update_slice(wide, sums, at)


def _inside(backend: str | None, job: Job) -> str:
    return kernels.choose(job.program, local=True) if backend is None else backend


def _outside(backend: str | None, job: Job) -> str:
    """Whole arrays that are known to be cut are XLA's to partition."""
    if job.sharding is not None:
        return "xla"
    return kernels.choose(job.program, local=False) if backend is None else backend


def _is_explicit(job: Job) -> bool:
    if job.sharding is None:
        return False
    return any(t == AxisType.Explicit for t in job.sharding.mesh.axis_types)


def _resharded(job: Job) -> Leaf:
    """Under explicit axes, the leaf's arrays cut as `shard_map` is told they are."""
    if not _is_explicit(job):
        return job.leaf
    return jax.tree.map(lambda x: jax.sharding.reshard(x, job.sharding), job.leaf)


def _whole_sums(
    backend: str | None, job: Job, scalars: Scalars, sums: Sequence[Sum]
) -> jax.Array:
    chosen, blocks = _outside(backend, job), job.plan.blocks

    def run(leaf: Leaf, scalars: Scalars) -> jax.Array:
        return kernels.leaf_sums(chosen, job.program, blocks, leaf, scalars, sums)

    return _freely(job, run, lambda: _replicated(job))(job.leaf, scalars)


def _whole_step(
    backend: str | None, job: Job, scalars: Scalars, key: jax.Array
) -> Leaf:
    chosen, blocks = _outside(backend, job), job.plan.blocks

    def run(leaf: Leaf, scalars: Scalars, key: jax.Array) -> Leaf:
        noise = Noise(key, jnp.int32(0))
        return kernels.leaf_step(chosen, job.program, blocks, leaf, scalars, noise)

    return _freely(job, run, lambda: _written(job))(job.leaf, scalars, key)


def _freely(
    job: Job, function: Callable[..., Any], out: Callable[[], Any]
) -> Callable[..., Any]:
    """Let XLA partition the function, under explicit axes, too.

    An axis whose blocks straddle shards cannot be reshaped to blocks there.
    """
    if not _is_explicit(job):
        return function
    return jax.sharding.auto_axes(function, out_sharding=out())


def _written(job: Job) -> Leaf:
    """Under explicit axes, the shardings of what a step writes: those that it read."""

    def of(x: jax.Array) -> NamedSharding:
        sharding = jax.typeof(x).sharding
        return _replicated(job) if sharding.mesh.empty else sharding

    leaf = jax.tree.map(of, job.leaf)
    return leaf._replace(g=None) if job.program.in_place else leaf._replace(p=None)


def _replicated(job: Job) -> NamedSharding:
    assert job.sharding is not None
    return NamedSharding(job.sharding.mesh, PartitionSpec())


def _zeros_like(g: Any) -> Any:
    return g if g.dtype == jax.dtypes.float0 else jnp.zeros_like(g)
