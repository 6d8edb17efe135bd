"""LARS: momentum whose gradients are as long as the layer's weights allow."""

from dataclasses import replace
from typing import Any, Literal, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax

from octavo.pallas_kernels import Decay, Norms, Rule, Slot

from .checks import check_bool, check_fraction, check_not_negative, is_traced
from .fused import Transformation, fused
from .options import Options, with_options


class _MomentumScalars(NamedTuple):
    momentum: jax.Array
    rate: jax.Array
    weight: jax.Array


def momentum_rule(
    momentum: Any,
    dampening: Any = 0.0,
    nesterov: bool = False,
    decay: Decay | None = None,
    *,
    rate_first: bool = False,
) -> Rule:
    """Gradient descent with momentum; `rate_first`: of gradients times their rate.

    The first gradient enters undampened, as in torch.
    """
    check_fraction(momentum=momentum, dampening=dampening)

    def scalars(t: jax.Array, learning_rate: jax.Array) -> _MomentumScalars:
        rate = learning_rate if rate_first else jnp.ones_like(learning_rate)
        weight = jnp.where(t > 1.0, 1.0 - jnp.asarray(dampening, jnp.float32), 1.0)
        return _MomentumScalars(jnp.asarray(momentum, jnp.float32), rate, weight)

    def direction(
        g: jax.Array,
        p: jax.Array | None,
        slots: tuple[jax.Array, ...],
        s: _MomentumScalars,
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        del p
        (m,) = slots
        g = s.rate * g
        m = s.momentum * m + s.weight * g
        return (g + s.momentum * m if nesterov else m), (m,)

    slots = (Slot("trace", signed=True),)
    return Rule(slots, scalars, direction, decay=decay, rate_first=rate_first)


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
    learning_rate_first: bool | None = None,
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

    With the option `max_unorm` it is bitsandbytes' LARS instead: no trust ratio, but a
    step of momentum at most `max_unorm` times as long as the weights, times the
    learning rate.

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
        way into m (the paper, optax), or the step (torch, braintools). The two differ
        where it changes. Default None: first, but not with `max_unorm`.
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
    check_not_negative(
        weight_decay=weight_decay, trust_coefficient=trust_coefficient, eps=eps
    )
    limited = options.get("max_unorm") is not None
    _check_combination(momentum, dampening, nesterov, decay_norm)
    if limited and learning_rate_first:
        raise ValueError(
            "learning_rate_first=True with max_unorm: the limit is on the step before "
            "the learning rate; leave learning_rate_first out"
        )
    rate_first = not limited if learning_rate_first is None else learning_rate_first
    check_bool(nesterov=nesterov, learning_rate_first=rate_first)

    def ratio(norm: Norms, decay: jax.Array) -> jax.Array:
        length = norm.x
        if decay_norm == "apart":
            assert norm.g is not None
            length = norm.g + decay * norm.p
        r = trust_coefficient * norm.p / (length + eps)
        return jnp.where((norm.p > 0.0) & (length > 0.0), r, 1.0)

    rule = momentum_rule(
        momentum,
        dampening,
        nesterov,
        Decay(weight_decay, joins="gradient"),
        rate_first=rate_first,
    )
    if not limited:
        rule = replace(rule, ratio=ratio, scales="gradient")
    return fused(rule, learning_rate, options, mask=mask, adapt_mask=adapt_mask)


def _check_combination(
    momentum: Any, dampening: Any, nesterov: bool, decay_norm: str
) -> None:
    if decay_norm not in ("together", "apart"):
        raise ValueError(f"decay_norm={decay_norm!r} must be 'together' or 'apart'")
    for name, value, wrong in (
        ("momentum", momentum, lambda x: x == 0),
        ("dampening", dampening, lambda x: x != 0),
    ):
        if nesterov and not is_traced(value) and wrong(value):
            raise ValueError(
                f"nesterov=True with {name}={value}: it needs momentum above 0 and "
                "dampening 0"
            )
