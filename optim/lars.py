"""LARS: momentum whose gradients are as long as the layer's weights allow."""

from dataclasses import dataclass, replace
from typing import Any, Literal, Unpack

import jax
import jax.numpy as jnp
import optax

from octavo.pallas_kernels import Norms

from .checks import check_bool, check_not_negative
from .momentum import MomentumNumbers, check_nesterov, momentum_rule
from .options import Options, with_options
from .stepping.transformation import Transformation, fused


@dataclass(frozen=True)
class LarsNumbers(MomentumNumbers):
    """Hyperparameters: of the momentum, and of the ratio."""

    trust_coefficient: Any = 0.001
    eps: Any = 0.0
    decay_norm: str = "together"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_not_negative(trust_coefficient=self.trust_coefficient, eps=self.eps)
        if self.decay_norm not in ("together", "apart"):
            raise ValueError(
                f"decay_norm={self.decay_norm!r} must be 'together' or 'apart'"
            )


def _ratio(norm: Norms, decay: jax.Array, h: LarsNumbers) -> jax.Array:
    """arXiv 1708.03888, algorithm 1."""
    length = norm.x
    if h.decay_norm == "apart" and norm.g is not None:
        length = norm.g + decay * norm.p
    r = h.trust_coefficient * norm.p / (length + h.eps)
    return jnp.where((norm.p > 0.0) & (length > 0.0), r, 1.0)


@with_options
def lars(
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: float = 0.0,
    trust_coefficient: float = 0.001,
    eps: float = 0.0,
    mask: Any = None,
    adapt_mask: Any = None,
    momentum: float = 0.9,
    dampening: float = 0.0,
    nesterov: bool = False,
    decay_norm: Literal["together", "apart"] = "together",
    learning_rate_first: bool = True,
    **options: Unpack[Options],
) -> Transformation:
    r"""LARS, for large batches, whose momentum takes 8 bits.

    .. math::

        g' &= g + \lambda p, \qquad
        r = \frac{c \lVert p \rVert}{\lVert g' \rVert + \epsilon} \\
        m &\leftarrow \mu m + \eta \, r \, g', \qquad
        p \leftarrow p - m

    with the norms of one layer, and r = 1 where either is 0. Published implementations
    differ: `optim.preset` has them by name.

    The option `max_unorm` is refused: a limit in place of the ratio is bitsandbytes'
    LARS, `optim.preset("lars-bitsandbytes", learning_rate)`.

    Args:
      learning_rate: number or schedule; it may change without recompiling.
      weight_decay: lambda, not negative. Default 0, as in optax.
      trust_coefficient: c, not negative. Default 0.001, the paper's.
      eps: added to the gradient's norm, not negative. Default 0, as in optax.
      mask: which leaves decay: a tree of bools like the parameters or a prefix of
        them, or a function of the parameters that returns one. Default None: all.
      adapt_mask: which leaves get a ratio, likewise. Default None: those whose layers
        have rank 2 and up, not biases and norms, whose weights' norm says little.
      momentum: mu, in [0, 1). Default 0.9, the paper's.
      dampening: gradients after the first enter m with weight 1 - dampening; in
        [0, 1). Default 0.
      nesterov: whether to step by g + mu m. It needs momentum, and no dampening.
      decay_norm: `"together"`: r divides by the norm of g' (optax); `"apart"`: by the
        norm of g plus lambda times that of p, as in the paper.
      learning_rate_first: whether the learning rate multiplies the gradients on their
        way into m (the paper, optax; the default), or the step (torch, braintools). The
        two differ where it changes.
      **options: how state is stored and where the step runs, see
        `octavo.optim.Options`; `layer_axes` if layers are stacked.

    Returns:
      An `optax.GradientTransformationExtraArgs`, which also has the fused `step`.

    Raises:
      ValueError: for a value outside its range, or arguments that exclude each other.

    State: 1.0625 bytes per parameter (`state="8bit"`, blocks of 32); 4 in 32 bits. The
    kernels move 22.1 bytes of memory per float32 parameter, in two passes.

    References:
      You, Gitman and Ginsburg, Large Batch Training of Convolutional Networks, arXiv
      1708.03888, algorithm 1.

    >>> import jax.numpy as jnp
    >>> from octavo import optim
    >>> tx = optim.lars(1.0, trust_coefficient=0.1)
    >>> params = {"w": jnp.full((64, 128), 2.0)}
    >>> params, state = tx.step({"w": jnp.ones((64, 128))}, tx.init(params), params)
    >>> print(f"{params['w'][0, 0]:.4f}")
    1.8000
    """
    check_bool(nesterov=nesterov, learning_rate_first=learning_rate_first)
    limit = options.get("max_unorm")
    if limit is not None:
        raise ValueError(
            f"max_unorm={limit}: LARS' ratio sets the length of a step "
            "already. Leave max_unorm out, or write optim.preset('lars-bitsandbytes', "
            "learning_rate, max_unorm=...), which has no ratio"
        )
    check_nesterov(nesterov, momentum, dampening)
    numbers = LarsNumbers(momentum, dampening, trust_coefficient, eps, decay_norm)
    rule = replace(
        momentum_rule(nesterov, rate_first=learning_rate_first),
        decay="gradient",
        ratio=_ratio,
        scales="gradient",
    )
    return fused(
        rule,
        numbers,
        learning_rate,
        options,
        weight_decay=weight_decay,
        mask=mask,
        adapt_mask=adapt_mask,
    )
