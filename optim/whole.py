"""Work on a leaf as a whole array, which XLA partitions if it is spread out."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from octavo import pallas_kernels as kernels
from octavo.pallas_kernels import Leaf, Noise, Scalars, Sum

from .job import Job
from .placement import fitting


def whole_sums(
    backend: str | None, job: Job, scalars: Scalars, sums: Sequence[Sum]
) -> jax.Array:
    """Sums over each layer of one leaf, (sums, layers)."""
    chosen, blocks = _backend(backend, job), job.plan.blocks

    def run(leaf: Leaf, scalars: Scalars) -> jax.Array:
        return kernels.leaf_sums(chosen, job.program, blocks, leaf, scalars, sums)

    return _freely(job, run, lambda: _replicated(job))(job.leaf, scalars)


def whole_step(backend: str | None, job: Job, scalars: Scalars, key: jax.Array) -> Leaf:
    """One step of one leaf."""
    chosen, blocks = _backend(backend, job), job.plan.blocks

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
    if job.explicit:
        return jax.sharding.auto_axes(function, out_sharding=out())
    if job.sharding is None or AxisType.Explicit in job.sharding.mesh.axis_types:
        return function
    where = job.sharding

    def kept(*args: Any) -> Any:
        """XLA would leave a leaf on every device, once it is gathered."""
        found = function(*args)
        if not isinstance(found, Leaf):  # sums
            return lax.with_sharding_constraint(found, _replicated(job))
        return jax.tree.map(
            lambda x: lax.with_sharding_constraint(x, fitting(where, x.shape)), found
        )

    return kept


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


def _backend(backend: str | None, job: Job) -> str:
    """Whole arrays that are known to be cut are XLA's to partition."""
    if job.sharding is not None:
        return "xla"
    return kernels.choose(job.program, local=False) if backend is None else backend
