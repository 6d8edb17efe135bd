"""How the learning rate follows the batch size."""

import math
from typing import Literal

from .domains import Choice, Real, check


def scale_lr(
    base_lr: float,
    batch: float,
    base_batch: float,
    rule: Literal["sqrt", "linear"] = "sqrt",
) -> float:
    """The learning rate for ``batch``, from the one that suits ``base_batch``::

        base_lr sqrt(batch / base_batch)   or   base_lr batch / base_batch

    Args:
        base_lr: rate tuned at ``base_batch``, 0 or more.
        batch: examples (or tokens) per update, above 0.
        base_batch: the same in the run that was tuned.
        rule: "sqrt" for optimizers that divide by the gradient's size, as Adam and
            LAMB do (https://arxiv.org/abs/1904.00962); "linear" for SGD with
            momentum (https://arxiv.org/abs/1706.02677).

    Raises:
        ValueError: an argument out of its range, an unknown rule.

    Example:
        >>> from octavo import schedules
        >>> schedules.scale_lr(1e-3, batch=4096, base_batch=256)
        0.004
        >>> schedules.scale_lr(0.1, batch=1024, base_batch=256, rule="linear")
        0.4
    """
    size = Real(open_low=True)
    base_lr = check("scale_lr", "base_lr", base_lr, Real())
    batch = check("scale_lr", "batch", batch, size)
    base_batch = check("scale_lr", "base_batch", base_batch, size)
    check("scale_lr", "rule", rule, Choice(("sqrt", "linear")))
    factor = batch / base_batch
    return base_lr * (math.sqrt(factor) if rule == "sqrt" else factor)
