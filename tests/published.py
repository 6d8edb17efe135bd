"""Published LAMB and LARS, each written from its own formulas in numpy float64.

A new preset is a row of `PRESETS`: the tests then hold it against its reference.

A reference takes all steps of a run and returns the parameters after them:
`(params, grads, rate, weight_decay, mask, **hyperparameters)`, with trees as dicts of
arrays, one tree of gradients for each step, the learning rate as a function of the
steps taken before, and True in `mask` for leaves that decay.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import optax

from oracle import optax_run

Tree: TypeAlias = dict[str, np.ndarray]
Rate: TypeAlias = Callable[[Any], Any]
Mask: TypeAlias = dict[str, bool]
Reference: TypeAlias = Callable[..., Tree]


class Corrected(NamedTuple):
    """Adam's moments after a step, and what corrects their bias.

    Attributes:
      count: the steps taken before.
      m: first moment, not corrected.
      v: second moment, not corrected.
      c1: m / c1 has no bias.
      c2: v / c2 has no bias.
    """

    count: int
    m: np.ndarray
    v: np.ndarray
    c1: float
    c2: float

    def direction(self, eps: float) -> np.ndarray:
        """Adam's own: both moments corrected, eps outside the root."""
        return self.m / self.c1 / (np.sqrt(self.v / self.c2) + eps)


def moments(grads: list[np.ndarray], b1: float, b2: float) -> Iterator[Corrected]:
    """Adam's moments of a leaf, step by step."""
    # The betas as float32 holds them, like every other float32 implementation.
    b1, b2 = float(np.float32(b1)), float(np.float32(b2))
    m = v = np.zeros(grads[0].shape)
    for count, g in enumerate(grads):
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g**2
        yield Corrected(count, m, v, 1 - b1 ** (count + 1), 1 - b2 ** (count + 1))


def float64(params: Tree, grads: list[Tree]) -> Iterator[tuple[str, Any, list[Any]]]:
    """The leaves: name, parameter, and its gradients."""
    for name, p in params.items():
        yield (
            name,
            np.asarray(p, np.float64),
            [np.asarray(g[name], np.float64) for g in grads],
        )


def quotient(top: float, bottom: float) -> float:
    """A trust ratio: 1 where a norm is zero."""
    return 1.0 if top == 0 or bottom == 0 else top / bottom


def norm(x: np.ndarray) -> float:
    """The Euclidean norm of a leaf."""
    return float(np.sqrt(np.sum(x * x)))


def lamb_paper(
    params: Tree,
    grads: list[Tree],
    rate: Rate,
    weight_decay: float,
    mask: Mask,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    adapted: Mask | None = None,
) -> Tree:
    """arXiv 1904.00962v5, algorithm 2, where phi is the identity."""
    out = {}
    for name, p, leaf_grads in float64(params, grads):
        decay = weight_decay if mask[name] else 0.0
        for state in moments(leaf_grads, b1, b2):
            u = state.direction(eps) + decay * p
            adapts = adapted is None or adapted[name]
            ratio = quotient(norm(p), norm(u)) if adapts else 1.0
            p = p - float(rate(state.count)) * ratio * u
        out[name] = p
    return out


def lamb_tf_addons(
    params: Tree,
    grads: list[Tree],
    rate: Rate,
    weight_decay: float,
    mask: Mask,
    **hyperparameters: float,
) -> Tree:
    """TensorFlow Addons: what does not decay is not adapted either."""
    return lamb_paper(
        params, grads, rate, weight_decay, mask, adapted=mask, **hyperparameters
    )


def lamb_nvidia(
    params: Tree,
    grads: list[Tree],
    rate: Rate,
    weight_decay: float,
    mask: Mask,
    max_grad_norm: float = 1.0,
    **hyperparameters: float,
) -> Tree:
    """Apex's FusedLAMB with `use_nvlamb`: gradients of a global norm of at most 1."""
    shrunk = []
    for tree in grads:
        wide = {k: np.asarray(g, np.float64) for k, g in tree.items()}
        total = np.sqrt(sum(norm(g) ** 2 for g in wide.values()))
        shrunk.append({k: g / max(1.0, total / max_grad_norm) for k, g in wide.items()})
    return lamb_paper(params, shrunk, rate, weight_decay, mask, **hyperparameters)


