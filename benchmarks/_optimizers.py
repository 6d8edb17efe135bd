"""Octavo's optimizers by name, each with that of optax."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import optax

from octavo import optim

# Arguments with which optax' optimizer is Octavo's with its defaults.
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


OPTIMIZERS: dict[str, Pair] = {
    name: Pair(function, partial(getattr(optax, name), **_ARGUMENTS.get(name, {})))
    for name, function in sorted(vars(optim).items())
    if _is_optimizer(function)
}
