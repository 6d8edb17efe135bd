"""Muon: momentum, whose matrices are made orthogonal before they are a step."""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax

from octavo.pallas_kernels import Rule, Slot, Tiles

from .adam import ADAM, NESTEROV, AdamNumbers
from .checks import (
    check_bool,
    check_fraction,
    check_int,
    check_not_negative,
    check_positive,
    is_number,
)
from .correction import bias_correction
from .matrices.newton_schulz import Orthogonal, iterations
from .matrices.optimizer import Arguments, MatrixOptimizer
from .matrices.whole import LARGEST
from .options import Options, Settings, with_options
from .stepping.optimizer import Optimizer
from .stepping.transformation import Transformation


@dataclass(frozen=True)
class MuonNumbers:
    """Hyperparameters of the momentum."""

    beta: Any
    nesterov: bool

    def __post_init__(self) -> None:
        check_fraction(beta=self.beta)
        check_bool(nesterov=self.nesterov)


class _Scalars(NamedTuple):
    beta: jax.Array
    of_m: jax.Array
    of_g: jax.Array


def _scalars(t: jax.Array, learning_rate: jax.Array, h: MuonNumbers) -> _Scalars:
    del learning_rate
    beta = jnp.asarray(h.beta, jnp.float32)
    if not h.nesterov:
        return _Scalars(beta, 1 / bias_correction(beta, t), jnp.zeros_like(beta))
    # Of the next step, whose momentum is looked ahead to.
    of_m = beta / bias_correction(beta, t + 1)
    return _Scalars(beta, of_m, (1 - beta) / bias_correction(beta, t))


def _direction(g: jax.Array, slots: Tiles, s: _Scalars) -> tuple[jax.Array, Tiles]:
    """What Newton-Schulz takes."""
    (m,) = slots
    m = s.beta * m + (1 - s.beta) * g
    return s.of_m * m + s.of_g * g, (m,)


MUON = Rule(
    slots=(Slot("mu", signed=True),),
    scalars=_scalars,
    direction=_direction,
    decay="update",
)


_ORTHOGONAL = replace(MUON, slots=(Slot("mu", signed=True, orthogonal=True),))
_LARGEST_BETA = 0.96  # up to which `Mixed8` decays as it should


def _rule(beta: Any) -> Rule:
    """How momentum is stored must not depend on what is known within `jit` alone."""
    known = isinstance(beta, int | float)
    return _ORTHOGONAL if known and beta <= _LARGEST_BETA else MUON


