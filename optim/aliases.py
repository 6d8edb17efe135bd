"""Optimizers under names that fix an argument: those of bitsandbytes, and optax'."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, ParamSpec

from .adagrad import adagrad
from .adam import adam, adamw
from .adamax import adamax
from .ademamix import ademamix
from .lamb import lamb
from .lars import lars
from .lion import lion
from .muon import muon
from .rmsprop import rmsprop
from .sgd import sgd
from .spelling import Callee, translated
from .stepping.transformation import Transformation

_P = ParamSpec("_P")


def _named(
    name: str, optimizer: Callable[_P, Transformation], **fixed: Any
) -> Callable[_P, Transformation]:
    signature = inspect.signature(optimizer)
    left = [p for p in signature.parameters.values() if p.name not in fixed]
    function = optimizer.__name__  # type: ignore[attr-defined]
    callee = Callee(name, function, signature.replace(parameters=left), fixed)
    arguments = ", ".join(f"{key}={value!r}" for key, value in fixed.items())
    made = partial(_called, optimizer, callee)
    made.__name__ = made.__qualname__ = name  # type: ignore[attr-defined]
    made.__module__ = __name__
    made.__signature__ = callee.signature  # type: ignore[attr-defined]
    made.__doc__ = f"`octavo.optim.{function}` with {arguments}: see there."
    return made


def _called(
    optimizer: Callable[..., Transformation], callee: Callee, /, *args: Any, **kw: Any
) -> Transformation:
    return optimizer(**translated(callee, args, kw), **callee.fixed)


def _stored(
    name: str, optimizer: Callable[_P, Transformation], **fixed: Any
) -> tuple[Callable[_P, Transformation], Callable[_P, Transformation]]:
    """With its state in 8 bits, and in 32."""
    return (
        _named(f"{name}8bit", optimizer, **fixed, state="8bit"),
        _named(f"{name}32bit", optimizer, **fixed, state="32bit"),
    )


def _paged(
    name: str, optimizer: Callable[_P, Transformation]
) -> tuple[Callable[_P, Transformation], ...]:
    """With its state in host memory: as usual, in 8 bits, and in 32."""
    plain = _named(f"paged_{name}", optimizer, paged=True)
    return plain, *_stored(f"paged_{name}", optimizer, paged=True)


nadam = _named("nadam", adam, nesterov=True)
nadamw = _named("nadamw", adamw, nesterov=True)
amsgrad = _named("amsgrad", adam, amsgrad=True)

# Written one by one, so that type checkers know the names.
adagrad8bit, adagrad32bit = _stored("adagrad", adagrad)
adam8bit, adam32bit = _stored("adam", adam)
adamax8bit, adamax32bit = _stored("adamax", adamax)
adamw8bit, adamw32bit = _stored("adamw", adamw)
ademamix8bit, ademamix32bit = _stored("ademamix", ademamix)
amsgrad8bit, amsgrad32bit = _stored("amsgrad", adam, amsgrad=True)
lamb8bit, lamb32bit = _stored("lamb", lamb)
lars8bit, lars32bit = _stored("lars", lars)
lion8bit, lion32bit = _stored("lion", lion)
muon8bit, muon32bit = _stored("muon", muon)
nadam8bit, nadam32bit = _stored("nadam", adam, nesterov=True)
nadamw8bit, nadamw32bit = _stored("nadamw", adamw, nesterov=True)
rmsprop8bit, rmsprop32bit = _stored("rmsprop", rmsprop)
sgd8bit, sgd32bit = _stored("sgd", sgd)

paged_adam, paged_adam8bit, paged_adam32bit = _paged("adam", adam)
paged_adamw, paged_adamw8bit, paged_adamw32bit = _paged("adamw", adamw)
paged_ademamix, paged_ademamix8bit, paged_ademamix32bit = _paged("ademamix", ademamix)
paged_lion, paged_lion8bit, paged_lion32bit = _paged("lion", lion)

# fmt: off
__all__ = [
    "nadam", "nadamw", "amsgrad",
    "adagrad8bit", "adagrad32bit", "adam8bit", "adam32bit",
    "adamax8bit", "adamax32bit", "adamw8bit", "adamw32bit",
    "ademamix8bit", "ademamix32bit", "amsgrad8bit", "amsgrad32bit",
    "lamb8bit", "lamb32bit", "lars8bit", "lars32bit",
    "lion8bit", "lion32bit", "muon8bit", "muon32bit",
    "nadam8bit", "nadam32bit", "nadamw8bit", "nadamw32bit",
    "rmsprop8bit", "rmsprop32bit", "sgd8bit", "sgd32bit",
    "paged_adam", "paged_adam8bit", "paged_adam32bit",
    "paged_adamw", "paged_adamw8bit", "paged_adamw32bit",
    "paged_ademamix", "paged_ademamix8bit", "paged_ademamix32bit",
    "paged_lion", "paged_lion8bit", "paged_lion32bit",
]
# fmt: on