def lamb_deepspeed(
    params: Tree,
    grads: list[Tree],
    rate: Rate,
    weight_decay: float,
    mask: Mask,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    coefficients: tuple[float, float] = (0.01, 10.0),
    corrects: str = "rate",
) -> Tree:
    """DeepSpeed's FusedLamb; up to 0.19.8 the correction is the learning rate's.

    Args:
      params, grads, rate, weight_decay, mask: as in every reference.
      b1, b2, eps: Adam's.
      coefficients: bounds of the ratio.
      corrects: `"rate"`: the moments keep their bias, so that eps counts for more and
        the decay is corrected with them; `"moments"`: as after 0.19.8.
    """
    out = {}
    for name, p, leaf_grads in float64(params, grads):
        decay = weight_decay if mask[name] else 0.0
        for state in moments(leaf_grads, b1, b2):
            if corrects == "rate":
                lr = float(rate(state.count)) * np.sqrt(state.c2) / state.c1
                u = state.m / (np.sqrt(state.v) + eps)
            else:
                lr, u = float(rate(state.count)), state.direction(eps)
            u = u + decay * p
            ratio = 1.0
            if norm(p) != 0 and norm(u) != 0:
                ratio = float(np.clip(norm(p) / norm(u), *coefficients))
            p = p - lr * ratio * u
        out[name] = p
    return out


def lamb_optax(
    params: Tree,
    grads: list[Tree],
    rate: Rate,
    weight_decay: float,
    mask: Mask,
    **hyperparameters: float,
) -> Tree:
    """optax.lamb itself, in float32."""
    tx = optax.lamb(rate, weight_decay=weight_decay, mask=mask, **hyperparameters)
    return optax_run(tx, params, grads)


def lamb_braintools(
    params: Tree,
    grads: list[Tree],
    rate: Rate,
    weight_decay: float,
    mask: Mask,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
) -> Tree:
    """The chain of braintools 0.3.0, in float32; the mask is ours."""
    tx = optax.chain(
        optax.scale_by_adam(b1, b2, eps),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_trust_ratio(),
        optax.scale_by_learning_rate(rate),
    )
    return optax_run(tx, params, grads)


def at_most(bound: float, length: float, frozen: bool) -> float:
    """The factor that shortens `length` to `bound`.

    A bound of zero, which is that of a leaf of zeros, is none unless `frozen`.
    """
    if bound == 0 and not frozen:
        return 1.0
    return bound / length if length > bound else 1.0


def lamb_bitsandbytes(
    params: Tree,
    grads: list[Tree],
    rate: Rate,
    weight_decay: float,
    mask: Mask,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    max_unorm: float = 1.0,
    frozen: bool = False,
    measures: str = "direction",
) -> Tree:
    """bitsandbytes' LAMB in 32 bits: AdamW whose steps are no longer than p.

    Args:
      params, grads, rate, weight_decay, mask: as in every reference.
      b1, b2, eps: Adam's.
      max_unorm: bound of the direction's norm, relative to the parameter's.
      frozen: whether a leaf of zeros stays so, as in bitsandbytes.
      measures: what is bounded: `"direction"`, as on GPUs, or `"uncorrected"`, as on
        CPUs: the direction without the correction of its bias.
    """
    out = {}
    for name, p, leaf_grads in float64(params, grads):
        decay = weight_decay if mask[name] else 0.0
        for state in moments(leaf_grads, b1, b2):
            lr, u = float(rate(state.count)), state.direction(eps)
            length = norm(u)
            if measures == "uncorrected":
                length *= state.c1 / np.sqrt(state.c2)
            scale = at_most(max_unorm * norm(p), length, frozen)
            p = p * (1 - lr * decay) - lr * scale * u
        out[name] = p
    return out


def lars_paper(
    params: Tree,
    grads: list[Tree],
    rate: Rate,
    weight_decay: float,
    mask: Mask,
    momentum: float = 0.9,
    trust_coefficient: float = 1e-3,
) -> Tree:
    """arXiv 1708.03888, algorithm 1: the learning rate is inside the momentum."""
    out = {}
    momentum = float(np.float32(momentum))
    for name, p, leaf_grads in float64(params, grads):
        decay = weight_decay if mask[name] else 0.0
        v = np.zeros(p.shape)
        for count, g in enumerate(leaf_grads):
            local = quotient(trust_coefficient * norm(p), norm(g) + decay * norm(p))
            v = momentum * v + float(rate(count)) * local * (g + decay * p)
            p = p - v
        out[name] = p
    return out


