"""Ranges of hyperparameters. Traced ones pass: their values are not known."""

from typing import Any

import numpy as np
from jax.core import Tracer


def check_fraction(**values: Any) -> None:
    """Raise ValueError unless each value is in [0, 1)."""
    for name, value in values.items():
        if _known(value) and not 0 <= value < 1:
            raise ValueError(f"{name}={value} must be in [0, 1)")


def check_not_negative(**values: Any) -> None:
    """Raise ValueError unless each value is finite and at least 0."""
    for name, value in values.items():
        if _known(value) and not 0 <= value < np.inf:
            raise ValueError(f"{name}={value} must be finite and not negative")


def _known(value: Any) -> bool:
    return not isinstance(value, Tracer)
