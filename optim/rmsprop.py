"""RMSprop: steps divided by the root of a mean of squares, or of a variance."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax

from octavo.pallas_kernels import Rule, Slot, Tiles, divide, root

from .checks import check_bool, check_fraction, check_not_negative, is_traced
from .correction import bias_correction
from .momentum import (
    MomentumNumbers,
    MomentumScalars,
    check_nesterov,
    heavy_ball,
    is_absent,
    momentum_scalars,
    nesterov_ball,
    scalars_rate_first,
    trace_slot,
)
from .options import Options, with_options
from .stepping.transformation import Transformation, fused


@dataclass(frozen=True)
class RMSpropNumbers:
    """Hyperparameters."""

    decay: Any
    eps: Any
    eps_in_sqrt: bool
    bias_correction: bool
    momentum: MomentumNumbers

    def __post_init__(self) -> None:
        check_fraction(decay=self.decay)
        check_not_negative(eps=self.eps)
        check_bool(eps_in_sqrt=self.eps_in_sqrt, bias_correction=self.bias_correction)


class _Scalars(NamedTuple):
    decay: jax.Array
    correction: jax.Array
    inside: jax.Array
    outside: jax.Array
    momentum: MomentumScalars


def _scalars(momentum: Callable[..., MomentumScalars]) -> Callable[..., _Scalars]:
    def scalars(t: jax.Array, learning_rate: jax.Array, h: RMSpropNumbers) -> _Scalars:
        b, eps = (jnp.asarray(x, jnp.float32) for x in (h.decay, h.eps))
        zero, one = jnp.zeros_like(eps), jnp.ones_like(eps)
        correction = 1 / bias_correction(b, t) if h.bias_correction else one
        where = (eps, zero) if h.eps_in_sqrt else (zero, eps)
        return _Scalars(b, correction, *where, momentum(t, learning_rate, h.momentum))

    return scalars


def _by_squares(g: jax.Array, slots: Tiles, s: _Scalars) -> tuple[jax.Array, Tiles]:
    """Tieleman and Hinton, lecture 6e."""
    (v,) = slots
    v = s.decay * v + (1 - s.decay) * (g * g)
    return divide(g, root(s.correction * v + s.inside) + s.outside), (v,)


def _by_variance(g: jax.Array, slots: Tiles, s: _Scalars) -> tuple[jax.Array, Tiles]:
    """Graves, arXiv 1308.0850, equations 38 to 41.

    The variance itself is kept (West's recurrence): the difference of a mean of squares
    and a squared mean, as it is written there, loses all digits where both are close.
    """
    m, v = slots
    away = g - m
    m = m + (1 - s.decay) * away
    v = s.decay * (v + (1 - s.decay) * (away * away))
    return divide(g, root(v + s.inside) + s.outside), (m, v)


@cache
def rmsprop_rule(
    centered: bool,
    momentum: bool,
    nesterov: bool,
    rate_first: bool,
    initial: float | None,
) -> Rule:
    """The rule with a variance or not, and with momentum or not."""
    slots: tuple[Slot, ...] = (Slot("nu", signed=False, initial=initial),)
    scaled = _by_variance if centered else _by_squares
    if centered:
        mean = Slot("mu", signed=True, relative_to="variance")
        slots = (mean, Slot("variance", signed=False, initial=initial))
    if not momentum:
        return Rule(slots, _scalars(momentum_scalars), scaled, decay="gradient")
    ball = nesterov_ball if nesterov else heavy_ball

    def direction(g: jax.Array, all_: Tiles, s: _Scalars) -> tuple[jax.Array, Tiles]:
        u, moments = scaled(g, all_[:-1], s)
        u, trace = ball(u, all_[-1:], s.momentum)
        return u, (*moments, *trace)

    rate = scalars_rate_first if rate_first else momentum_scalars
    slots = (*slots, trace_slot(rate_first))
    return Rule(
        slots, _scalars(rate), direction, decay="gradient", rate_first=rate_first
    )


@with_options
def rmsprop(
    learning_rate: optax.ScalarOrSchedule,
    decay: float = 0.9,
    eps: float = 1e-8,
    initial_scale: float = 0.0,
    eps_in_sqrt: bool = True,
    centered: bool = False,
    momentum: float | None = None,
    nesterov: bool = False,
    bias_correction: bool = False,
    weight_decay: float = 0.0,
    mask: Any = None,
    learning_rate_first: bool = True,
    **options: Unpack[Options],
) -> Transformation:
    r"""RMSprop whose moments take 8 bits each.

    .. math::

        g' &= g + \lambda p, \qquad
        v \leftarrow \beta v + (1 - \beta) g'^2 \\
        m &\leftarrow \mu m + \eta \frac{g'}{\sqrt{v + \epsilon}}, \qquad
        p \leftarrow p - m

    Args:
      learning_rate: number or schedule; it may change without recompiling.
      decay: beta, in [0, 1). Default 0.9, as in optax (torch: 0.99).
      eps: not negative. Default 1e-8, as in optax and torch.
      initial_scale: with which v starts, not negative. Default 0. Within a traced
        `init` of `optax.inject_hyperparams` it has to be in `static_args`.
      eps_in_sqrt: whether eps is added to v (optax; the default), or to its root
        (torch).
      centered: whether v is the variance: the mean of squares minus the square of the
        mean, for which a mean is kept, too.
      momentum: mu, in [0, 1). Default None, or 0: there is none, and no slot of it.
      nesterov: whether to look ahead by the momentum, which it needs.
      bias_correction: whether v is divided by 1 - beta^t. Not where it is centered.
      weight_decay: lambda, not negative. Default 0.
      mask: which leaves decay: a tree of bools like the parameters or a prefix of
        them, or a function of the parameters that returns one. Default None: all.
      learning_rate_first: whether the learning rate multiplies what enters the momentum
        (optax; the default), or the step (torch). The two differ where it changes.
      **options: how state is stored and where the step runs, see
        `octavo.optim.Options`.

    Returns:
      An `optax.GradientTransformationExtraArgs`, which also has the fused `step`.

    Raises:
      ValueError: for a value outside its range, or arguments that exclude each other.

    State: 1.0625 bytes per parameter and moment (`state="8bit"`, blocks of 32), of
    which there are one to three; 4 in 32 bits.

    References:
      Tieleman and Hinton, Lecture 6.5, Neural Networks for Machine Learning (2012).
      Graves, Generating Sequences With Recurrent Neural Networks, arXiv 1308.0850,
      equations 38 to 41 (centered).

    >>> import jax.numpy as jnp
    >>> from octavo import optim
    >>> tx = optim.rmsprop(0.01)
    >>> params = {"w": jnp.ones((64, 128))}
    >>> params, state = tx.step({"w": jnp.ones((64, 128))}, tx.init(params), params)
    >>> print(f"{params['w'][0, 0]:.4f}")
    0.9684
    """
    check_not_negative(initial_scale=initial_scale)
    check_bool(
        centered=centered, nesterov=nesterov, learning_rate_first=learning_rate_first
    )
    check_nesterov(nesterov, momentum)
    if centered and bias_correction:
        raise ValueError(
            "centered=True with bias_correction=True: in the first step the corrected "
            "variance is 0, and the step is g / sqrt(eps). Leave one of them out"
        )
    ball = MomentumNumbers(0.0 if momentum is None else momentum)
    has_momentum = not is_absent(momentum)
    limit = options.get("max_unorm")
    if limit is not None and has_momentum and learning_rate_first:
        raise ValueError(
            f"max_unorm={limit}: it limits the step before the learning rate, which is "
            "in the momentum already. Write learning_rate_first=False, as in torch"
        )
    start = None if is_traced(initial_scale) else float(initial_scale)
    rule = rmsprop_rule(centered, has_momentum, nesterov, learning_rate_first, start)
    return fused(
        rule,
        RMSpropNumbers(decay, eps, eps_in_sqrt, bias_correction, ball),
        learning_rate,
        options,
        weight_decay=weight_decay,
        mask=mask,
    )
