"""A step with its options, leaf by leaf in numpy float64, and how near float32 comes.

The directions are the papers', of `formulas`; what the options do with them is written
here as `Options` describes it, and calls nothing of the library.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from cases import RULES
from formulas import adamw_float64, sgd_float64

# Where weight decay joins: the gradient (L2), what LAMB's ratio scales, or the update.
DECAYS = {
    **dict.fromkeys(("adamw", "ademamix", "lion"), "update"),
    **dict.fromkeys(("adagrad", "lars", "sgd", "descent"), "gradient"),
    "lamb": "direction",
}
# Of optimizers whose formula has a ratio: what it scales has none.
_WITHOUT_RATIO: dict[str, Callable[..., np.ndarray]] = {
    "lamb": functools.partial(adamw_float64, eps=1e-6),
    "lars": functools.partial(sgd_float64, weight_decay=0.0, momentum=0.9),
}
# Some sixty roundings of float32 in a step, and as many of a gradient's in a sum.
_OF_STEP, _OF_GRADIENT = 2.0**-18, 2.0**-20


class LeafCase(NamedTuple):
    """One leaf, and what the options say of it.

    Attributes:
      p: the parameter, as an array of JAX.
      grads: for each step, as they are given, likewise.
      rate: learning rate times `lr_scale`.
      decay: of its weights.
      layers: axes that stack layers, not negative.
      limits: `grad_clip_value` and `max_unorm`, where they are given.
    """

    p: Any
    grads: list[Any]
    rate: float
    decay: float
    layers: tuple[int, ...]
    limits: Mapping[str, float]


class Expected(NamedTuple):
    """A parameter after a step, and how far float32 may be from it."""

    p: np.ndarray
    within: np.ndarray


def real(x: Any) -> np.ndarray:
    """In float64; real and imaginary parts as a last axis of two."""
    if jnp.issubdtype(jnp.result_type(x), jnp.complexfloating):
        whole = np.asarray(x)
        return np.stack([whole.real, whole.imag], -1).astype(np.float64)
    return np.asarray(x).astype(np.float64)


def clip_factors(grads: list[dict[str, Any]], limit: float | None) -> list[float]:
    """For each step, what `grad_clip_norm` multiplies gradients by: path to leaf."""
    found = []
    for step in grads:
        moving = [x for x in step.values() if jnp.issubdtype(x.dtype, jnp.inexact)]
        norm = np.sqrt(sum(np.sum(real(x) ** 2) for x in moving))
        found.append(1.0 if limit is None or norm <= limit else limit / norm)
    return found


def expected(rule: str, leaf: LeafCase, factors: list[float]) -> list[Expected]:
    """The parameter after each step."""
    p, grads = real(leaf.p), [real(g) for g in leaf.grads]
    scaled = [f * g for f, g in zip(factors, grads, strict=True)]
    after = _steps(rule, leaf, p, scaled)
    # How far moments carry roundings: to either side of a sign, for example.
    shaken = [
        _steps(rule, leaf, p, [g * (1 + (k == n) * _OF_GRADIENT) for k, g in pairs])
        for n in range(len(scaled))
        for pairs in [list(enumerate(scaled))]
    ]
    kind = jnp.finfo(jnp.result_type(leaf.p))
    found, within, before = [], np.zeros(p.shape), p
    for t, new in enumerate(after):
        within = within + _OF_STEP * np.abs(new - before)
        # Rounded once in float32, and once more, up or down, to what is stored in less.
        # What is lost there goes on to the next step, which it changes by far less.
        size = np.maximum(np.abs(new), np.abs(before))
        units = 0.6 if kind.bits == 32 else 1.0
        within = within + 2.0**-23 * size + units * float(kind.eps) * size
        within = within + float(kind.smallest_subnormal)
        found.append(Expected(new, within + sum(abs(x[t] - new) for x in shaken)))
        before = new
    return found


def _steps(
    rule: str, leaf: LeafCase, p: np.ndarray, grads: list[np.ndarray]
) -> list[np.ndarray]:
    joins, found = DECAYS.get(rule), []
    most = leaf.limits.get("grad_clip_value", np.inf)
    coefficient = RULES[rule].kwargs.get("trust_coefficient", 1.0)
    inputs: list[np.ndarray] = []
    for g in grads:
        x = np.clip(g, -most, most)
        if joins == "gradient":
            x = x + leaf.decay * p
        inputs.append(_ratio(leaf, p, x, coefficient) * x if rule == "lars" else x)
        u = _direction(rule, inputs)
        if joins == "direction":
            u = u + leaf.decay * p
        ratio = _ratio(leaf, p, u, 1.0) if rule == "lamb" else np.ones(())
        u = _limit(leaf, p, ratio * u) * ratio * u
        if joins == "update":
            u = u + leaf.decay * p
        p = p - leaf.rate * u
        found.append(p)
    return found


def _direction(rule: str, inputs: list[np.ndarray]) -> np.ndarray:
    """The step of the formula at a rate of 1, without decay and ratio."""
    case, start = RULES[rule], np.zeros(inputs[0].shape)
    formula = functools.partial(case.numpy, **case.kwargs)
    if "weight_decay" in case.kwargs:
        formula = functools.partial(formula, weight_decay=0.0)
    formula = _WITHOUT_RATIO.get(rule, formula)
    before = formula(start, inputs[:-1], 1.0) if inputs[1:] else start
    return before - formula(start, inputs, 1.0)


def _norm(leaf: LeafCase, x: np.ndarray) -> np.ndarray:
    """Of each layer; it broadcasts."""
    rest = tuple(k for k in range(x.ndim) if k not in leaf.layers)
    return np.sqrt(np.sum(x * x, axis=rest, keepdims=True))


def _ratio(
    leaf: LeafCase, p: np.ndarray, x: np.ndarray, coefficient: float
) -> np.ndarray:
    """Of layers of rank 2 and up; 1 where either norm is 0."""
    if jnp.ndim(leaf.p) - len(leaf.layers) < 2:
        return np.ones(())
    top, bottom = _norm(leaf, p), _norm(leaf, x)
    has = (top > 0) & (bottom > 0)
    return np.where(has, coefficient * top / np.where(has, bottom, 1.0), 1.0)


def _limit(leaf: LeafCase, p: np.ndarray, u: np.ndarray) -> np.ndarray:
    """The factor of `max_unorm`."""
    most = leaf.limits.get("max_unorm", 1e30)
    top, bottom = _norm(leaf, p), _norm(leaf, u)
    longer = (top > 0) & (bottom > most * top)
    allowed = np.where(longer, most * np.where(longer, top, 1.0), 1.0)
    return np.where(longer, allowed / np.where(longer, bottom, 1.0), 1.0)