@with_options
def muon(
    learning_rate: optax.ScalarOrSchedule,
    ns_coeffs: Any = "standard",
    ns_steps: int | None = None,
    beta: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    weight_decay_mask: Any = None,
    *,
    nesterov: bool = True,
    adaptive: bool = False,
    preconditioning: str = "frobenius",
    adam_b1: float = 0.9,
    adam_b2: float = 0.999,
    adam_weight_decay: float = 0.0,
    adam_learning_rate: optax.ScalarOrSchedule | None = None,
    muon_weight_dimension_numbers: Any = None,
    consistent_rms: float | None = 0.2,
    muon_mask: Any = None,
    ns_dtype: Any = None,
    max_matrix_size: int | None = None,
    **options: Unpack[Options],
) -> Transformation:
    r"""Muon for hidden matrices, with a momentum of 8 bits, and AdamW for the rest.

    .. math::

        m &\leftarrow \beta m + (1 - \beta) g, \qquad
        u = \frac{\beta m}{1 - \beta^{t+1}} + \frac{(1 - \beta) g}{1 - \beta^t} \\
        p &\leftarrow p - \eta \left( c \sqrt{\max(r, s)} \, \mathrm{NS}(u)
            + \lambda p \right)

    for matrices of r rows and s columns, where NS(u) has the singular vectors of u, and
    singular values near 1. All other leaves take `adamw`.

    Args:
      learning_rate: number or schedule; it may change without recompiling.
      ns_coeffs: coefficients of Newton-Schulz: `"standard"`, `"dion"`, three numbers,
        or a tuple of three for each step.
      ns_steps: its steps. Default None: 5, or one for each row of `ns_coeffs`.
      beta: decay of the momentum, in [0, 1). Default 0.95, as in optax.
      eps: added to the norm of a matrix, and to the root in AdamW.
      weight_decay: lambda of matrices, not negative. Default 0.
      weight_decay_mask: which matrices decay: a tree of bools like the parameters or a
        prefix of them, or a function of the parameters that returns one. Default None:
        all.
      nesterov: whether u looks ahead, as above; without, it is m / (1 - beta**t). Of
        AdamW, too.
      adaptive: multiply NS(u) by the sum of its products with u, of each matrix.
      preconditioning: what u is divided by first: `"frobenius"`, `"spectral"`, `"aol"`
        or `"schatten"`.
      adam_b1: b1 of AdamW.
      adam_b2: b2 of AdamW.
      adam_weight_decay: its decay. Default 0.
      adam_learning_rate: its rate. Default None: `learning_rate`.
      muon_weight_dimension_numbers: which leaves are matrices, and which of their axes
        are rows and columns: a tree of `optax.contrib.MuonDimensionNumbers`, or None
        for AdamW, like the parameters; a prefix; or a function of the parameters that
        returns one. All other axes are stacks.
      consistent_rms: c. Default 0.2: steps are as long as AdamW's, and one learning
        rate serves both. None, the default of optax: sqrt(max(1, s / r)) in place of
        c sqrt(max(r, s)).
      muon_mask: which leaves are matrices, where their axes are plain: a tree of bools
        as `weight_decay_mask`. Default None: those whose layers (see the option
        `layer_axes`) have rank 2, but for embeddings and heads: leaves below a name
        that contains `embed`, or is `wte`, `wpe`, `head`, `lm_head`, `logits` or
        `classifier`.
      ns_dtype: type in which products of Newton-Schulz are computed, and in which
        matrices travel between devices; sums are float32. Default None: that of the
        gradients.
      max_matrix_size: values in a matrix that one device may compute; XLA partitions
        the products of larger ones. Default None: 2**28, a GiB in float32.
      **options: how state is stored and where the step runs, see
        `octavo.optim.Options`, but `max_unorm` and `record_norms`.

    Returns:
      An `optax.GradientTransformationExtraArgs`, which also has the fused `step`.

    Raises:
      ValueError: for a value outside its range, or one that does not fit a leaf; from
        `init`, where a device reports too little memory for a whole matrix.

    State: 1.0156 bytes per parameter of matrices (`state="8bit"`, blocks of 128), 4 in
    32 bits; 2.125 and 8 of all others. Where beta exceeds 0.96, or is an array, blocks
    of 32 and unbiased rounding: 1.0625 bytes.

    References:
      Jordan et al., Muon: An optimizer for hidden layers in neural networks, 2024.
      Liu et al., Muon is Scalable for LLM Training, arXiv 2502.16982.

    >>> import jax.numpy as jnp
    >>> from octavo import optim
    >>> tx = optim.muon(0.01)
    >>> params = {"w": jnp.ones((64, 64)), "bias": jnp.ones(64)}
    >>> state = tx.init(params)
    >>> state.muon.mu["w"].dtype, state.adam.mu["bias"].dtype
    (dtype('int8'), dtype('float32'))
    >>> grads = {"w": jnp.eye(64), "bias": jnp.ones(64)}
    >>> params, state = tx.step(grads, state, params)
    >>> print(f"{params['bias'][0]:.4f}")
    0.9853
    """
    how = iterations(ns_coeffs, ns_steps, preconditioning, adaptive, ns_dtype)
    check_not_negative(eps=eps, adam_weight_decay=adam_weight_decay)
    check_positive(consistent_rms=consistent_rms)
    if is_number(weight_decay):
        check_not_negative(weight_decay=weight_decay)
    # None, and no number: inject_hyperparams would make an array of that.
    largest = LARGEST if max_matrix_size is None else max_matrix_size
    check_int("max_matrix_size", largest)
    if muon_mask is not None and muon_weight_dimension_numbers is not None:
        raise ValueError(
            "muon_mask with muon_weight_dimension_numbers, which already has None for "
            "leaves that take AdamW: give one of them"
        )
    settings = _settings(options)
    adam = replace(NESTEROV if nesterov else ADAM, decay="update")
    second = learning_rate if adam_learning_rate is None else adam_learning_rate
    numbers = MuonNumbers(beta, nesterov), AdamNumbers(adam_b1, adam_b2, eps)
    masks = {"mask": weight_decay_mask, "adapt_mask": None}
    free = {"mask": None, "adapt_mask": None}
    rule = _rule(beta)
    made = MatrixOptimizer(
        Optimizer(rule, numbers[0], learning_rate, settings, weight_decay, masks),
        Optimizer(adam, numbers[1], second, settings, adam_weight_decay, free),
        settings,
        Orthogonal(how, eps, consistent_rms, largest),
        Arguments(muon_weight_dimension_numbers, muon_mask),
        adam_learning_rate is None,
    )
    return Transformation(made)


def _settings(options: Options) -> Settings:
    settings = Settings.of(options, ADAM.slots)
    for name, why in _REFUSED.items():
        if getattr(settings, name):
            raise ValueError(
                f"{name}={getattr(settings, name)!r}: muon does not have it, because "
                f"{why}. Leave it out; grad_clip_norm, grad_clip_value and "
                "percentile_clipping are there"
            )
    return settings


_REFUSED = {
    "max_unorm": "each step of a matrix has the same length, which consistent_rms says",
    "record_norms": "norms are those before matrices are made orthogonal, and not of "
    "their steps",
}
