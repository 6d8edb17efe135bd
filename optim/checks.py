"""Ranges of hyperparameters. Traced ones pass: their values are not known."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.core import Tracer


def is_traced(value: Any) -> bool:
    """Whether a value is known only when the compiled program runs."""
    return isinstance(value, Tracer)


def check_fraction(**values: Any) -> None:
    """Raise ValueError unless each value is in [0, 1)."""
    for name, value in values.items():
        if not is_traced(value) and not 0 <= value < 1:
            raise ValueError(f"{name}={value} must be in [0, 1)")


def check_not_negative(**values: Any) -> None:
    """Raise ValueError unless each value is finite and at least 0."""
    for name, value in values.items():
        if not is_traced(value) and not 0 <= value < np.inf:
            raise ValueError(f"{name}={value} must be finite and not negative")


def check_positive(**values: Any) -> None:
    """Raise ValueError unless each value is above 0; None passes, as not given."""
    for name, value in values.items():
        if value is None or is_traced(value):
            continue
        if isinstance(value, str) or not value > 0:
            raise ValueError(f"{name}={value} must be above 0, or None for no limit")


def check_bool(**values: Any) -> None:
    """Raise ValueError unless each value is True or False."""
    for name, value in values.items():
        if not isinstance(value, bool | np.bool_):
            raise ValueError(f"{name}={value!r} must be True or False")


def check_bounds(**values: Any) -> None:
    """Raise ValueError unless each value is (low, high), 0 <= low <= high, or None."""
    for name, value in values.items():
        if value is None:
            continue
        if not isinstance(value, Sequence) or len(value) != 2:
            raise ValueError(f"{name}={value!r} must be (low, high), or None")
        low, high = value
        if not is_traced(low) and not is_traced(high) and not 0 <= low <= high:
            raise ValueError(f"{name}={value} must be (low, high), 0 <= low <= high")
