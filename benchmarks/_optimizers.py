"""Octavo's optimizers by name, each with that of optax."""

import inspect
from collections.abc import Callable
from functools import partial, update_wrapper
from typing import Any, NamedTuple

import optax
import optax.contrib

from octavo import optim

# Arguments of both without which there would be nothing to compare.
_ARGUMENTS: dict[str, dict[str, Any]] = {"sgd": {"momentum": 0.9}}


class Pair(NamedTuple):
    """One optimizer twice: functions of the learning rate."""

    ours: Callable[..., optim.Transformation]
    optax: Callable[..., optax.GradientTransformation]


def _is_optimizer(function: Any) -> bool:
    """Unlike names with fixed state, such as adam8bit, it is a function itself."""
    if not inspect.isfunction(function):
        return False
    first = next(iter(inspect.signature(function).parameters), None)
    return first == "learning_rate"


def _pair(name: str, function: Callable[..., optim.Transformation]) -> Pair:
    own = _ARGUMENTS.get(name, {})
    theirs = getattr(optax if hasattr(optax, name) else optax.contrib, name)
    ours = update_wrapper(partial(function, **own), function) if own else function
    return Pair(ours, partial(theirs, **own))


OPTIMIZERS: dict[str, Pair] = {
    name: _pair(name, function)
    for name, function in sorted(vars(optim).items())
    if _is_optimizer(function)
}
