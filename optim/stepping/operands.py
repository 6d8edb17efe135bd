"""The operands of a step: clip factors, ratios and guards, from sums over leaves."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from octavo.pallas_kernels import Leaf, Norms, Rule, Scalars, Sum

from ..options import Settings
from .execute import run_tasks
from .norms import LayerNorms, clip_global, clip_percentile, limited, stacked
from .tasks import Work, tasks_of

Sums: TypeAlias = dict[Sum, jax.Array]


class Step(NamedTuple):
    """What is given of a step: static work, its arrays, and keys of its random numbers.

    Attributes:
      work: for each leaf.
      leaves: their arrays.
      scalars: what each takes as operands, as far as the step's number says.
      key: of the step.
      ids: numbers of the leaves.
    """

    work: list[Work]
    leaves: list[Leaf]
    scalars: list[Scalars]
    key: jax.Array
    ids: list[int]

    def run(self, sums: Sequence[tuple[Sum, ...]] | None = None) -> list[Any]:
        """One pass: the leaves after the step, or what is measured of them."""
        tasks = tasks_of(self.work, sums)
        return run_tasks(tasks, self.leaves, self.scalars, self.key, self.ids)


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


def operands(
    settings: Settings,
    hyperparameters: Any,
    step: Step,
    extra: dict[str, Any],
    count: jax.Array,
) -> Operands:
    """Run the passes that the options and the rules need: none, one or two.

    Clipping by norms comes before everything else that is measured, and LAMB's
    direction is no linear function of the gradient: both together take two passes.
    """
    extra = dict(extra)
    wanted = [_wanted(settings, w.program.rule) for w in step.work]
    guards: tuple[Sum, ...] = ("bad",) if settings.skip_nonfinite else ()
    squares: tuple[Sum, ...] = ("g", "bad")
    found: list[Sums] = [{} for _ in step.work]
    scalars = step.scalars
    if not (any(wanted) or guards or settings.clips_norms):
        return Operands(scalars, None, extra)
    if settings.clips_norms:
        raw = [Scalars(s.learning_rate, ()) for s in scalars]
        first = _measured(step._replace(scalars=raw), [squares] * len(scalars))
        factors = _clip(settings, first, extra, count)
        scalars = [s._replace(clip=f) for s, f in zip(scalars, factors, strict=True)]
        found = [{"bad": x["bad"]} if guards else {} for x in first]
        guards = ()
    step = step._replace(scalars=scalars)
    second = _measured(step, [(*w, *guards) for w in wanted])
    found = [a | b for a, b in zip(found, second, strict=True)]

    norms = _norms(found)
    ratios = _ratios(settings, hyperparameters, step, norms)
    if settings.record_norms:
        extra["norms"] = stacked(
            [_recorded(*row) for row in zip(norms, ratios, strict=True)]
        )
    take = None
    if settings.skip_nonfinite:
        bad = sum((jnp.sum(x["bad"]) for x in found), jnp.float32(0.0))
        take = jnp.where(bad > 0.0, 0.0, 1.0)
    scalars = [
        s._replace(ratio=r, take=take) for s, r in zip(scalars, ratios, strict=True)
    ]
    return Operands(scalars, take, extra)


def _wanted(settings: Settings, rule: Rule) -> tuple[Sum, ...]:
    """The sums that a leaf's ratio needs, or that are recorded."""
    if settings.record_norms or rule.scaled == "gradient":
        return ("p", "g", "x")
    return () if rule.ratio is None else ("p", "x")


