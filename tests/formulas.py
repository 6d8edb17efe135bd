"""The formulas of the papers, in numpy float64, and what optax lacks.

Each takes `(p, grads, lr, **kwargs)` and returns the parameter after a step with each
of the gradients.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import optax


def as_float32(*values: float) -> list[float]:
    """Decays as float32 holds them: 1 - .999 differs by 1.3e-5 of .001 then."""
    return [float(np.float32(x)) for x in values]


class Moments(NamedTuple):
    """Of a step: its number from 1, its gradient, and the moments after it."""

    t: int
    g: np.ndarray
    m: np.ndarray
    v: np.ndarray


def moments(grads: list[np.ndarray], b1: float, b2: float) -> Iterator[Moments]:
    """Means of gradients and of their squares, not corrected."""
    m = v = np.zeros(grads[0].shape)
    for t, g in enumerate((np.asarray(g, np.float64) for g in grads), 1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        yield Moments(t, g, m, v)


def adamw_float64(
    p: np.ndarray,
    grads: list[np.ndarray],
    lr: float,
    weight_decay: float = 0.0,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
) -> np.ndarray:
    """arXiv 1412.6980, algorithm 1 as printed, and 1711.05101's decay."""
    b1, b2 = as_float32(b1, b2)
    p = p.astype(np.float64)
    for t, _, m, v in moments(grads, b1, b2):
        m_hat, v_hat = m / (1 - b1**t), v / (1 - b2**t)
        p = p - lr * (m_hat / (np.sqrt(v_hat) + eps) + weight_decay * p)
    return p


def nadam_float64(
    p: np.ndarray,
    grads: list[np.ndarray],
    lr: float,
    nesterov: bool,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
) -> np.ndarray:
    """Dozat, ICLR 2016 workshop, algorithm 2, whose v has no factor b2."""
    assert nesterov
    b1, b2 = as_float32(b1, b2)
    p = p.astype(np.float64)
    for t, g, m, v in moments(grads, b1, b2):
        m_hat = b1 * m / (1 - b1 ** (t + 1)) + (1 - b1) * g / (1 - b1**t)
        p = p - lr * m_hat / (np.sqrt(v / (1 - b2**t)) + eps)
    return p


def amsgrad_float64(
    p: np.ndarray,
    grads: list[np.ndarray],
    lr: float,
    amsgrad: bool,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
) -> np.ndarray:
    """arXiv 1904.09237, algorithm 2, with both bias corrections."""
    assert amsgrad
    b1, b2 = as_float32(b1, b2)
    p, largest = p.astype(np.float64), np.zeros(p.shape)
    for t, _, m, v in moments(grads, b1, b2):
        largest = np.maximum(largest, v / (1 - b2**t))
        p = p - lr * m / (1 - b1**t) / (np.sqrt(largest) + eps)
    return p


def adamax_float64(
    p: np.ndarray,
    grads: list[np.ndarray],
    lr: float,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
) -> np.ndarray:
    """arXiv 1412.6980, algorithm 2, with optax's eps."""
    b1, b2 = as_float32(b1, b2)
    p, u = p.astype(np.float64), np.zeros(p.shape)
    for t, g, m, _ in moments(grads, b1, b2):
        u = np.maximum(b2 * u, np.abs(g) + eps)
        p = p - lr / (1 - b1**t) * m / u
    return p


def ademamix_float64(
    p: np.ndarray,
    grads: list[np.ndarray],
    lr: float,
    weight_decay: float = 0.0,
    b1: float = 0.9,
    b2: float = 0.999,
    b3: float = 0.9999,
    alpha: float = 5.0,
    eps: float = 1e-8,
    t_alpha: float | None = None,
    t_beta3: float | None = None,
) -> np.ndarray:
    """arXiv 2409.03137, algorithm 1, and the schedules of its appendix A.1."""
    b1, b2, b3 = as_float32(b1, b2, b3)
    p, slow = p.astype(np.float64), np.zeros(p.shape)

    def half_life(b: float) -> float:
        return float(np.log(0.5) / np.log(b) - 1)

    for t, g, m, v in moments(grads, b1, b2):
        now, weight = b3, alpha
        if t_alpha is not None:
            weight = min(t / t_alpha, 1.0) * alpha
        if t_beta3 is not None:
            s = min(t / t_beta3, 1.0)
            half = (1 - s) * half_life(b1) + s * half_life(b3)
            now = 0.5 ** (1 / (half + 1))
        slow = now * slow + (1 - now) * g
        top = m / (1 - b1**t) + weight * slow
        p = p - lr * (top / (np.sqrt(v / (1 - b2**t)) + eps) + weight_decay * p)
    return p


