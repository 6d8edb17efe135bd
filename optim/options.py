"""Options that every optimizer takes, and what they mean for one leaf."""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeAlias, TypedDict, TypeVar

import jax
import jax.numpy as jnp

from octavo.pallas_kernels import (
    BACKENDS,
    FORMATS,
    Blocks,
    Float32,
    Format,
    Slot,
    blocks_of,
)

_T = TypeVar("_T")
_F = TypeVar("_F", bound=Callable[..., Any])
PerLeaf: TypeAlias = _T | Callable[[str], _T]
StateFormat: TypeAlias = str | Mapping[str, str]


class Options(TypedDict, total=False):
    """Keyword options of every optimizer. None of them is a hyperparameter.

    Those marked "per leaf" may be functions of the leaf's path, `"encoder/kernel"`.

    Attributes:
      state: how moments are stored, per leaf: `"8bit"` (default), `"dynamic8"`
        (bitsandbytes' code book), `"bf16"`, `"32bit"`; or one for each slot,
        `{"mu": "bf16", "nu": "8bit"}`.
      min_quantized_size: leaves with fewer values keep 32-bit state. Default 4096: they
        are norms and biases, sensitive and small. Of the global shape, whatever the
        mesh.
      block_size: values that share a scale, a positive multiple of 8, per leaf.
        Default 32, 2 bytes of scale for 32 codes: half the error of 256, and the height
        of an int8 tile on TPU.
      block_axis: the axis along which blocks run, per leaf. Default None: the longest
        one other than the last.
      backend: `"xla"`, `"tpu"` or `"triton"`. Default None: the kernel of the device
        that JAX uses, and XLA for small, 1-D and unquantized leaves.
      seed: int, of the unbiased rounding; the random numbers are a function of it, the
        step, and the position in the tree. Default 0.
    """

    state: PerLeaf[StateFormat]
    min_quantized_size: int
    block_size: PerLeaf[int]
    block_axis: PerLeaf[int | None]
    backend: str | None
    seed: int


def with_options(optimizer: _F) -> _F:
    """Show the keyword options in the signature of `optimizer(..., **options)`.

    `optax.inject_hyperparams` reads signatures: it must find the names (for its
    static_args) and no integer defaults, which it would turn into arrays.
    """
    signature = inspect.signature(optimizer)
    given = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    named = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
        for name in Options.__annotations__
    ]
    shown = signature.replace(parameters=[*given, *named])
    optimizer.__signature__ = shown  # type: ignore[attr-defined]
    return optimizer


@dataclass(frozen=True)
class LeafPlan:
    """How the state of one leaf is stored."""

    path: str
    dtype: jnp.dtype
    formats: tuple[Format, ...]
    blocks: Blocks
    updated: bool

    def moment_dtype(self, slot: int) -> jnp.dtype:
        """Of the codes; leaves wider than 32 bits keep moments of their own type."""
        own = self.formats[slot].dtype
        wide = self.dtype.itemsize > 4 or jnp.iscomplexobj(jnp.zeros((), self.dtype))
        return self.dtype if wide or not self.updated else jnp.dtype(own)


