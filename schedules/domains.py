"""What a field of a schedule may hold, said once, in the field's type.

``warmup_steps: Count = 0`` reads as a type to a checker and as a rule to
``Schedule``: the annotation carries a domain, and a domain is a function that
returns the value in its stored form or raises ``ValueError`` saying what is
allowed. The schedule adds its own name and the field's in front.
"""

import functools
import itertools
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any, get_type_hints

import numpy as np

# Steps are counted in int32, as optax counts them.
LAST_STEP = 2**31 - 1


@dataclass(frozen=True)
class Real:
    """A finite number from ``low`` to ``high``, stored as a Python float."""

    low: float = 0.0
    high: float = math.inf
    open_low: bool = False

    def __call__(self, value: object) -> float:
        number = self._as_float(value)
        above = number > self.low if self.open_low else number >= self.low
        if not (math.isfinite(number) and above and number <= self.high):
            raise ValueError(f"must be a finite number {self}")
        return number

    def _as_float(self, value: object) -> float:
        plain = isinstance(value, (int, float, np.number)) and not isinstance(
            value, (bool, complex, np.complexfloating)
        )
        if plain:
            return float(value)  # pyright: ignore[reportArgumentType]
        raise ValueError(
            f"must be a Python number {self}, not {type(value).__name__}; "
            "a schedule is a constant, so turn arrays into floats first"
        )

    def __str__(self) -> str:
        low = f"above {self.low:g}" if self.open_low else f"of at least {self.low:g}"
        return low if math.isinf(self.high) else f"{low} and at most {self.high:g}"


@dataclass(frozen=True)
class Whole:
    """A whole number from ``low`` to the last int32, stored as a Python int."""

    low: int = 0

    def __call__(self, value: object) -> int:
        rule = f"must be a whole number from {self.low} to {LAST_STEP}"
        if isinstance(value, (bool, np.bool_)):
            raise ValueError(rule)
        if isinstance(value, float) and value.is_integer():
            raise ValueError(f"{rule}; write {int(value)}")
        try:
            number = operator.index(value)  # pyright: ignore[reportArgumentType]
        except TypeError:
            raise ValueError(rule) from None
        if not self.low <= number <= LAST_STEP:
            raise ValueError(rule)
        return number


@dataclass(frozen=True)
class Choice:
    """One of a few words."""

    words: tuple[str, ...]

    def __call__(self, value: object) -> str:
        if isinstance(value, str) and value in self.words:
            return value
        raise ValueError(f"must be one of {', '.join(map(repr, self.words))}")


@dataclass(frozen=True)
class Flag:
    """True or False."""

    def __call__(self, value: object) -> bool:
        if isinstance(value, bool):
            return value
        raise ValueError("must be True or False")


@dataclass(frozen=True)
class Maybe:
    """None, or a value of another domain."""

    domain: Callable[[object], Any]

    def __call__(self, value: object) -> Any:
        return None if value is None else self.domain(value)


@dataclass(frozen=True)
class Row:
    """At least ``least`` values of one domain, stored as a tuple."""

    domain: Callable[[object], Any]
    least: int = 1
    increasing: bool = False

    def __call__(self, value: object) -> tuple[Any, ...]:
        if isinstance(value, (str, bytes)) or not isinstance(
            value, (Sequence, np.ndarray)
        ):
            raise ValueError("must be a list or a tuple")
        items = tuple(self._item(place, item) for place, item in enumerate(value))
        if len(items) < self.least:
            raise ValueError(f"must have at least {self.least} item(s)")
        if self.increasing and any(
            after <= before for before, after in itertools.pairwise(items)
        ):
            raise ValueError("must increase from each item to the next")
        return items

    def _item(self, place: int, item: object) -> Any:
        try:
            return self.domain(item)
        except ValueError as error:
            raise ValueError(f"item {place} {error}") from None


def check(owner: str, name: str, value: object, domain: Callable[[object], Any]) -> Any:
    """``value`` in its stored form, or a ``ValueError`` that says whose it is."""
    try:
        return domain(value)
    except ValueError as error:
        raise ValueError(f"{owner}: {name}={value!r} {error}") from None


def check_fields(instance: Any, owner: str) -> None:
    """Checks and stores every field of a frozen dataclass by its annotation."""
    for name, domain in _field_domains(type(instance)).items():
        stored = check(owner, name, getattr(instance, name), domain)
        object.__setattr__(instance, name, stored)


@functools.cache
def _field_domains(cls: type) -> dict[str, Callable[[object], Any]]:
    hints = get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name].__metadata__[0] for field in fields(cls)}


# A learning rate, or a factor of one: negative rates would climb the loss.
Rate = Annotated[float, Real()]
PositiveRate = Annotated[float, Real(open_low=True)]
Fraction = Annotated[float, Real(high=1.0)]
# A length in steps that may be absent, and one that may not.
Count = Annotated[int, Whole()]
Length = Annotated[int, Whole(1)]
Switch = Annotated[bool, Flag()]
Milestones = Annotated[tuple[int, ...], Row(Whole(1), increasing=True)]
Rates = Annotated[tuple[float, ...], Row(Real())]
