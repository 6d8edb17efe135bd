"""Ranges of hyperparameters, and warnings. Traced values pass: they are not known."""

import sys
import warnings
from collections.abc import Sequence
from numbers import Real
from typing import Any

import jax
import numpy as np
from jax.core import Tracer


def is_traced(value: Any) -> bool:
    """Whether a value is known only when the compiled program runs."""
    return isinstance(value, Tracer)


def is_number(value: Any) -> bool:
    """Whether it is one real number: no text, bool or tuple, and no array of many."""
    if isinstance(value, bool | np.bool_):
        return False
    if isinstance(value, np.ndarray | jax.Array):
        return value.ndim == 0
    return isinstance(value, Real | np.number)


def _text(value: Any) -> str:
    return str(value) if is_number(value) else repr(value)


def check_fraction(**values: Any) -> None:
    """Raise ValueError unless each value is a number in [0, 1)."""
    for name, value in values.items():
        if not is_traced(value) and not (is_number(value) and 0 <= value < 1):
            raise ValueError(f"{name}={_text(value)} must be in [0, 1)")


def check_not_negative(**values: Any) -> None:
    """Raise ValueError unless each value is a finite number of at least 0."""
    for name, value in values.items():
        if not is_traced(value) and not (is_number(value) and 0 <= value < np.inf):
            raise ValueError(f"{name}={_text(value)} must be finite and not negative")


def check_learning_rate(value: Any) -> None:
    """Raise ValueError unless it is a schedule, or a finite number of at least 0."""
    if callable(value) or is_traced(value):
        return
    if not is_number(value):
        raise ValueError(
            f"learning_rate={value!r} must be a number, or a schedule: a function of "
            "the number of steps taken"
        )
    if not 0 <= value < np.inf:
        raise ValueError(
            f"learning_rate={value} must be finite and not negative; steps go against "
            "the gradient already"
        )


def check_positive(**values: Any) -> None:
    """Raise ValueError unless each value is above 0; None passes, as not given."""
    for name, value in values.items():
        if value is None or is_traced(value):
            continue
        if not (is_number(value) and value > 0):
            raise ValueError(
                f"{name}={_text(value)} must be above 0, or None for no limit"
            )


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


def check_int(name: str, value: Any) -> None:
    """Raise ValueError unless a value is a Python int."""
    if isinstance(value, jax.Array):
        raise ValueError(
            f"{name} must be a Python int, not an array. With optax.inject_hyperparams "
            f"name it in static_args: inject_hyperparams(..., static_args={name!r})"
        )
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{name}={value!r} must be an int")


def check_block_size(size: Any, where: str) -> None:
    """Raise ValueError unless it is one; `where` follows it in the error."""
    check_int("block_size", size)
    if size <= 0 or size % 8:
        raise ValueError(
            f"block_size={size}{where} must be a positive multiple of 8, "
            "such as 32 or 128"
        )


def check_shards(count: Any, where: str) -> None:
    """Raise ValueError unless it is a number of shards; `where` follows its name."""
    check_int(f"min_shards{where}", count)
    if count < 1:
        raise ValueError(f"min_shards{where}={count} must be 1 or more")


_LIBRARIES = ("octavo", "jax", "optax", "flax", "functools", "contextlib", "chex")
_given: set[str] = set()


def warn_once(message: str) -> None:
    """Warn at the innermost line outside of Octavo and of the libraries around it."""
    if message in _given:
        return
    _given.add(message)
    frame, depth = sys._getframe(1), 2
    while frame.f_back is not None and _is_library(frame.f_globals["__name__"]):
        frame, depth = frame.f_back, depth + 1
    warnings.warn(message, stacklevel=depth)


def _is_library(module: str) -> bool:
    return module.partition(".")[0] in _LIBRARIES