def _measured(step: Step, wanted: Sequence[tuple[Sum, ...]]) -> list[Sums]:
    """Sums over each layer of every leaf; zeros of leaves that are left alone."""
    if not any(wanted):
        return [{} for _ in wanted]
    sums = []
    rows = zip(step.work, wanted, step.run(wanted), strict=True)
    for work, names, found in rows:
        layers = work.program.storage.blocks.layer_count
        values = jnp.zeros((len(names), layers)) if found is None else found
        sums.append(dict(zip(names, values, strict=True)))
    return sums


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
    percentile, limit = settings.percentile_clipping, settings.grad_clip_norm
    if percentile is None:
        return [clip_global(squares, limit)] * len(sums)
    bad = jnp.stack([jnp.sum(x["bad"]) for x in sums]) > 0.0
    known = jnp.where(bad, jnp.nan, squares)
    history = extra["clip_history"]
    factor, history = clip_percentile(known, history, count, percentile)
    extra["clip_history"] = history
    if limit is not None:
        clipped = jnp.where(factor > 0.0, factor * factor * squares, 0.0)
        factor = factor * clip_global(clipped, limit)
    return list(factor)


def _norms(sums: Sequence[Sums]) -> list[Norms | None]:
    """Of each layer of each leaf that was measured."""

    def rooted(name: Sum) -> list[jax.Array | None]:
        return _of_all(jnp.sqrt, [x.get(name) for x in sums])

    rows = zip(*(rooted(name) for name in ("p", "g", "x")), strict=True)
    return [None if x is None or p is None else Norms(p, g, x) for p, g, x in rows]


def _ratios(
    settings: Settings, hyperparameters: Any, step: Step, norms: list[Norms | None]
) -> list[jax.Array | None]:
    """The ratio of each layer of each leaf that has one."""
    found: list[jax.Array | None] = [None] * len(norms)
    # Of all leaves with the same rule at once.
    for rule in dict.fromkeys(w.program.rule for w in step.work):
        if rule.ratio is None:
            continue
        own = [k for k, w in enumerate(step.work) if w.program.rule == rule]
        ratio = functools.partial(_ratio, settings, rule, hyperparameters)
        columns = zip(*(norms[k] or () for k in own), strict=True)
        decays = _decays([step.scalars[k].decay for k in own], [norms[k] for k in own])
        for k, r in zip(own, _of_all(ratio, decays, *columns), strict=True):
            found[k] = r
    return found


def _decays(decays: Sequence[Any], norms: Sequence[Norms | None]) -> list[jax.Array]:
    """The weight decay of each layer of each leaf."""
    return [
        jnp.zeros_like(n.p) if decay is None else jnp.broadcast_to(decay, n.p.shape)
        for decay, n in zip(decays, norms, strict=True)
        if n is not None
    ]


def _ratio(
    settings: Settings,
    rule: Rule,
    hyperparameters: Any,
    decay: jax.Array,
    *norms: Any,
) -> jax.Array:
    norm = Norms(*norms)
    assert rule.ratio is not None
    ratio = rule.ratio(norm, decay, hyperparameters)
    if settings.max_unorm is not None:
        ratio = limited(ratio, norm, settings.max_unorm)
    return ratio


def _of_all(
    function: Callable[..., jax.Array], *columns: Sequence[Any]
) -> list[jax.Array | None]:
    """An elementwise function of vectors, as one operation on all that are not None.

    A scalar operation takes XLA as long to compile as a large one, and there would be a
    dozen for each leaf.
    """
    has = [k for k, x in enumerate(columns[0]) if x is not None]
    found: list[jax.Array | None] = [None] * len(columns[0])
    if not has:
        return found

    def joined(column: Sequence[Any]) -> Any:
        own = [column[k] for k in has]
        return None if own[0] is None else jnp.concatenate(own)

    result = function(*(joined(column) for column in columns))
    sizes = tuple(columns[0][k].size for k in has)
    for k, part in zip(has, jax.lax.split(result, sizes), strict=True):
        found[k] = part
    return found


def _recorded(norms: Norms | None, ratio: jax.Array | None) -> LayerNorms:
    assert norms is not None and norms.g is not None
    shown = jnp.ones_like(norms.p) if ratio is None else ratio
    return LayerNorms(norms.p, norms.g, norms.x, shown)
