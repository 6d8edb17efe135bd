"""Adamax: Adam by the largest gradient in place of the mean of squares."""

from typing import NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax

from octavo.pallas_kernels import Rule, Slot, Tiles, divide, root

from .adam import AdamNumbers
from .correction import bias_correction
from .options import Options, with_options
from .stepping.transformation import Transformation, fused


class _Scalars(NamedTuple):
    b1: jax.Array
    b2: jax.Array
    correction: jax.Array
    eps: jax.Array


def _scalars(t: jax.Array, learning_rate: jax.Array, h: AdamNumbers) -> _Scalars:
    del learning_rate
    b1, b2, eps = (jnp.asarray(x, jnp.float32) for x in (h.b1, h.b2, h.eps))
    return _Scalars(b1, b2, 1 / bias_correction(b1, t), eps)


def _direction(g: jax.Array, slots: Tiles, s: _Scalars) -> tuple[jax.Array, Tiles]:
    """arXiv 1412.6980, algorithm 2, whose u is the root of this v."""
    m, v = slots
    m = s.b1 * m + (1 - s.b1) * g
    size = jnp.abs(g) + s.eps
    v = jnp.maximum(s.b2 * s.b2 * v, size * size)
    u = s.correction * divide(m, root(v))
    return jnp.where(v > 0.0, u, 0.0), (m, v)


# Squares, as second moments are: formats and `relative_to` are made for them.
ADAMAX = Rule(
    slots=(
        Slot("mu", signed=True, relative_to="nu"),
        Slot("nu", signed=False, in_optax="root"),
    ),
    scalars=_scalars,
    direction=_direction,
)


@with_options
def adamax(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    **options: Unpack[Options],
) -> Transformation:
    r"""Adamax whose moments take 8 bits each.

    .. math::

        m &\leftarrow \beta_1 m + (1 - \beta_1) g, \qquad
        n \leftarrow \max(\beta_2 n, \lvert g \rvert + \epsilon) \\
        p &\leftarrow p - \eta \frac{m}{(1 - \beta_1^t) \, n}

    The slot `nu` holds the square of n.

    Args:
      learning_rate: number or schedule; it may change without recompiling.
      b1: decay of the first moment, in [0, 1). Default 0.9, the paper's.
      b2: decay of the largest gradient, in [0, 1). Default 0.999, the paper's.
      eps: added to the gradient's magnitude, not negative. Default 1e-8, as in optax.
      **options: how state is stored and where the step runs, see
        `octavo.optim.Options`.

    Returns:
      An `optax.GradientTransformationExtraArgs`, which also has the fused `step`.

    Raises:
      ValueError: for a value outside its range.

    State: 2.125 bytes per parameter (`state="8bit"`, blocks of 32); 8 in 32 bits.

    References:
      Kingma and Ba, Adam: A Method for Stochastic Optimization, arXiv 1412.6980,
      algorithm 2.

    >>> import jax.numpy as jnp
    >>> from octavo import optim
    >>> tx = optim.adamax(2e-3)
    >>> params = {"w": jnp.ones((64, 128))}
    >>> params, state = tx.step({"w": jnp.ones((64, 128))}, tx.init(params), params)
    >>> print(f"{params['w'][0, 0]:.4f}")
    0.9980
    """
    return fused(ADAMAX, AdamNumbers(b1, b2, eps), learning_rate, options)
