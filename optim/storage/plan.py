"""How the state of each leaf is stored: from options, its path, its shape and type."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from octavo.pallas_kernels import (
    SMALLEST_BLOCK,
    Blocks,
    Float32,
    Format,
    Slot,
    Storage,
    StoredSlot,
    Weights,
    blocks_of,
    has_16_bits,
    remainder_dtype,
)

from ..checks import check_block_size, check_int, warn_once
from ..options import Settings
from ..values import at, check_weights, formats_of, is_state
from .shards import most_shards
from .tree import AXES, AXIS, NAMES, SIZES, Kind, Leaves, per_leaf

DEFAULT_WEIGHTS: Weights = "stochastic"


def plan(settings: Settings, slots: tuple[Slot, ...], tree: Leaves) -> list[Storage]:
    """The storage record of each leaf."""
    if not tree.leaves:
        return []
    for path, count in Counter(tree.names).items():
        if count > 1:
            raise ValueError(
                f"{count} leaves have the path {path!r}, such as 'a/b' and 'b' within "
                "'a' have: options, reports and checkpoints go by it. Rename one"
            )
    states = Kind(
        lambda x: isinstance(x, str) or is_state(x, slots),
        "formats, or one for each slot",
    )
    rows = zip(
        tree.names,
        tree.leaves,
        per_leaf("state", settings.state, tree, states),
        per_leaf("block_size", settings.block_size, tree, SIZES),
        per_leaf("block_axis", settings.block_axis, tree, AXIS),
        per_leaf("layer_axes", settings.layer_axes, tree, AXES),
        most_shards(settings, tree),
        strict=True,
    )
    least = settings.min_quantized_size
    records = [
        _of_leaf(slots, least, path, leaf, state, Blocked(size, axis, layers, shards))
        for path, leaf, state, size, axis, layers, shards in rows
    ]
    _warn_of_shards(settings, slots, tree, records)
    weights = _weights(settings, tree, records)
    return [replace(r, weights=w) for r, w in zip(records, weights, strict=True)]


def _weights(
    settings: Settings, tree: Leaves, records: list[Storage]
) -> list[Weights | None]:
    """How the parameter of each leaf is stored; None where there is no choice."""
    given = per_leaf("weights", settings.weights, tree, NAMES)
    found: list[Weights | None] = []
    for path, name, record in zip(tree.names, given, records, strict=True):
        check_weights(name, path)
        name = DEFAULT_WEIGHTS if name is None else name
        short = has_16_bits(record.dtype)
        if settings.rounds_by_leaf and not short:
            _check_no_remainder(name, path, record.dtype)
        found.append(name if short and record.steps else None)
    return found


def check_remainders(settings: Settings, tree: Leaves) -> None:
    """Raise ValueError where remainders are wanted, and no parameter can have one."""
    dtypes = [np.dtype(jnp.result_type(leaf)) for leaf in tree.leaves]
    if not dtypes or settings.rounds_by_leaf or any(map(has_16_bits, dtypes)):
        return
    _check_no_remainder(settings.weights, tree.names[0], dtypes[0])


def _check_no_remainder(name: Any, path: str, dtype: Any) -> None:
    if name is not None and remainder_dtype(name) is not None:
        raise ValueError(
            f"weights={name!r}{at(path)}: {dtype} parameters have no remainder, "
            "only bfloat16 and float16 ones. Leave weights out, or convert the "
            "parameters to bfloat16; for some leaves alone write "
            "weights=lambda path: 'remainder8' if path in ... else None"
        )


class Blocked(NamedTuple):
    """Options of a leaf that say which values are a block."""

    size: int | None
    axis: int | None
    layer_axes: Any
    shards: tuple[int, ...]


def quantizes(settings: Settings, slots: tuple[Slot, ...]) -> tuple[bool, ...]:
    """Which slots may be quantized in some leaf. Independent of the parameters."""
    if settings.state_by_leaf(slots):
        return tuple(slot.shape is None for slot in slots)
    formats = zip(formats_of(settings.state, slots), slots, strict=True)
    return tuple(f.quantized and slot.shape is None for f, slot in formats)


def _of_leaf(
    slots: tuple[Slot, ...],
    least: int,
    path: str,
    leaf: Any,
    state: Any,
    blocked: Blocked,
) -> Storage:
    shape, dtype = jnp.shape(leaf), np.dtype(jnp.result_type(leaf))
    formats = formats_of(state, slots, path)
    size = blocked.size
    if size is None:
        size = max((form.block_size for form in formats), default=32)
    floating = jnp.issubdtype(dtype, jnp.floating)
    layers = _layers(blocked.layer_axes, shape, path)
    inside = math.prod(n for k, n in enumerate(shape) if k not in layers)
    if not floating or dtype.itemsize > 4 or not shape or 0 in shape:
        formats = tuple(Float32() for _ in slots)
    elif inside < least or len(layers) == len(shape):
        formats = tuple(Float32() if f.quantized else f for f in formats)
    check_block_size(size, at(path))
    quantized = any(f.quantized for f in formats)
    axis = _checked_axis(blocked, shape, layers, path, quantized)
    blocks = _blocks(shape, size, blocked._replace(axis=axis), layers)
    if blocks.size < SMALLEST_BLOCK:
        formats = tuple(Float32() if f.quantized else f for f in formats)
    names = [slot.name for slot in slots]
    pairs = zip(slots, formats, strict=True)
    stored = tuple(_stored(slot, form, shape, dtype, names) for slot, form in pairs)
    storage = Storage(dtype, blocks, stored)
    if storage.quantized and not storage.elementwise:
        others = [slot.name for slot in slots if slot.shape]
        raise ValueError(
            f"state={state!r}{at(path)}: moments beside {', '.join(others)}, "
            "whose shape is not the parameter's, cannot be quantized; write "
            "state='32bit' or 'bf16'"
        )
    return storage


def _blocks(
    shape: tuple[int, ...], size: int, blocked: Blocked, layers: tuple[int, ...]
) -> Blocks:
    """Along the usual axis; where its shards are too short, along another one."""
    found = blocks_of(shape, size, blocked.axis, layers, blocked.shards)
    if found.size >= SMALLEST_BLOCK or blocked.axis is not None:
        return found
    others = (
        blocks_of(shape, size, axis, layers, blocked.shards)
        for axis in range(len(shape))
        if axis not in layers
    )
    return max((found, *others), key=lambda blocks: blocks.size)


def _warn_of_shards(
    settings: Settings,
    slots: tuple[Slot, ...],
    tree: Leaves,
    records: Sequence[Storage],
) -> None:
    """Say which leaves are in 32 bits because no block fits their shards."""
    least, found = settings.min_quantized_size, []
    for path, record in zip(tree.names, records, strict=True):
        blocks = record.blocks
        inside = math.prod(blocks.shape) // max(blocks.layer_count, 1)
        short = blocks.axis is not None and blocks.size < SMALLEST_BLOCK
        if short and inside >= least and record.steps:
            found.append(f"{path!r} of shape {blocks.shape}")
    if found and any(quantizes(settings, slots)):
        warn_once(
            f"min_shards={settings.min_shards}: shards of these leaves are too short "
            f"for blocks of {SMALLEST_BLOCK}, and their moments stay in 32 bits: "
            f"{'; '.join(found)}. Give each leaf its own number of shards: "
            "min_shards=lambda path: 16 if path == 'head/kernel' else 256"
        )


def _checked_axis(
    blocked: Blocked,
    shape: tuple[int, ...],
    layers: tuple[int, ...],
    path: str,
    quantized: bool,
) -> int | None:
    """The axis of blocks; None where a leaf that has no blocks does not have it."""
    axis = blocked.axis
    if axis is None:
        return None
    if not _is_axis(axis, shape):
        if quantized:
            raise ValueError(
                f"block_axis={axis}{at(path)} is not an axis of its shape {shape}"
            )
        return None  # biases and norms need not have the axis of the kernels
    if axis % len(shape) in layers:
        raise ValueError(
            f"block_axis={axis}{at(path)} is one of its layer_axes="
            f"{blocked.layer_axes}: "
            "a block would span layers. Leave block_axis out, or choose an axis "
            "within the layer"
        )
    return axis


def _stored(
    slot: Slot,
    form: Format,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    names: list[str],
) -> StoredSlot:
    """A slot of another shape than the parameter has no blocks to quantize."""
    form = Float32() if slot.shape and form.quantized else form
    own = None if slot.shape is None else slot.shape(shape)
    of = moment_dtype(form, dtype)
    other = slot.relative_to if form.relative else None
    reference = None if other is None else names.index(other)
    return StoredSlot(slot.name, form, of, slot.initial, own, slot.in_optax, reference)


def has_own_moments(dtype: Any) -> bool:
    """Whether moments have the parameter's type, whatever their format.

    Complex and 64-bit ones, as in optax; and those of integers, which no step changes.
    """
    return not jnp.issubdtype(dtype, jnp.floating) or np.dtype(dtype).itemsize > 4


def moment_dtype(form: Format, dtype: Any) -> Any:
    """Of what is stored of a moment."""
    return dtype if has_own_moments(dtype) else np.dtype(form.dtype)


def _layers(axes: Any, shape: tuple[int, ...], path: str) -> tuple[int, ...]:
    """Checked layer_axes of one leaf, not negative, in order."""
    given = () if axes is None else axes if isinstance(axes, tuple) else (axes,)
    given = tuple(int(k) if isinstance(k, np.integer) else k for k in given)
    for axis in given:
        check_int(f"layer_axes{at(path)}", axis)
        if not -len(shape) <= axis < len(shape):
            raise ValueError(
                f"layer_axes={axes}{at(path)} is not an axis of its shape {shape}. "
                "Where only some leaves stack layers, give a function of the path: "
                "layer_axes=lambda path: 0 if path.startswith('layers/') else None"
            )
    return tuple(sorted({axis % len(shape) for axis in given}))


def _is_axis(axis: int, shape: tuple[int, ...]) -> bool:
    check_int("block_axis", axis)
    return -len(shape) <= axis < len(shape)
