"""Adagrad: steps divided by the root of the sum of all squares."""

from dataclasses import dataclass
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax

from octavo.pallas_kernels import Rule, Slot, Tiles, divide, root

from .checks import check_bool, check_not_negative, is_traced
from .options import Options, with_options
from .stepping.transformation import Transformation, fused


@dataclass(frozen=True)
class AdagradNumbers:
    """Hyperparameters."""

    eps: Any
    lr_decay: Any
    eps_in_sqrt: bool

    def __post_init__(self) -> None:
        check_not_negative(eps=self.eps, lr_decay=self.lr_decay)
        check_bool(eps_in_sqrt=self.eps_in_sqrt)


class _Scalars(NamedTuple):
    rate: jax.Array
    inside: jax.Array
    outside: jax.Array


def _scalars(t: jax.Array, learning_rate: jax.Array, h: AdagradNumbers) -> _Scalars:
    del learning_rate
    eps, zero = jnp.asarray(h.eps, jnp.float32), jnp.float32(0.0)
    rate = 1 / (1 + (t - 1) * jnp.asarray(h.lr_decay, jnp.float32))
    return _Scalars(rate, *((eps, zero) if h.eps_in_sqrt else (zero, eps)))


def _direction(g: jax.Array, slots: Tiles, s: _Scalars) -> tuple[jax.Array, Tiles]:
    """Duchi, Hazan and Singer, figure 1: diagonal matrices."""
    (v,) = slots
    v = v + g * g
    u = s.rate * divide(g, root(v + s.inside) + s.outside)
    return jnp.where(v > 0.0, u, 0.0), (v,)


def adagrad_rule(initial: float | None) -> Rule:
    """The rule whose sum starts so; None: it is traced."""
    slot = Slot("sum_of_squares", signed=False, initial=initial)
    return Rule((slot,), _scalars, _direction, decay="gradient")


@with_options
def adagrad(
    learning_rate: optax.ScalarOrSchedule,
    initial_accumulator_value: float = 0.1,
    eps: float = 1e-7,
    eps_in_sqrt: bool = True,
    lr_decay: float = 0.0,
    weight_decay: float = 0.0,
    mask: Any = None,
    **options: Unpack[Options],
) -> Transformation:
    r"""Adagrad, whose sum of squares takes 8 bits.

    .. math::

        g' &= g + \lambda p, \qquad v \leftarrow v + g'^2 \\
        p &\leftarrow p - \frac{\eta}{1 + (t - 1) \delta}
            \frac{g'}{\sqrt{v + \epsilon}}

    Args:
      learning_rate: number or schedule; it may change without recompiling.
      initial_accumulator_value: with which v starts, not negative. Default 0.1, as in
        optax (torch: 0). Within a traced `init` of `optax.inject_hyperparams` it has to
        be in `static_args`.
      eps: not negative. Default 1e-7, as in optax (torch: 1e-10).
      eps_in_sqrt: whether eps is added to v (optax; the default), or to its root
        (torch, the paper).
      lr_decay: delta, not negative. Default 0.
      weight_decay: lambda, not negative. Default 0.
      mask: which leaves decay: a tree of bools like the parameters or a prefix of
        them, or a function of the parameters that returns one. Default None: all.
      **options: how state is stored and where the step runs, see
        `octavo.optim.Options`.

    Returns:
      An `optax.GradientTransformationExtraArgs`, which also has the fused `step`.

    Raises:
      ValueError: for a value outside its range.

    State: 1.0625 bytes per parameter (`state="8bit"`, blocks of 32); 4 in 32 bits.

    References:
      Duchi, Hazan and Singer, Adaptive Subgradient Methods for Online Learning and
      Stochastic Optimization, JMLR 12 (2011), figure 1.

    >>> import jax.numpy as jnp
    >>> from octavo import optim
    >>> tx = optim.adagrad(0.1, initial_accumulator_value=0.0)
    >>> params = {"w": jnp.ones((64, 128))}
    >>> params, state = tx.step({"w": jnp.ones((64, 128))}, tx.init(params), params)
    >>> print(f"{params['w'][0, 0]:.4f}")
    0.9000
    """
    start = initial_accumulator_value
    check_not_negative(initial_accumulator_value=start)
    return fused(
        adagrad_rule(None if is_traced(start) else float(start)),
        AdagradNumbers(eps, lr_decay, eps_in_sqrt),
        learning_rate,
        options,
        weight_decay=weight_decay,
        mask=mask,
    )
