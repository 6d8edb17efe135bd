"""Adam and AdamW."""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax

from octavo.pallas_kernels import Rule, Slot, Tiles, divide, root

from .checks import check_bool, check_fraction, check_not_negative
from .correction import bias_correction
from .options import Options, with_options
from .stepping.transformation import Transformation, fused


@dataclass(frozen=True)
class AdamNumbers:
    """Hyperparameters. Without `grad_averaging`, gradients enter m with weight 1."""

    b1: Any
    b2: Any
    eps: Any
    bias_correction: bool = True
    grad_averaging: bool = True

    def __post_init__(self) -> None:
        check_fraction(b1=self.b1, b2=self.b2)
        check_not_negative(eps=self.eps)


class _Scalars(NamedTuple):
    b1: jax.Array
    b2: jax.Array
    weight: jax.Array
    correction: jax.Array
    eps: jax.Array


def _scalars(t: jax.Array, learning_rate: jax.Array, h: AdamNumbers) -> _Scalars:
    del learning_rate
    b1, b2, eps = (jnp.asarray(x, jnp.float32) for x in (h.b1, h.b2, h.eps))
    weight = 1 - b1 if h.grad_averaging else jnp.ones_like(b1)
    if not h.bias_correction:
        return _Scalars(b1, b2, weight, jnp.float32(1.0), eps)
    c1, c2 = bias_correction(b1, t), bias_correction(b2, t)
    root = jnp.sqrt(c2)
    return _Scalars(b1, b2, weight, root / c1, eps * root)


def _direction(g: jax.Array, slots: Tiles, s: _Scalars) -> tuple[jax.Array, Tiles]:
    """arXiv 1412.6980, algorithm 1, in the order of its section 2."""
    m, v = slots
    m = s.b1 * m + s.weight * g
    v = s.b2 * v + (1 - s.b2) * (g * g)
    # (m / c1) / (sqrt(v / c2) + eps), with the corrections moved into scalars.
    u = s.correction * divide(m, root(v) + s.eps)
    return u, (m, v)


class _NesterovScalars(NamedTuple):
    b1: jax.Array
    b2: jax.Array
    of_m: jax.Array
    of_g: jax.Array
    eps: jax.Array


def _nesterov_scalars(
    t: jax.Array, learning_rate: jax.Array, h: AdamNumbers
) -> _NesterovScalars:
    s = _scalars(t, learning_rate, h)
    # Of the next step, whose momentum is looked ahead to.
    ahead = bias_correction(s.b1, t) / bias_correction(s.b1, t + 1)
    of_m, of_g = s.b1 * s.correction * ahead, (1 - s.b1) * s.correction
    return _NesterovScalars(s.b1, s.b2, of_m, of_g, s.eps)


def _nesterov(
    g: jax.Array, slots: Tiles, s: _NesterovScalars
) -> tuple[jax.Array, Tiles]:
    """Dozat, Incorporating Nesterov Momentum into Adam, without its factor of v."""
    m, v = slots
    m = s.b1 * m + (1 - s.b1) * g
    v = s.b2 * v + (1 - s.b2) * (g * g)
    u = divide(s.of_m * m + s.of_g * g, root(v) + s.eps)
    return u, (m, v)


class _MaximumScalars(NamedTuple):
    b1: jax.Array
    b2: jax.Array
    of_m: jax.Array
    of_v: jax.Array
    eps: jax.Array


def _maximum_scalars(
    t: jax.Array, learning_rate: jax.Array, h: AdamNumbers
) -> _MaximumScalars:
    del learning_rate
    b1, b2, eps = (jnp.asarray(x, jnp.float32) for x in (h.b1, h.b2, h.eps))
    of_m, of_v = 1 / bias_correction(b1, t), 1 / bias_correction(b2, t)
    return _MaximumScalars(b1, b2, of_m, of_v, eps)


def _amsgrad(g: jax.Array, slots: Tiles, s: _MaximumScalars) -> tuple[jax.Array, Tiles]:
    """arXiv 1904.09237, algorithm 2, with the bias corrections that optax has."""
    m, v, largest = slots
    m = s.b1 * m + (1 - s.b1) * g
    v = s.b2 * v + (1 - s.b2) * (g * g)
    largest = jnp.maximum(largest, s.of_v * v)
    u = s.of_m * divide(m, root(largest) + s.eps)
    return u, (m, v, largest)


ADAM = Rule(
    slots=(Slot("mu", signed=True, relative_to="nu"), Slot("nu", signed=False)),
    scalars=_scalars,
    direction=_direction,
)
NESTEROV = replace(ADAM, scalars=_nesterov_scalars, direction=_nesterov)
AMSGRAD = Rule(
    slots=(
        Slot("mu", signed=True, relative_to="nu_max"),
        # The noise of 8 bits would lift the maximum, by a tenth of its root and more.
        Slot("nu", signed=False, slow=True),
        Slot("nu_max", signed=False, nearest=True),
    ),
    scalars=_maximum_scalars,
    direction=_amsgrad,
)


