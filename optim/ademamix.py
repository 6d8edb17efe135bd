"""AdEMAMix: Adam with a second, much slower first moment."""

from dataclasses import dataclass
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax

from octavo.pallas_kernels import Rule, Slot, Tiles, divide, root

from .adam import AdamNumbers
from .checks import check_fraction, check_not_negative, check_positive
from .correction import bias_correction
from .options import Options, with_options
from .stepping.transformation import Transformation, fused


@dataclass(frozen=True)
class AdemamixNumbers(AdamNumbers):
    """Hyperparameters: Adam's, and those of the slow moment."""

    b3: Any = 0.9999
    alpha: Any = 5.0
    t_alpha: Any = None
    t_beta3: Any = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value, check in (
            ("b3", self.b3, check_fraction),
            ("alpha", self.alpha, check_not_negative),
        ):
            warmup = "t_beta3" if name == "b3" else "t_alpha"
            if not callable(value):
                check(**{name: value})
            elif getattr(self, warmup) is not None:
                raise ValueError(
                    f"{name} is a schedule, and {warmup}={getattr(self, warmup)}: give "
                    f"one of them. {warmup} is the paper's warmup, for a number"
                )
        check_positive(t_alpha=self.t_alpha, t_beta3=self.t_beta3)


class _Scalars(NamedTuple):
    b1: jax.Array
    b2: jax.Array
    b3: jax.Array
    correction: jax.Array
    alpha: jax.Array
    eps: jax.Array


def _scalars(t: jax.Array, learning_rate: jax.Array, h: AdemamixNumbers) -> _Scalars:
    del learning_rate
    b1, b2, eps = (jnp.asarray(x, jnp.float32) for x in (h.b1, h.b2, h.eps))
    c1, c2 = bias_correction(b1, t), bias_correction(b2, t)
    b3, alpha = (_value(x, t) for x in (h.b3, h.alpha))
    if h.t_alpha is not None:
        alpha = alpha * jnp.minimum(t / h.t_alpha, 1.0)
    if h.t_beta3 is not None:
        b3 = _warmed(b1, b3, t / h.t_beta3)
    root_c2 = jnp.sqrt(c2)
    return _Scalars(b1, b2, b3, root_c2 / c1, alpha * root_c2, eps * root_c2)


def _value(x: Any, t: jax.Array) -> jax.Array:
    """Of a number or a schedule, which takes the number of steps taken before."""
    return jnp.asarray(x((t - 1).astype(jnp.int32)) if callable(x) else x, jnp.float32)


def _warmed(b1: jax.Array, b3: jax.Array, s: jax.Array) -> jax.Array:
    """From b1 to b3, linear in the half-life: the paper's appendix A.1."""
    s = jnp.minimum(s, 1.0)
    warmed = jnp.exp(1 / ((1 - s) / jnp.log(b1) + s / jnp.log(b3)))
    return jnp.minimum(warmed, b3)


def _direction(g: jax.Array, slots: Tiles, s: _Scalars) -> tuple[jax.Array, Tiles]:
    """arXiv 2409.03137, algorithm 1."""
    m1, m2, v = slots
    m1 = s.b1 * m1 + (1 - s.b1) * g
    m2 = s.b3 * m2 + (1 - s.b3) * g
    v = s.b2 * v + (1 - s.b2) * (g * g)
    u = divide(s.correction * m1 + s.alpha * m2, root(v) + s.eps)
    return u, (m1, m2, v)


ADEMAMIX = Rule(
    slots=(
        Slot("m1", signed=True, relative_to="nu"),
        Slot("m2", signed=True, slow=True),
        Slot("nu", signed=False),
    ),
    scalars=_scalars,
    direction=_direction,
    decay="update",
)


@with_options
def ademamix(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    b3: optax.ScalarOrSchedule = 0.9999,
    alpha: optax.ScalarOrSchedule = 5.0,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    mask: Any = None,
    t_alpha: float | None = None,
    t_beta3: float | None = None,
    **options: Unpack[Options],
) -> Transformation:
    r"""AdEMAMix, whose moments take 8, 16 and 8 bits.

    .. math::

        m_1 &\leftarrow \beta_1 m_1 + (1 - \beta_1) g, \qquad
        m_2 \leftarrow \beta_3 m_2 + (1 - \beta_3) g, \qquad
        v \leftarrow \beta_2 v + (1 - \beta_2) g^2 \\
        p &\leftarrow p - \eta \left( \frac{m_1 / (1 - \beta_1^t) + \alpha m_2}
            {\sqrt{v / (1 - \beta_2^t)} + \epsilon} + \lambda p \right)

    Args:
      learning_rate: number or schedule; it may change without recompiling.
      b1: decay of the fast moment, in [0, 1). Default 0.9, the paper's.
      b2: decay of the second moment, in [0, 1). Default 0.999, the paper's.
      b3: decay of the slow moment, in [0, 1), or a schedule of it. Default 0.9999, the
        paper's: it remembers some 10,000 steps.
      alpha: weight of the slow moment, not negative, or a schedule of it. Default 5,
        the paper's, which has 4 to 10.
      eps: added to the root, not negative. Default 1e-8, as in optax.
      weight_decay: lambda, decoupled, not negative. Default 0, as in optax.
      mask: which leaves decay: a tree of bools like the parameters or a prefix of
        them, or a function of the parameters that returns one. Default None: all.
      t_alpha: steps in which alpha rises linearly from 0, above 0. Default None: none.
        The paper takes the length of the run; without it early steps are unstable.
      t_beta3: steps in which the slow moment's decay rises from b1 to b3, linearly in
        its half-life, above 0. Default None: none. Likewise.
      **options: how state is stored and where the step runs, see
        `octavo.optim.Options`.

    Returns:
      An `optax.GradientTransformationExtraArgs`, which also has the fused `step`.

    Raises:
      ValueError: for a value outside its range, and for a warmup of a schedule.

    State: 4.1875 bytes per parameter (`state="8bit"`, blocks of 32); 12 in 32 bits. The
    slow moment takes 16 bits, since the noise of 8 would add up over 10,000 steps.

    References:
      Pagliardini, Ablin and Grangier, The AdEMAMix Optimizer: Better, Faster, Older,
      arXiv 2409.03137, algorithm 1 and appendix A.1.

    >>> import jax.numpy as jnp
    >>> from octavo import optim
    >>> tx = optim.ademamix(1e-3, t_alpha=10_000, t_beta3=10_000)
    >>> params = {"w": jnp.ones((64, 128))}
    >>> params, state = tx.step({"w": jnp.ones((64, 128))}, tx.init(params), params)
    >>> print(f"{params['w'][0, 0]:.4f}")
    0.9990
    """
    numbers = AdemamixNumbers(
        b1, b2, eps, b3=b3, alpha=alpha, t_alpha=t_alpha, t_beta3=t_beta3
    )
    return fused(
        ADEMAMIX, numbers, learning_rate, options, weight_decay=weight_decay, mask=mask
    )
