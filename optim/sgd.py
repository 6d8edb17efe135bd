"""SGD: gradient descent with momentum."""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax

from octavo.pallas_kernels import Rule, Slot

from .checks import check_bool, check_fraction, check_not_negative, is_traced
from .options import Options, with_options
from .stepping.transformation import Transformation, fused


@dataclass(frozen=True)
class MomentumNumbers:
    """Hyperparameters."""

    momentum: Any
    dampening: Any = 0.0

    def __post_init__(self) -> None:
        check_fraction(momentum=self.momentum, dampening=self.dampening)


class _Scalars(NamedTuple):
    momentum: jax.Array
    rate: jax.Array
    weight: jax.Array


def _scalars(t: jax.Array, learning_rate: jax.Array, h: MomentumNumbers) -> _Scalars:
    # The first gradient enters undampened, as in torch.
    weight = jnp.where(t > 1.0, 1.0 - jnp.asarray(h.dampening, jnp.float32), 1.0)
    momentum = jnp.asarray(h.momentum, jnp.float32)
    return _Scalars(momentum, jnp.ones_like(learning_rate), weight)


def _scalars_rate_first(
    t: jax.Array, learning_rate: jax.Array, h: MomentumNumbers
) -> _Scalars:
    return _scalars(t, learning_rate, h)._replace(rate=learning_rate)


def _heavy_ball(
    g: jax.Array, slots: tuple[jax.Array, ...], s: _Scalars
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    (m,) = slots
    m = s.momentum * m + s.weight * (s.rate * g)
    return m, (m,)


def _nesterov(
    g: jax.Array, slots: tuple[jax.Array, ...], s: _Scalars
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    m, _ = _heavy_ball(g, slots, s)
    return s.rate * g + s.momentum * m, (m,)


def momentum_rule(
    numbers: MomentumNumbers, nesterov: bool, rate_first: bool = False
) -> Rule:
    """Gradient descent with momentum; `rate_first`: of gradients times their rate.

    Raises:
      ValueError: for numbers with which Nesterov's momentum is not defined.
    """
    for name, value, wrong in (
        ("momentum", numbers.momentum, lambda x: x == 0),
        ("dampening", numbers.dampening, lambda x: x != 0),
    ):
        if nesterov and not is_traced(value) and wrong(value):
            raise ValueError(
                f"nesterov=True with {name}={value}: it needs momentum above 0 and "
                "dampening 0"
            )
    return Rule(
        slots=(Slot("trace", signed=True),),
        scalars=_scalars_rate_first if rate_first else _scalars,
        direction=_nesterov if nesterov else _heavy_ball,
        rate_first=rate_first,
    )


@with_options
def sgd(
    learning_rate: optax.ScalarOrSchedule,
    momentum: float = 0.9,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    mask: Any = None,
    dampening: float = 0.0,
    **options: Unpack[Options],
) -> Transformation:
    r"""SGD with momentum, which takes 8 bits.

    .. math::

        m \leftarrow \mu m + (1 - \tau)(g + \lambda p), \qquad
        p \leftarrow p - \eta m

    Args:
      learning_rate: number or schedule; it may change without recompiling.
      momentum: mu, in [0, 1). Default 0.9.
      nesterov: whether to step by g + mu m instead. It needs momentum, and no
        dampening.
      weight_decay: lambda, not negative. Default 0.
      mask: which leaves decay: a tree of bools like the parameters or a prefix of
        them, or a function of the parameters that returns one. Default None: all.
      dampening: tau, of gradients after the first; in [0, 1). Default 0.
      **options: how state is stored and where the step runs, see
        `octavo.optim.Options`.

    Returns:
      An `optax.GradientTransformationExtraArgs`, which also has the fused `step`.

    Raises:
      ValueError: for a value outside its range.

    State: 1.0625 bytes per parameter (`state="8bit"`, blocks of 32); 4 in 32 bits.

    References:
      Sutskever et al., On the importance of initialization and momentum in deep
      learning, ICML 2013; torch.optim.SGD, whose conventions these are.

    >>> import jax.numpy as jnp
    >>> from octavo import optim
    >>> tx = optim.sgd(0.1)
    >>> params = {"w": jnp.ones((64, 128))}
    >>> params, state = tx.step({"w": jnp.ones((64, 128))}, tx.init(params), params)
    >>> print(f"{params['w'][0, 0]:.4f}")
    0.9000
    """
    check_not_negative(weight_decay=weight_decay)
    check_bool(nesterov=nesterov)
    numbers = MomentumNumbers(momentum, dampening)
    rule = replace(momentum_rule(numbers, nesterov), decay="gradient")
    return fused(
        rule, numbers, learning_rate, options, weight_decay=weight_decay, mask=mask
    )
