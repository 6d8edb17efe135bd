"""Checked options, and what they mean for one leaf."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from octavo.pallas_kernels import (
    BACKENDS,
    FORMATS,
    Blocks,
    Float32,
    Format,
    Slot,
    blocks_of,
)

from .checks import check_bool, check_positive
from .options import Options, PerLeaf, StateFormat


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
class Settings:
    """Checked `Options`, with their defaults."""

    state: PerLeaf[StateFormat] = "8bit"
    min_quantized_size: int = 4096
    block_size: PerLeaf[int] = 32
    block_axis: PerLeaf[int | None] = None
    layer_axes: Any = None
    grad_clip_norm: Any = None
    grad_clip_value: Any = None
    percentile_clipping: int | None = None
    max_unorm: Any = None
    skip_nonfinite: bool = False
    record_norms: bool = False
    sharding: Any = None
    backend: str | None = None
    seed: int = 0

    @classmethod
    def of(cls, options: Options, slots: tuple[Slot, ...]) -> "Settings":
        """Check options.

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
        settings = cls(**given)  # type: ignore[arg-type]
        if settings.backend is not None and settings.backend not in BACKENDS:
            raise ValueError(
                f"unknown backend {settings.backend!r}; "
                f"known are {_listed(BACKENDS)}, or None for the best one"
            )
        if not callable(settings.state):
            settings.formats("", slots)
        if not callable(settings.block_size):
            _check_block_size(settings.block_size, "")
        for name in ("min_quantized_size", "seed"):
            _check_int(name, getattr(settings, name))
        check_positive(
            grad_clip_norm=settings.grad_clip_norm,
            grad_clip_value=settings.grad_clip_value,
            max_unorm=settings.max_unorm,
        )
        check_bool(
            skip_nonfinite=settings.skip_nonfinite, record_norms=settings.record_norms
        )
        if isinstance(settings.layer_axes, jax.Array):
            _check_int("layer_axes", settings.layer_axes)
        if settings.percentile_clipping is not None:
            _check_percentile(settings.percentile_clipping)
            if settings.percentile_clipping == 100:
                settings = replace(settings, percentile_clipping=None)
        return settings

    @property
    def clips_norms(self) -> bool:
        """Whether the norms of gradients limit them."""
        return self.grad_clip_norm is not None or self.percentile_clipping is not None

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

    def plan(
        self, path: str, leaf: Any, slots: tuple[Slot, ...], layer_axes: Any
    ) -> LeafPlan:
        """How a leaf is stored, from its path, shape and type alone."""
        shape, dtype = jnp.shape(leaf), jnp.result_type(leaf)
        size = self.block_size(path) if callable(self.block_size) else self.block_size
        axis = self.block_axis(path) if callable(self.block_axis) else self.block_axis
        formats = self.formats(path, slots)
        floating = jnp.issubdtype(dtype, jnp.floating)
        updated = floating or jnp.issubdtype(dtype, jnp.complexfloating)
        layers = _layers(layer_axes, shape, path)
        inside = math.prod(n for k, n in enumerate(shape) if k not in layers)
        if not floating or dtype.itemsize > 4 or not shape or 0 in shape:
            formats = tuple(Float32() for _ in slots)
        elif inside < self.min_quantized_size or len(layers) == len(shape):
            formats = tuple(Float32() if f.quantized else f for f in formats)
        _check_block_size(size, path)
        if axis is not None and not _is_axis(axis, shape):
            if any(f.quantized for f in formats):
                raise ValueError(
                    f"block_axis={axis}{_at(path)} is not an axis of its shape {shape}"
                )
            axis = None  # biases and norms need not have the axis of the kernels
        if axis is not None and axis % len(shape) in layers:
            raise ValueError(
                f"block_axis={axis}{_at(path)} is one of its layer_axes={layer_axes}: "
                "a block would span layers. Leave block_axis out, or choose an axis "
                "within the layer"
            )
        blocks = blocks_of(shape, size, axis, layers)
        return LeafPlan(path, dtype, formats, blocks, updated)

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


def _check_percentile(percentile: Any) -> None:
    _check_int("percentile_clipping", percentile)
    if not 1 <= percentile <= 100:
        raise ValueError(
            f"percentile_clipping={percentile} must be from 1 to 100 (100: no clipping)"
        )


def _layers(axes: Any, shape: tuple[int, ...], path: str) -> tuple[int, ...]:
    """Checked layer_axes of one leaf, not negative, in order."""
    given = () if axes is None else axes if isinstance(axes, tuple) else (axes,)
    given = tuple(int(k) if isinstance(k, np.integer) else k for k in given)
    for axis in given:
        _check_int(f"layer_axes{_at(path)}", axis)
        if not -len(shape) <= axis < len(shape):
            raise ValueError(
                f"layer_axes={axes}{_at(path)} is not an axis of its shape {shape}. "
                "Where only some leaves stack layers, give a function of the path: "
                "layer_axes=lambda path: 0 if path.startswith('layers/') else None"
            )
    return tuple(sorted({axis % len(shape) for axis in given}))


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