def lars_optax(
    params: Tree,
    grads: list[Tree],
    rate: Rate,
    weight_decay: float,
    mask: Mask,
    **hyperparameters: float,
) -> Tree:
    """optax.lars itself, in float32."""
    tx = optax.lars(rate, weight_decay, weight_decay_mask=mask, **hyperparameters)
    return optax_run(tx, params, grads)


def lars_braintools(
    params: Tree,
    grads: list[Tree],
    rate: Rate,
    weight_decay: float,
    mask: Mask,
    momentum: float = 0.9,
    trust_coefficient: float = 1e-3,
    eps: float = 1e-8,
) -> Tree:
    """The chain of braintools 0.3.0, in float32; the mask is ours."""
    tx = optax.chain(
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_trust_ratio(trust_coefficient=trust_coefficient, eps=eps),
        optax.trace(momentum),
        optax.scale_by_learning_rate(rate),
    )
    return optax_run(tx, params, grads)


def lars_bitsandbytes(
    params: Tree,
    grads: list[Tree],
    rate: Rate,
    weight_decay: float,
    mask: Mask,
    momentum: float = 0.9,
    max_unorm: float = 0.02,
    frozen: bool = False,
) -> Tree:
    """bitsandbytes' PytorchLARS, and its LARS in 32 bits on CPUs.

    Args:
      params, grads, rate, weight_decay, mask: as in every reference.
      momentum: of the sum of gradients with their decay.
      max_unorm: bound of that sum's norm, relative to the parameter's.
      frozen: whether a leaf of zeros stays so, as in bitsandbytes.
    """
    out = {}
    momentum = float(np.float32(momentum))
    for name, p, leaf_grads in float64(params, grads):
        decay = weight_decay if mask[name] else 0.0
        v = np.zeros(p.shape)
        for count, g in enumerate(leaf_grads):
            v = momentum * v + g + decay * p
            scale = at_most(max_unorm * norm(p), norm(v), frozen)
            p = p - float(rate(count)) * scale * v
        out[name] = p
    return out


def percentile_clipped(grads: list[np.ndarray], percentile: int) -> list[np.ndarray]:
    """A leaf's gradients as bitsandbytes clipped them up to 0.49.2.

    The norm of each is at most that of the given rank among the last 100, which are
    all the first norm to begin with and include its own.
    """
    squares = np.full(100, np.sum(grads[0].astype(np.float64) ** 2))
    clipped = []
    for t, g in enumerate(grads, 1):
        wide = g.astype(np.float64)
        squares[t % 100] = np.sum(wide**2)
        bound, current = np.sqrt(np.sort(squares)[percentile]), norm(wide)
        clipped.append(wide * (bound / current) if current > bound else wide)
    return clipped


class PresetCase(NamedTuple):
    """What a preset computes.

    Attributes:
      reference: the published implementation.
      arguments: given to the reference and to the preset alike.
      peak: a learning rate that moves parameters by some percent of themselves.
    """

    reference: Reference
    arguments: dict[str, float]
    peak: float


PRESETS: dict[str, PresetCase] = {
    "lamb-paper": PresetCase(lamb_paper, {"weight_decay": 0.1}, 0.03),
    "lamb-tf-addons": PresetCase(lamb_tf_addons, {"weight_decay": 0.1}, 0.03),
    "lamb-nvidia": PresetCase(lamb_nvidia, {"weight_decay": 0.1}, 0.03),
    "lamb-deepspeed": PresetCase(lamb_deepspeed, {"weight_decay": 0.1}, 0.03),
    "lamb-optax": PresetCase(lamb_optax, {"weight_decay": 0.1}, 0.03),
    "lamb-braintools": PresetCase(lamb_braintools, {"weight_decay": 0.1}, 0.03),
    "lamb-bitsandbytes": PresetCase(lamb_bitsandbytes, {"weight_decay": 0.1}, 0.03),
    "lars-paper": PresetCase(lars_paper, {"weight_decay": 0.01}, 10.0),
    "lars-optax": PresetCase(lars_optax, {"weight_decay": 0.01}, 10.0),
    "lars-braintools": PresetCase(lars_braintools, {"weight_decay": 0.01}, 10.0),
    "lars-bitsandbytes": PresetCase(
        lars_bitsandbytes, {"weight_decay": 0.01, "momentum": 0.9}, 0.5
    ),
}