def lion_float64(
    p: np.ndarray,
    grads: list[np.ndarray],
    lr: float,
    weight_decay: float,
    b1: float = 0.9,
    b2: float = 0.99,
) -> np.ndarray:
    """arXiv 2302.06675, algorithm 2."""
    b1, b2 = as_float32(b1, b2)
    p, m = p.astype(np.float64), np.zeros(p.shape)
    for g in (np.asarray(g, np.float64) for g in grads):
        p = p - lr * (np.sign(b1 * m + (1 - b1) * g) + weight_decay * p)
        m = b2 * m + (1 - b2) * g
    return p


def rmsprop_float64(
    p: np.ndarray,
    grads: list[np.ndarray],
    lr: float,
    decay: float = 0.9,
    eps: float = 1e-8,
    centered: bool = False,
    momentum: float = 0.0,
    nesterov: bool = False,
) -> np.ndarray:
    """Lecture 6e of Tieleman and Hinton; centered: arXiv 1308.0850, 38 to 41."""
    decay, momentum = as_float32(decay, momentum)
    p, trace = p.astype(np.float64), np.zeros(p.shape)
    for _, g, m, v in moments(grads, decay, decay):
        u = lr * g / np.sqrt(v - (m**2 if centered else 0.0) + eps)
        trace = momentum * trace + u
        p = p - (u + momentum * trace if nesterov else trace)
    return p


def adagrad_float64(
    p: np.ndarray,
    grads: list[np.ndarray],
    lr: float,
    initial_accumulator_value: float = 0.1,
    eps: float = 1e-7,
    eps_in_sqrt: bool = True,
    lr_decay: float = 0.0,
    weight_decay: float = 0.0,
) -> np.ndarray:
    """JMLR 12, figure 1; with eps within the root as optax, or outside as torch."""
    p, v = p.astype(np.float64), np.full(p.shape, initial_accumulator_value)
    for t, g in enumerate(np.asarray(g, np.float64) for g in grads):
        g = g + weight_decay * p
        v = v + g**2
        root = np.sqrt(v + eps) if eps_in_sqrt else np.sqrt(v) + eps
        p = p - lr / (1 + t * lr_decay) * g / root
    return p


def lamb_float64(
    p: np.ndarray,
    grads: list[np.ndarray],
    lr: float,
    weight_decay: float,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
) -> np.ndarray:
    """arXiv 1904.00962 v5, algorithm 2, phi the identity."""
    b1, b2 = as_float32(b1, b2)
    p = p.astype(np.float64)
    for t, _, m, v in moments(grads, b1, b2):
        r = m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps)
        u = r + weight_decay * p
        p = p - lr * np.linalg.norm(p) / np.linalg.norm(u) * u
    return p


def lars_float64(
    p: np.ndarray,
    grads: list[np.ndarray],
    lr: float,
    weight_decay: float,
    trust_coefficient: float,
    momentum: float = 0.9,
) -> np.ndarray:
    """arXiv 1708.03888, algorithm 1, but with the norm of the sum."""
    p, m = p.astype(np.float64), np.zeros(p.shape)
    for g in grads:
        g = g + weight_decay * p
        rate = lr * trust_coefficient * np.linalg.norm(p) / np.linalg.norm(g)
        m = momentum * m + rate * g
        p = p - m
    return p


def sgd_float64(
    p: np.ndarray,
    grads: list[np.ndarray],
    lr: float,
    weight_decay: float,
    momentum: float | None = None,
) -> np.ndarray:
    """Polyak's heavy ball with L2 regularization, as in torch."""
    (momentum,) = as_float32(momentum or 0.0)
    p, m = p.astype(np.float64), np.zeros(p.shape)
    for g in grads:
        m = momentum * m + g + weight_decay * p
        p = p - lr * m
    return p


def sgd_of_optax(
    learning_rate: float, weight_decay: float, momentum: float | None = None
) -> optax.GradientTransformation:
    """What optax has instead of the argument `weight_decay`."""
    return optax.chain(
        optax.add_decayed_weights(weight_decay),
        optax.sgd(learning_rate, momentum=momentum),
    )


def amsgrad_of_optax(
    learning_rate: float, amsgrad: bool
) -> optax.GradientTransformation:
    """What optax has instead of the argument `amsgrad`."""
    assert amsgrad
    return optax.amsgrad(learning_rate)


def adagrad_of_optax(
    learning_rate: float, weight_decay: float, **kwargs: Any
) -> optax.GradientTransformation:
    """What optax has instead of the argument `weight_decay`."""
    return optax.chain(
        optax.add_decayed_weights(weight_decay),
        optax.adagrad(learning_rate, **kwargs),
    )
