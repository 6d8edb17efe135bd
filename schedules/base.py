"""What all schedules share: checks, the call, the repr and the way to configs."""

import functools
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, NoReturn, Self, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from .domains import LAST_STEP, check_fields

# The class of each name, for `from_dict` and for the command line.
REGISTRY: dict[str, type["Schedule"]] = {}


@dataclass(frozen=True, repr=False)
class Schedule:
    """A learning rate as a function of the step, and nothing else.

    A schedule is a frozen dataclass of Python numbers: hashable, comparable, and
    without state, so the step count alone resumes it. Calling it with a step
    returns the learning rate in f32; optax takes it wherever it takes a schedule.

    A subclass declares its fields with the types of ``domains``, and writes the
    formula in ``rate``.

    Example:
        >>> from octavo import schedules
        >>> schedule = schedules.StepLR(0.1, step_size=30)
        >>> schedule
        StepLR(base_lr=0.1, step_size=30)
        >>> [round(float(schedule(step)), 4) for step in (0, 29, 30, 60)]
        [0.1, 0.1, 0.01, 0.001]
        >>> schedules.Schedule.from_dict(schedule.to_dict()) == schedule
        True
    """

    # Not a field: dataclasses leave ClassVars alone.
    kind: ClassVar[str] = "Schedule"

    def __init_subclass__(cls) -> None:
        cls.kind = cls.__name__
        REGISTRY[cls.__name__] = cls

    def __post_init__(self) -> None:
        check_fields(self, self.kind)
        self.check()

    def check(self) -> None:
        """Checks what no field can say alone; subclasses call ``refuse``."""

    def refuse(self, name: str, rule: str) -> NoReturn:
        """Raises ``ValueError`` naming the schedule, the field and its value."""
        raise ValueError(f"{self.kind}: {name}={getattr(self, name)!r} {rule}")

    def rate(self, count: jax.Array) -> jax.Array:
        """The formula: f32 rates for int32 counts, which are 0 or more."""
        raise NotImplementedError(f"{self.kind} has to define rate(count)")

    def __call__(self, step: jax.typing.ArrayLike) -> jax.Array:
        """The learning rate at ``step``, f32, of the shape of ``step``.

        Args:
            step: updates done so far: a Python int, numpy integers, or a JAX
                array of integers, traced or not.

        Raises:
            ValueError: a step on the host that is below 0 or beyond int32. Steps
                in JAX arrays are clamped instead: looking at one would wait for
                the device, and ``optax.join_schedules`` passes negative ones.
            TypeError: steps that are not integers.
        """
        return _evaluate(self, as_count(step))

    def __repr__(self) -> str:
        shown = (
            f"{field.name}={_show(getattr(self, field.name))}"
            for field in fields(self)
            if getattr(self, field.name) != field.default
        )
        return f"{self.kind}({', '.join(shown)})"

    def to_dict(self) -> dict[str, Any]:
        """The schedule as JSON has it: its ``name``, and every field.

        Example:
            >>> from octavo import schedules
            >>> schedules.WarmupLR(0.1, warmup_steps=5).to_dict()
            {'name': 'WarmupLR', 'base_lr': 0.1, 'warmup_steps': 5, 'warmup_init': 0.0}
        """
        stored = {
            field.name: _plain(getattr(self, field.name)) for field in fields(self)
        }
        return {"name": self.kind, **stored}

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """The schedule that ``to_dict`` wrote, or one written by hand in a config.

        Args:
            config: the fields by name, and the class under ``name``, which only
                ``Schedule.from_dict`` needs. Fields with a default may be left out.

        Raises:
            ValueError: an unknown name, a field the class does not have, or one
                that is missing.
        """
        values = dict(config)
        name = values.pop("name", cls.kind)
        chosen = schedule_class(name)
        if not issubclass(chosen, cls):
            raise ValueError(
                f"{cls.kind}.from_dict was given name={name!r}; "
                "write Schedule.from_dict to read any schedule"
            )
        return build(chosen, (), {key: _revive(item) for key, item in values.items()})


ScheduleT = TypeVar("ScheduleT", bound=Schedule)


def schedule_class(name: str) -> type[Schedule]:
    """The class called ``name``; ``ValueError`` with the known names otherwise."""
    if isinstance(name, str) and name in REGISTRY:
        return REGISTRY[name]
    raise ValueError(
        f"no schedule is called {name!r}; there are {', '.join(sorted(REGISTRY))}"
    )


def build(cls: type[ScheduleT], args: Sequence[Any], kwargs: dict) -> ScheduleT:
    """Constructs ``cls``; arguments it does not have are a ``ValueError``."""
    signature = inspect.signature(cls)
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise ValueError(
            f"{cls.kind}: {error}; its arguments are {', '.join(signature.parameters)}"
        ) from None
    return cls(*args, **kwargs)


def require_shorter(schedule: Schedule, name: str, length: int, total: int) -> None:
    """Refuses a part that leaves no step of ``total_steps`` for the rest."""
    if length >= total:
        schedule.refuse(
            name,
            f"must be below total_steps={total}, which counts every step, "
            "the warmup included",
        )


def as_count(step: jax.typing.ArrayLike) -> jax.Array:
    """``step`` as int32 of 0 or more: checked on the host, clamped on the device."""
    if isinstance(step, jax.Array):
        if not jnp.issubdtype(step.dtype, jnp.integer):
            raise TypeError(
                f"a step has to be an integer, got {step.dtype}; "
                "write schedule(step.astype(jnp.int32))"
            )
        # int64 and uint32 would wrap around in the cast.
        top = min(LAST_STEP, jnp.iinfo(step.dtype).max)
        return jnp.clip(step, 0, top).astype(jnp.int32)
    steps = np.asarray(step)
    if steps.dtype.kind not in "iu":
        raise TypeError(
            f"a step has to be an integer, got {step!r}; write schedule(int(step))"
        )
    if steps.size and not (steps.min() >= 0 and steps.max() <= LAST_STEP):
        raise ValueError(
            f"a step counts from 0 to {LAST_STEP}, got {step!r}; to start a schedule "
            "later, put it in SequentialLR"
        )
    return jnp.asarray(steps, jnp.int32)


# One compiled function per schedule and shape: outside jit, a step then costs one
# dispatch and not one for each operation.
@functools.partial(jax.jit, static_argnums=0, inline=True)
def _evaluate(schedule: Schedule, count: jax.Array) -> jax.Array:
    return schedule.rate(count).astype(jnp.float32)


def _show(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_show, value))}]"
    return f"{value!r}"


def _plain(value: Any) -> Any:
    if isinstance(value, Schedule):
        return value.to_dict()
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value


def _revive(value: Any) -> Any:
    if isinstance(value, Mapping):
        return Schedule.from_dict(value)
    if isinstance(value, (list, tuple)):
        return tuple(_revive(item) for item in value)
    return value
