"""Which optimizer of bitsandbytes or torch wrote moments, from all that is saved."""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple


class Kind(NamedTuple):
    """What an optimizer keeps of each parameter.

    Attributes:
      writer: the optimizer.
      moments: from Octavo's slot, or from what is kept in its place, to the saved name.
    """

    writer: str
    moments: Mapping[str, str]


SIGNED = ("mu", "trace", "m1", "m2")
_VARIANCE = {"variance": "square_avg", "mu": "grad_avg"}  # without grad_avg's square
_TORCH = (
    Kind("torch's Adam or AdamW", {"mu": "exp_avg", "nu": "exp_avg_sq"}),
    Kind(
        "torch's Adam with amsgrad",
        # optax and Octavo correct its bias before they take the maximum.
        {"mu": "exp_avg", "nu": "exp_avg_sq", "biased nu_max": "max_exp_avg_sq"},
    ),
    Kind("torch's Adamax", {"mu": "exp_avg", "root of nu": "exp_inf"}),
    Kind("torch's SGD", {"trace": "momentum_buffer"}),
    Kind("torch's RMSprop", {"nu": "square_avg"}),
    Kind("torch's RMSprop", {"nu": "square_avg", "trace": "momentum_buffer"}),
    Kind("torch's RMSprop", _VARIANCE),
    Kind("torch's RMSprop", _VARIANCE | {"trace": "momentum_buffer"}),
    Kind("torch's Adagrad", {"sum_of_squares": "sum"}),
)
_ADAM = Kind("bitsandbytes' Adam, AdamW or LAMB", {"mu": "state1", "nu": "state2"})
_ADEMAMIX = Kind(
    "bitsandbytes' AdEMAMix", {"m1": "state1[0]", "m2": "state1[1]", "nu": "state2"}
)
_LION = Kind("bitsandbytes' Lion", {"mu": "state1"})
_MOMENTUM = Kind("bitsandbytes' SGD or LARS", {"trace": "state1"})
_RMSPROP = Kind("bitsandbytes' RMSprop", {"nu": "state1"})
_ADAGRAD = Kind("bitsandbytes' Adagrad", {"sum_of_squares": "state1"})


def kinds_of(saved: Collection[str], group: Mapping[str, Any]) -> tuple[Kind, ...]:
    """What may have written the moments of a parameter.

    Args:
      saved: the names of its moments; AdEMAMix' are `state1[0]` and `state1[1]`.
      group: its parameter group, which has the hyperparameters.

    Raises:
      ValueError: if nothing does that is known.
    """
    if not any(name.startswith("state1") for name in saved):
        found = tuple(k for k in _TORCH if set(k.moments.values()) == set(saved))
        if not found:
            raise ValueError(
                f"its moments are {', '.join(saved)}: of an optimizer of torch that "
                "Octavo does not know, or of one that keeps something else"
            )
        return found
    missing = [k for k in ("betas", "eps") if k not in group]
    if missing:
        raise ValueError(f"its parameter group has no {', '.join(missing)}")
    betas, eps = group["betas"], group["eps"]
    if "state2" not in saved:
        return _with_one_moment(betas, eps)
    kind = _ADEMAMIX if len(betas) == 3 else _ADAM
    if set(kind.moments.values()) != set(saved):
        raise ValueError(
            f"its moments are {', '.join(saved)}, but betas={betas} are those of "
            f"{kind.writer}, which keeps {', '.join(kind.moments.values())}"
        )
    return (kind,)


def _with_one_moment(betas: Any, eps: float) -> tuple[Kind, ...]:
    """Only hyperparameters tell these apart."""
    if eps > 0:
        return (_RMSPROP if betas[0] > 0 else _ADAGRAD,)
    # Dampening, which bitsandbytes ignores, is in the place of Lion's second beta.
    return (_LION, _MOMENTUM) if betas[1] > 0 else (_MOMENTUM,)
