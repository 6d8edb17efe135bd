"""Work in the shards of leaves.

Kernels cannot be partitioned automatically. Where it is known how leaves lie on a mesh
they run within `jax.shard_map`, each on its own shard, and nothing moves but the sums
of all leaves, in one reduction.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from octavo import pallas_kernels as kernels
from octavo.pallas_kernels import Leaf, Noise, Scalars, Sum

from .checks import is_traced
from .job import Job
from .placement import origin, owned, starts


def shard_sums(
    backend: str | None,
    jobs: Sequence[Job],
    scalars: Sequence[Scalars],
    wanted: Sequence[Sequence[Sum]],
) -> list[jax.Array]:
    """Sums over each layer of every leaf, (sums, layers) each, in one reduction."""

    def local(leaves: list[Leaf], scalars: list[Scalars]) -> jax.Array:
        parts = []
        for job, leaf, s, sums in zip(jobs, leaves, scalars, wanted, strict=True):
            own = (job.program, job.shard, leaf, s, sums)
            part = kernels.leaf_sums(_backend(backend, job), *own)
            parts.append(_in_whole(job, part).reshape(-1))
        sharding = jobs[0].sharding
        assert sharding is not None
        return lax.psum(jnp.concatenate(parts), sharding.mesh.axis_names)

    specs = ([_leaf_spec(job) for job in jobs], [_everywhere(s) for s in scalars])
    leaves = [_resharded(job) for job in jobs]
    vector = _sharded(jobs, local, specs, PartitionSpec())(leaves, list(scalars))
    layers = [job.plan.blocks.layer_count for job in jobs]
    shapes = [(len(sums), n) for sums, n in zip(wanted, layers, strict=True)]
    sizes = [math.prod(shape) for shape in shapes]
    ends = [sum(sizes[: k + 1]) for k in range(len(sizes) - 1)]
    parts = zip(jnp.split(vector, ends), shapes, strict=True)
    return [part.reshape(shape) for part, shape in parts]


def shard_step(
    backend: str | None,
    jobs: Sequence[Job],
    scalars: Sequence[Scalars],
    keys: Sequence[jax.Array],
) -> list[Leaf]:
    """One step of every leaf."""

    def local(
        leaves: list[Leaf], scalars: list[Scalars], keys: list[jax.Array]
    ) -> list[Leaf]:
        stepped = []
        for job, leaf, s, key in zip(jobs, leaves, scalars, keys, strict=True):
            assert job.sharding is not None
            s = _of_shard(job, s)
            noise = Noise(key, origin(job.shard, job.sharding))
            own = (job.program, job.shard, leaf, s, noise)
            stepped.append(kernels.leaf_step(_backend(backend, job), *own))
        return stepped

    leaf_specs = [_leaf_spec(job) for job in jobs]
    scalar_specs = [_everywhere(s) for s in scalars]
    written = [
        spec._replace(g=None) if job.program.in_place else spec._replace(p=None)
        for spec, job in zip(leaf_specs, jobs, strict=True)
    ]
    specs = (leaf_specs, scalar_specs, [PartitionSpec() for _ in jobs])
    leaves = [_resharded(job) for job in jobs]
    return _sharded(jobs, local, specs, written)(leaves, list(scalars), list(keys))


def _sharded(
    jobs: Sequence[Job], local: Callable[..., Any], in_specs: Any, out_specs: Any
) -> Callable[..., Any]:
    assert jobs[0].sharding is not None
    mesh = jobs[0].sharding.mesh
    mapped = jax.shard_map(
        local, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )
    # Outside of jit it would run operation by operation, on each device in turn.
    return mapped if is_traced(jobs[0].leaf.g) else jax.jit(mapped)


def _leaf_spec(job: Job) -> Any:
    """Each array of a leaf is cut as the parameter is."""
    assert job.sharding is not None
    spec = job.sharding.spec
    return jax.tree.map(lambda _: spec, job.leaf)


def _everywhere(scalars: Scalars) -> Any:
    return jax.tree.map(lambda _: PartitionSpec(), scalars)


def _of_shard(job: Job, scalars: Scalars) -> Scalars:
    """With the ratios of only those layers that are in this shard.

    Cut here: XLA would take a cut operand as a reason to cut the sums, too.
    """
    whole, part = job.plan.blocks, job.shard
    if scalars.ratio is None or whole.layer_count == part.layer_count:
        return scalars
    assert job.sharding is not None
    first = starts(part, job.sharding)
    layers = scalars.ratio.reshape([whole.shape[k] for k in whole.layers])
    own = lax.dynamic_slice(
        layers, [first[k] for k in whole.layers], [part.shape[k] for k in whole.layers]
    )
    return scalars._replace(ratio=own.reshape(-1))


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


def _backend(backend: str | None, job: Job) -> str:
    return kernels.choose(job.program, local=True) if backend is None else backend


def _resharded(job: Job) -> Leaf:
    """Under explicit axes, the leaf's arrays cut as `shard_map` is told they are."""
    if not job.explicit:
        return job.leaf
    return jax.tree.map(lambda x: jax.sharding.reshard(x, job.sharding), job.leaf)
