"""SGD: gradient descent, with momentum or without."""

from dataclasses import replace
from typing import Any, Unpack

import jax
import optax

from octavo.pallas_kernels import Rule, Tiles

from .checks import check_bool, is_traced
from .momentum import (
    MomentumNumbers,
    MomentumScalars,
    check_nesterov,
    is_absent,
    momentum_rule,
    momentum_scalars,
)
from .options import Options, with_options
from .stepping.transformation import Transformation, fused


def _descent(g: jax.Array, slots: Tiles, s: MomentumScalars) -> tuple[jax.Array, Tiles]:
    del s
    return g, slots


DESCENT = Rule(slots=(), scalars=momentum_scalars, direction=_descent)


@with_options
def sgd(
    learning_rate: optax.ScalarOrSchedule,
    momentum: float | None = None,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    mask: Any = None,
    dampening: float = 0.0,
    **options: Unpack[Options],
) -> Transformation:
    r"""SGD, whose momentum takes 8 bits.

    .. math::

        m \leftarrow \mu m + (1 - \tau)(g + \lambda p), \qquad
        p \leftarrow p - \eta m

    Args:
      learning_rate: number or schedule; it may change without recompiling.
      momentum: mu, in [0, 1). Default None, or 0: there is none, and no state.
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

    State: 1.0625 bytes per parameter (`state="8bit"`, blocks of 32); 4 in 32 bits; none
    without momentum.

    References:
      Sutskever et al., On the importance of initialization and momentum in deep
      learning, ICML 2013; torch.optim.SGD, whose conventions these are.

    >>> import jax.numpy as jnp
    >>> from octavo import optim
    >>> tx = optim.sgd(0.1, momentum=0.9)
    >>> params = {"w": jnp.ones((64, 128))}
    >>> params, state = tx.step({"w": jnp.ones((64, 128))}, tx.init(params), params)
    >>> print(f"{params['w'][0, 0]:.4f}")
    0.9000
    """
    check_bool(nesterov=nesterov)
    numbers = MomentumNumbers(0.0 if momentum is None else momentum, dampening)
    check_nesterov(nesterov, momentum, dampening)
    absent = is_absent(momentum)
    if absent and not is_traced(dampening) and dampening != 0:
        raise ValueError(
            f"dampening={dampening} without momentum: there is nothing to dampen. "
            "Leave it out, or write momentum=0.9"
        )
    rule = DESCENT if absent else momentum_rule(nesterov)
    return fused(
        replace(rule, decay="gradient"),
        numbers,
        learning_rate,
        options,
        weight_decay=weight_decay,
        mask=mask,
    )