def _rule(nesterov: bool, amsgrad: bool) -> Rule:
    check_bool(nesterov=nesterov, amsgrad=amsgrad)
    if nesterov and amsgrad:
        raise ValueError(
            "nesterov=True with amsgrad=True: nobody has defined both together. Write "
            "one of them"
        )
    return NESTEROV if nesterov else AMSGRAD if amsgrad else ADAM


@with_options
def adam(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    nesterov: bool = False,
    amsgrad: bool = False,
    **options: Unpack[Options],
) -> Transformation:
    r"""Adam whose moments take 8 bits each.

    .. math::

        m &\leftarrow \beta_1 m + (1 - \beta_1) g, \qquad
        v \leftarrow \beta_2 v + (1 - \beta_2) g^2 \\
        p &\leftarrow p - \eta \frac{m / (1 - \beta_1^t)}
                                    {\sqrt{v / (1 - \beta_2^t)} + \epsilon}

    Args:
      learning_rate: number or schedule; it may change without recompiling.
      b1: decay of the first moment, in [0, 1). Default 0.9, the paper's.
      b2: decay of the second moment, in [0, 1). Default 0.999, the paper's.
      eps: added to the root, not negative. Default 1e-8, the paper's.
      nesterov: NAdam: step by the moment that the next step will have, as far as it is
        known: beta_1 m + (1 - beta_1) g in place of m, each corrected.
      amsgrad: divide by the largest root that v had so far, in a third slot: steps
        cannot get longer again where gradients get rare.
      **options: how state is stored and where the step runs, see
        `octavo.optim.Options`.

    Returns:
      An `optax.GradientTransformationExtraArgs`, which also has the fused `step`.

    Raises:
      ValueError: for a value outside its range, and for both variants at once.

    State: 2.125 bytes per parameter (`state="8bit"`, blocks of 32); 8 in 32 bits. With
    `amsgrad` 4.125 and 12: its v takes 16.

    References:
      Kingma and Ba, Adam: A Method for Stochastic Optimization, arXiv 1412.6980,
      algorithm 1. Dozat, Incorporating Nesterov Momentum into Adam, ICLR 2016. Reddi et
      al., On the Convergence of Adam and Beyond, arXiv 1904.09237, algorithm 2.

    >>> import jax.numpy as jnp
    >>> from octavo import optim
    >>> tx = optim.adam(1e-3)
    >>> params = {"w": jnp.ones((64, 128))}
    >>> state = tx.init(params)
    >>> state.mu["w"].dtype, state.mu_scale["w"].shape
    (dtype('int8'), (16, 128))
    >>> params, state = tx.step({"w": jnp.ones((64, 128))}, state, params)
    >>> print(f"{params['w'][0, 0]:.4f}")
    0.9990
    """
    rule = _rule(nesterov, amsgrad)
    return fused(rule, AdamNumbers(b1, b2, eps), learning_rate, options)


@with_options
def adamw(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 1e-4,
    mask: Any = None,
    nesterov: bool = False,
    amsgrad: bool = False,
    **options: Unpack[Options],
) -> Transformation:
    r"""Adam with decoupled weight decay, whose moments take 8 bits each.

    .. math::

        p \leftarrow p - \eta \left( \frac{m / (1 - \beta_1^t)}
            {\sqrt{v / (1 - \beta_2^t)} + \epsilon} + \lambda p \right)

    with the moments of `adam`.

    Args:
      learning_rate: number or schedule; it may change without recompiling.
      b1: decay of the first moment, in [0, 1). Default 0.9, the paper's.
      b2: decay of the second moment, in [0, 1). Default 0.999, the paper's.
      eps: added to the root, not negative. Default 1e-8, the paper's.
      weight_decay: the factor of p, not negative, multiplied by the learning rate.
        Default 1e-4, as in optax (torch: 1e-2).
      mask: which leaves decay: a tree of bools like the parameters or a prefix of
        them, or a function of the parameters that returns one. Default None: all.
      nesterov: see `adam`.
      amsgrad: see `adam`.
      **options: how state is stored and where the step runs, see
        `octavo.optim.Options`.

    Returns:
      An `optax.GradientTransformationExtraArgs`, which also has the fused `step`.

    Raises:
      ValueError: for a value outside its range.

    State: 2.125 bytes per parameter (`state="8bit"`, blocks of 32); 8 in 32 bits.

    References:
      Loshchilov and Hutter, Decoupled Weight Decay Regularization, arXiv 1711.05101,
      algorithm 2 (its schedule multiplier is the learning rate's).

    >>> import jax.numpy as jnp
    >>> from octavo import optim
    >>> tx = optim.adamw(1e-3, weight_decay=0.1, state="dynamic8")
    >>> params = {"w": jnp.ones((64, 128))}
    >>> params, state = tx.step({"w": jnp.zeros((64, 128))}, tx.init(params), params)
    >>> print(f"{params['w'][0, 0]:.4f}")
    0.9999
    """
    return fused(
        replace(_rule(nesterov, amsgrad), decay="update"),
        AdamNumbers(b1, b2, eps),
        learning_rate,
        options,
        weight_decay=weight_decay,
        mask=mask,
    )