@dataclass(frozen=True)
class Storage:
    """Checked `Options`, with their defaults."""

    state: PerLeaf[StateFormat] = "8bit"
    min_quantized_size: int = 4096
    block_size: PerLeaf[int] = 32
    block_axis: PerLeaf[int | None] = None
    backend: str | None = None
    seed: int = 0

    @classmethod
    def of(cls, options: Options, slots: tuple[Slot, ...]) -> "Storage":
        """Options to storage.

        Raises:
          TypeError: for an option that does not exist.
          ValueError: for a value that is not allowed.
        """
        known = [f.name for f in fields(cls)]
        for name in options:
            if name not in known:
                raise TypeError(
                    f"unknown option {name!r}; the options are {', '.join(known)}"
                )
        given = {name: value for name, value in options.items() if value is not None}
        storage = cls(**given)  # type: ignore[arg-type]
        if storage.backend is not None and storage.backend not in BACKENDS:
            raise ValueError(
                f"unknown backend {storage.backend!r}; "
                f"known are {_listed(BACKENDS)}, or None for the best one"
            )
        if not callable(storage.state):
            storage.formats("", slots)
        if not callable(storage.block_size):
            _check_block_size(storage.block_size, "")
        for name in ("min_quantized_size", "seed"):
            _check_int(name, getattr(storage, name))
        return storage

    def formats(self, path: str, slots: tuple[Slot, ...]) -> tuple[Format, ...]:
        """The formats that the option `state` gives to the slots of a leaf."""
        state = self.state(path) if callable(self.state) else self.state
        if isinstance(state, str):
            state = {slot.name: state for slot in slots}
        names = [slot.name for slot in slots]
        if not isinstance(state, Mapping) or set(state) != set(names):
            raise ValueError(
                f"state={state!r}{_at(path)}: give one format, or one for each slot, "
                f"like {(dict.fromkeys(names, '8bit'))}"
            )
        for name in state.values():
            if name not in FORMATS:
                raise ValueError(
                    f"unknown state format {name!r}{_at(path)}; "
                    f"known are {_listed(FORMATS)}"
                )
        return tuple(FORMATS[state[slot.name]](slot.signed) for slot in slots)

    def plan(self, path: str, leaf: Any, slots: tuple[Slot, ...]) -> LeafPlan:
        """How a leaf is stored, from its path, shape and type alone."""
        shape, dtype = jnp.shape(leaf), jnp.result_type(leaf)
        size = self.block_size(path) if callable(self.block_size) else self.block_size
        axis = self.block_axis(path) if callable(self.block_axis) else self.block_axis
        formats = self.formats(path, slots)
        floating = jnp.issubdtype(dtype, jnp.floating)
        updated = floating or jnp.issubdtype(dtype, jnp.complexfloating)
        if not floating or dtype.itemsize > 4 or not shape or 0 in shape:
            formats = tuple(Float32() for _ in slots)
        elif math.prod(shape) < self.min_quantized_size:
            formats = tuple(Float32() if f.quantized else f for f in formats)
        _check_block_size(size, path)
        if axis is not None and not _is_axis(axis, shape):
            if any(f.quantized for f in formats):
                raise ValueError(
                    f"block_axis={axis}{_at(path)} is not an axis of its shape {shape}"
                )
            axis = None  # biases and norms need not have the axis of the kernels
        return LeafPlan(path, dtype, formats, blocks_of(shape, size, axis), updated)

    def quantizes(self, slots: tuple[Slot, ...]) -> tuple[bool, ...]:
        """Which slots may be quantized in some leaf. Independent of the parameters."""
        if callable(self.state):
            return tuple(True for _ in slots)
        return tuple(f.quantized for f in self.formats("", slots))

    def tag(self, slots: tuple[Slot, ...]) -> str:
        """Name of the slots' formats, in the state's structure."""
        if callable(self.state):
            return "-".join(f"{slot.name}_by_path" for slot in slots)
        formats = self.formats("", slots)
        names = [f"{s.name}_{f.name}" for s, f in zip(slots, formats, strict=True)]
        return "-".join(names)


def _check_block_size(size: Any, path: str) -> None:
    _check_int("block_size", size)
    if size <= 0 or size % 8:
        raise ValueError(
            f"block_size={size}{_at(path)} must be a positive multiple of 8, "
            "such as 32 or 128"
        )


def _is_axis(axis: int, shape: tuple[int, ...]) -> bool:
    _check_int("block_axis", axis)
    return -len(shape) <= axis < len(shape)


def _check_int(name: str, value: Any) -> None:
    if isinstance(value, jax.Array):
        raise ValueError(
            f"{name} must be a Python int, not an array. With optax.inject_hyperparams "
            f"name it in static_args: inject_hyperparams(..., static_args={name!r})"
        )
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{name}={value!r} must be an int")


def _at(path: str) -> str:
    return f" for {path!r}" if path else ""


def _listed(names: Mapping[str, Any]) -> str:
    return ", ".join(repr(name) for name in names)
