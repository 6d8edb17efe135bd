"""Lion: the sign of a momentum."""

from dataclasses import dataclass
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax

from octavo.pallas_kernels import Rule, Slot, Tiles

from .checks import check_fraction
from .options import Options, with_options
from .stepping.transformation import Transformation, fused


@dataclass(frozen=True)
class LionNumbers:
    """Hyperparameters."""

    b1: Any
    b2: Any

    def __post_init__(self) -> None:
        check_fraction(b1=self.b1, b2=self.b2)


class _Scalars(NamedTuple):
    b1: jax.Array
    b2: jax.Array


def _scalars(t: jax.Array, learning_rate: jax.Array, h: LionNumbers) -> _Scalars:
    del t, learning_rate
    return _Scalars(jnp.asarray(h.b1, jnp.float32), jnp.asarray(h.b2, jnp.float32))


def _direction(g: jax.Array, slots: Tiles, s: _Scalars) -> tuple[jax.Array, Tiles]:
    """arXiv 2302.06675, algorithm 2."""
    (m,) = slots
    u = jnp.sign(s.b1 * m + (1 - s.b1) * g)
    return u, (s.b2 * m + (1 - s.b2) * g,)


LION = Rule((Slot("mu", signed=True),), _scalars, _direction, decay="update")


@with_options
def lion(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.99,
    weight_decay: float = 1e-3,
    mask: Any = None,
    **options: Unpack[Options],
) -> Transformation:
    r"""Lion, whose one moment takes 8 bits.

    .. math::

        u &= \operatorname{sign}(\beta_1 m + (1 - \beta_1) g), \qquad
        m \leftarrow \beta_2 m + (1 - \beta_2) g \\
        p &\leftarrow p - \eta (u + \lambda p)

    Args:
      learning_rate: number or schedule; it may change without recompiling. Every value
        moves by all of it in each step: 3 to 10 times smaller than AdamW's.
      b1: weight of the moment in the step, in [0, 1). Default 0.9, the paper's.
      b2: decay of the moment, in [0, 1). Default 0.99, the paper's.
      weight_decay: lambda, decoupled, not negative. Default 1e-3, as in optax; 3 to 10
        times AdamW's, since the learning rate is smaller.
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
      Chen et al., Symbolic Discovery of Optimization Algorithms, arXiv 2302.06675,
      algorithm 2.

    >>> import jax.numpy as jnp
    >>> from octavo import optim
    >>> tx = optim.lion(1e-2, weight_decay=0.0)
    >>> params = {"w": jnp.ones((64, 128))}
    >>> grads = {"w": jnp.full((64, 128), 3.0)}
    >>> params, state = tx.step(grads, tx.init(params), params)
    >>> print(f"{params['w'][0, 0]:.4f}")
    0.9900
    """
    numbers = LionNumbers(b1, b2)
    return fused(
        LION, numbers, learning_rate, options, weight_decay=weight_decay, mask=mask
    )
