"""Shardings of a state, and what a sharding means for the step, ahead of time."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich.console import Console
from rich.table import Table

from octavo import pallas_kernels as kernels
from octavo.pallas_kernels import Leaf, Noise, Scalars

from .fused import Transformation
from .job import Job
from .placement import advice, fitting, full
from .tree import Leaves


def state_sharding(
    tx: optax.GradientTransformation, params: Any, shardings: Any
) -> Any:
    """How the state of an optimizer lies on the devices, if parameters lie as given.

    Codes lie as the parameter does. So do scales, but for a blocked axis that has fewer
    blocks than parts, which is then replicated; and so does whatever else an optax
    transformation keeps for each parameter. Counters are replicated.

    Args:
      tx: an Octavo optimizer, or any optax transformation.
      params: tree of arrays or of `jax.ShapeDtypeStruct`.
      shardings: tree of `NamedSharding` like params, or a prefix of one.

    Returns:
      The state's tree, of NamedShardings: for `jax.jit(tx.init, out_shardings=...)`,
      `jax.device_put` and Orbax.

    Raises:
      ValueError: where shardings do not fit the parameters.

    >>> import jax
    >>> from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
    >>> from octavo import optim
    >>> tx, mesh = optim.adamw(1e-3), jax.make_mesh((1,), ("data",))
    >>> params = {"w": jax.ShapeDtypeStruct((4096, 512), "float32")}
    >>> shardings = optim.state_sharding(tx, params, NamedSharding(mesh, P("data")))
    >>> shardings.moments["mu"]["w"].spec
    P('data', None)
    """
    shapes = jax.tree.map(_abstract, params)
    tree = Leaves.of(shapes)
    given = full(shardings, tree)
    state = jax.eval_shape(tx.init, shapes)
    if not given:
        raise ValueError("params has no leaves: there is no mesh to put a state on")
    everywhere = NamedSharding(given[0].mesh, PartitionSpec())
    return optax.tree_map_params(
        tx,
        lambda leaf, sharding: fitting(sharding, leaf.shape),
        state,
        tree.replaced(given),
        transform_non_params=lambda _: everywhere,
    )


def _abstract(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x))


@dataclass(frozen=True)
class ShardingRow:
    """What a sharding means for one leaf.

    Attributes:
      path: of the parameter.
      shape: its global shape.
      spec: how it is cut.
      blocks: how its state is cut.
      backend: what runs its step: `"tpu"`, `"triton"`, `"xla"`, or `"none"`.
      why: the reason, if it is no kernel, and what to do where something can be done.
      aligned: False where blocks straddle shards, which costs communication.
    """

    path: str
    shape: tuple[int, ...]
    spec: PartitionSpec
    blocks: str
    backend: str
    why: str
    aligned: bool


@dataclass(frozen=True)
class ShardingReport:
    """What a sharding means for each leaf; `print` it for a table."""

    rows: tuple[ShardingRow, ...]

    def __str__(self) -> str:
        table = Table("leaf", "shape", "spec", "blocks", "backend", "why")
        for row in self.rows:
            shown = row.path or "(the parameters)"
            spec = str(tuple(row.spec))
            table.add_row(shown, str(row.shape), spec, row.blocks, row.backend, row.why)
        console = Console(width=140, color_system=None)
        with console.capture() as text:
            console.print(table)
        return text.get().rstrip()


def check_sharding(
    tx: Transformation, params: Any, shardings: Any, platform: str | None = None
) -> ShardingReport:
    """Which backend takes each leaf if parameters lie as given, and why.

    From shapes alone: nothing is computed, compiled or allocated.

    Args:
      tx: an Octavo optimizer.
      params: tree of arrays or of `jax.ShapeDtypeStruct`.
      shardings: tree of `NamedSharding` like params, or a prefix of one.
      platform: `"tpu"`, `"gpu"` or `"cpu"`. Default None: that of the mesh's devices.

    Raises:
      TypeError: if tx is not an Octavo optimizer itself.
      ValueError: where shardings do not fit the parameters.

    >>> import jax
    >>> from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
    >>> from octavo import optim
    >>> mesh = jax.make_mesh((1,), ("data",))
    >>> params = {"w": jax.ShapeDtypeStruct((4096, 512), "float32")}
    >>> whole = NamedSharding(mesh, P("data"))
    >>> report = optim.check_sharding(optim.adamw(1e-3), params, whole, "tpu")
    >>> report.rows[0].backend
    'tpu'
    """
    if not isinstance(tx, Transformation):
        raise TypeError(
            "check_sharding takes an Octavo optimizer itself, not a chain or wrapper"
        )
    shapes = jax.tree.map(_abstract, params)
    tree = Leaves.of(shapes)
    given = full(shardings, tree)
    jobs = tx.jobs(shapes, given)
    return ShardingReport(tuple(_row(tx, job, platform) for job in jobs))


def _row(tx: Transformation, job: Job, platform: str | None) -> ShardingRow:
    assert job.sharding is not None
    blocks = job.plan.blocks
    backend, why = _backend(tx, job, platform)
    cut = "" if not job.program.quantized else f"{blocks.size} along axis {blocks.axis}"
    spec = job.sharding.spec
    aligned = not job.straddles
    return ShardingRow(job.plan.path, blocks.shape, spec, cut, backend, why, aligned)


def _backend(tx: Transformation, job: Job, platform: str | None) -> tuple[str, str]:
    """The backend of a leaf, and why it is no kernel."""
    assert job.sharding is not None
    if job.idle:
        return "none", "integers and empty leaves are left alone"
    if job.straddles:
        return "xla", advice(job.plan.path, job.plan.blocks, job.sharding)
    mesh = job.sharding.mesh
    if platform is None:
        first = mesh.devices.flat[0] if isinstance(mesh, Mesh) else None
        platform = jax.default_backend() if first is None else first.platform
    chosen = tx.backend or kernels.choose(job.program, local=True, platform=platform)
    if chosen == "xla":
        quantized = job.program.quantized
        return "xla", f"no kernel for {platform}" if quantized else "not quantized"
    try:
        _trace(job, chosen)
    except NotImplementedError as error:
        return "xla", str(error)
    return chosen, ""


def _trace(job: Job, backend: str) -> None:
    """Raise NotImplementedError if the kernel does not take a shard of the leaf."""
    blocks, plan, rule = job.shard, job.plan, job.program.rule
    formats = job.program.formats
    values = _shape(blocks.shape, plan.dtype)
    codes = [_shape(blocks.shape, plan.moment_dtype(k)) for k, _ in enumerate(formats)]
    scale = _shape(blocks.scale_shape, jnp.bfloat16)
    scales = [scale if f.quantized else None for f in formats]
    one, index = _shape((), jnp.float32), _shape((), jnp.int32)
    scalars = Scalars(
        one,
        jax.eval_shape(rule.scalars, one, one),
        decay=None if rule.decay is None else one,
        ratio=rule.ratio and _shape((blocks.layer_count,), jnp.float32),
    )
    step = kernels.BACKENDS[backend].leaf_step
    jax.eval_shape(
        lambda *args: step(job.program, blocks, *args),
        Leaf(values, values, tuple(codes), tuple(scales)),
        scalars,
        Noise(index, index),
    )


def _shape(shape: tuple[int, ...], dtype: Any) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype)
