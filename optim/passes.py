"""The passes of a step: sums over every leaf, the operands made of them, the step."""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias, TypeVar

import jax
import jax.numpy as jnp

from octavo.pallas_kernels import Leaf, Norms, Scalars, Sum

from .job import Job
from .limits import clip_global, clip_percentile
from .norms import LayerNorms, stacked
from .settings import Settings
from .shards import shard_step, shard_sums
from .whole import whole_step, whole_sums


class Operands(NamedTuple):
    """What the passes found out.

    Attributes:
      scalars: for each leaf.
      take: float32, 1 or 0: whether to take the step; None: always.
      extra: what becomes of `State.extra` if the step is taken.
    """

    scalars: list[Scalars]
    take: jax.Array | None
    extra: dict[str, Any]


_T = TypeVar("_T")
Sums: TypeAlias = dict[Sum, jax.Array]


def operands(
    settings: Settings,
    jobs: Sequence[Job],
    scalars: Sequence[Scalars],
    extra: dict[str, Any],
    count: jax.Array,
) -> Operands:
    """Run the passes that the options and the rules need: none, one or two.

    Clipping by norms comes before everything else that is measured, and LAMB's
    direction is no linear function of the gradient: both together take two passes.
    """
    scalars, extra = list(scalars), dict(extra)
    wanted: list[tuple[Sum, ...]] = [_wanted(settings, job) for job in jobs]
    guards: tuple[Sum, ...] = ("bad",) if settings.skip_nonfinite else ()
    squares: tuple[Sum, ...] = ("g", "bad")
    found: list[Sums] = [{} for _ in jobs]
    if settings.clips_norms:
        raw = [Scalars(s.learning_rate, ()) for s in scalars]
        first = _tree_sums(settings, jobs, raw, [squares] * len(jobs))
        factors = _clip(settings, first, extra, count)
        scalars = [s._replace(clip=f) for s, f in zip(scalars, factors, strict=True)]
        found = [{"bad": x["bad"]} if guards else {} for x in first]
        guards = ()
    if settings.grad_clip_value is not None:
        value = jnp.asarray(settings.grad_clip_value, jnp.float32)
        scalars = [s._replace(clip_value=value) for s in scalars]
    second = _tree_sums(settings, jobs, scalars, [(*w, *guards) for w in wanted])
    found = [a | b for a, b in zip(found, second, strict=True)]

    norms = [_norms(x) for x in found]
    ratios = [_ratio(*x) for x in zip(jobs, norms, scalars, strict=True)]
    if settings.record_norms:
        rows = zip(jobs, norms, ratios, strict=True)
        extra["norms"] = stacked([_recorded(*row) for row in rows])
    take = None
    if settings.skip_nonfinite:
        bad = sum((jnp.sum(x["bad"]) for x in found), jnp.float32(0.0))
        take = jnp.where(bad > 0.0, 0.0, 1.0)
    scalars = [
        s._replace(ratio=r, take=take) for s, r in zip(scalars, ratios, strict=True)
    ]
    return Operands(scalars, take, extra)


def tree_step(
    settings: Settings,
    jobs: Sequence[Job],
    scalars: Sequence[Scalars],
    keys: Sequence[jax.Array],
) -> list[Leaf]:
    """One step of every leaf, in its shards where they are known."""
    results = [job.leaf._replace(g=_zeros_like(job.leaf.g)) for job in jobs]
    inside = [k for k, job in enumerate(jobs) if job.in_shards]
    for k, job in enumerate(jobs):
        if not job.idle and not job.in_shards:
            results[k] = whole_step(settings.backend, job, scalars[k], keys[k])
    if inside:
        stepped = shard_step(
            settings.backend,
            _some(jobs, inside),
            _some(scalars, inside),
            _some(keys, inside),
        )
        for k, out in zip(inside, stepped, strict=True):
            results[k] = out
    return results


def _tree_sums(
    settings: Settings,
    jobs: Sequence[Job],
    scalars: Sequence[Scalars],
    wanted: Sequence[Sequence[Sum]],
) -> list[Sums]:
    """Sums over each layer of every leaf, likewise."""
    layers = [job.plan.blocks.layer_count for job in jobs]
    found = [jnp.zeros((len(w), n)) for w, n in zip(wanted, layers, strict=True)]
    work = [k for k, job in enumerate(jobs) if wanted[k] and not job.idle]
    inside = [k for k in work if jobs[k].in_shards]
    for k in work:
        if not jobs[k].in_shards:
            found[k] = whole_sums(settings.backend, jobs[k], scalars[k], wanted[k])
    if inside:
        summed = shard_sums(
            settings.backend,
            _some(jobs, inside),
            _some(scalars, inside),
            _some(wanted, inside),
        )
        for k, sums in zip(inside, summed, strict=True):
            found[k] = sums
    return [dict(zip(w, x, strict=True)) for w, x in zip(wanted, found, strict=True)]


def _some(items: Sequence[_T], indices: Sequence[int]) -> list[_T]:
    return [items[k] for k in indices]


def _zeros_like(g: Any) -> Any:
    return g if g.dtype == jax.dtypes.float0 else jnp.zeros_like(g)


def _wanted(settings: Settings, job: Job) -> tuple[Sum, ...]:
    """The sums that a leaf's ratio needs, or that are recorded."""
    rule = job.program.rule
    if settings.record_norms or (rule.ratio is not None and rule.scales == "gradient"):
        return ("p", "g", "x")
    return () if rule.ratio is None else ("p", "x")


def _clip(
    settings: Settings,
    sums: Sequence[Sums],
    extra: dict[str, Any],
    count: jax.Array,
) -> list[jax.Array]:
    """The factor of each leaf's gradient, from its squares; updates the history."""
    if not sums:
        return []
    squares = jnp.stack([jnp.sum(x["g"]) for x in sums])
    factor = jnp.ones_like(squares)
    percentile = settings.percentile_clipping
    if percentile is not None:
        history = extra["clip_history"]
        bad = jnp.stack([jnp.sum(x["bad"]) for x in sums]) > 0.0
        known = jnp.where(bad, jnp.nan, squares)
        factor, history = clip_percentile(known, history, count, percentile)
        extra["clip_history"] = history
    if settings.grad_clip_norm is not None:
        clipped = jnp.where(factor > 0.0, factor * factor * squares, 0.0)
        factor = factor * clip_global(clipped, settings.grad_clip_norm)
    return list(factor)


def _norms(sums: Sums) -> Norms | None:
    if "x" not in sums:
        return None
    g = jnp.sqrt(sums["g"]) if "g" in sums else None
    return Norms(jnp.sqrt(sums["p"]), g, jnp.sqrt(sums["x"]))


def _ratio(job: Job, norms: Norms | None, scalars: Scalars) -> jax.Array | None:
    ratio = job.program.rule.ratio
    if ratio is None or norms is None:
        return None
    decay = jnp.float32(0.0) if scalars.decay is None else scalars.decay
    return ratio(norms, decay)


def _recorded(job: Job, norms: Norms | None, ratio: jax.Array | None) -> LayerNorms:
    assert norms is not None and norms.g is not None
    shown = jnp.ones_like(norms.p) if ratio is None else ratio
    return LayerNorms(norms.p, norms.g, norms.x, shown)
