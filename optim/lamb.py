"""LAMB: Adam whose step on each layer is as long as the layer's weights allow."""

from dataclasses import dataclass, replace
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import optax

from octavo.pallas_kernels import Norms

from .adam import ADAM, AdamNumbers
from .checks import check_bool, check_bounds
from .options import Options, with_options
from .stepping.transformation import Transformation, fused

Bounds = tuple[float, float] | None


@dataclass(frozen=True)
class LambNumbers(AdamNumbers):
    """Hyperparameters: Adam's, and the bounds of phi and of the ratio."""

    trust_ratio_bounds: Bounds = None
    ratio_bounds: Bounds = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bool(
            bias_correction=self.bias_correction, grad_averaging=self.grad_averaging
        )
        check_bounds(
            trust_ratio_bounds=self.trust_ratio_bounds, ratio_bounds=self.ratio_bounds
        )


def _ratio(norm: Norms, decay: jax.Array, h: LambNumbers) -> jax.Array:
    """arXiv 1904.00962 v5, algorithm 2."""
    del decay
    phi = _clamped(norm.p, h.trust_ratio_bounds)
    r = _clamped(phi / norm.x, h.ratio_bounds)
    return jnp.where((norm.p > 0.0) & (norm.x > 0.0), r, 1.0)


def _clamped(x: jax.Array, bounds: Bounds) -> jax.Array:
    return x if bounds is None else jnp.clip(x, *bounds)


LAMB = replace(ADAM, decay="direction", ratio=_ratio, scales="direction")


@with_options
def lamb(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    weight_decay: float = 0.0,
    mask: Any = None,
    adapt_mask: Any = None,
    bias_correction: bool = True,
    grad_averaging: bool = True,
    trust_ratio_bounds: Bounds = None,
    ratio_bounds: Bounds = None,
    **options: Unpack[Options],
) -> Transformation:
    r"""LAMB, for large batches, whose moments take 8 bits each.

    .. math::

        u &= \frac{m / (1 - \beta_1^t)}{\sqrt{v / (1 - \beta_2^t)} + \epsilon}
             + \lambda p, \qquad
        r = \frac{\phi(\lVert p \rVert)}{\lVert u \rVert} \\
        p &\leftarrow p - \eta \, r \, u

    with the moments m and v of `adam`, the norms of one layer, and r = 1 where either
    is 0. Published implementations differ: `optim.preset` has them by name.

    Args:
      learning_rate: number or schedule; it may change without recompiling.
      b1: decay of the first moment, in [0, 1). Default 0.9, the paper's.
      b2: decay of the second moment, in [0, 1). Default 0.999, the paper's.
      eps: added to the root, not negative. Default 1e-6, the paper's.
      weight_decay: the factor of p in u, not negative. Default 0, as in optax (the
        paper: 0.01).
      mask: which leaves decay: a tree of bools like the parameters or a prefix of
        them, or a function of the parameters that returns one. Default None: all.
      adapt_mask: which leaves get a ratio, likewise. Default None: those whose layers
        have rank 2 and up, not biases and norms, whose weights' norm says little.
      bias_correction: whether to divide the moments by 1 - b**t.
      grad_averaging: whether gradients enter m with weight 1 - b1 (the paper) or 1.
      trust_ratio_bounds: (low, high) of phi, which clamps the norm of the weights.
        Default None: phi is the identity.
      ratio_bounds: (low, high) of r where it is not 1 for want of a norm. Default None.
      **options: how state is stored and where the step runs, see
        `octavo.optim.Options`; `layer_axes` if layers are stacked.

    Returns:
      An `optax.GradientTransformationExtraArgs`, which also has the fused `step`.

    Raises:
      ValueError: for a value outside its range.

    State: 2.125 bytes per parameter (`state="8bit"`, blocks of 32); 8 in 32 bits. The
    kernels move 26.4 bytes of memory per float32 parameter, in two passes.

    References:
      You et al., Large Batch Optimization for Deep Learning: Training BERT in 76
      minutes, arXiv 1904.00962 v5, algorithm 2.

    >>> import jax.numpy as jnp
    >>> from octavo import optim
    >>> tx = optim.lamb(0.1)
    >>> params = {"w": jnp.full((64, 128), 2.0)}
    >>> params, state = tx.step({"w": jnp.ones((64, 128))}, tx.init(params), params)
    >>> print(f"{params['w'][0, 0]:.4f}")
    1.8000
    """
    numbers = LambNumbers(
        b1,
        b2,
        eps,
        bias_correction,
        grad_averaging,
        trust_ratio_bounds,
        ratio_bounds,
    )
    return fused(
        LAMB,
        numbers,
        learning_rate,
        options,
        weight_decay=weight_decay,
        mask=mask,
        adapt_mask=adapt_mask,
    )
