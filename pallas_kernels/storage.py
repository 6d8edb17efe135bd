"""How the state of one leaf is stored: every array that it has, and what it means."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .arithmetic import inverse_root, root
from .folding import CODE_ROWS, SCALE_ROWS, folded, row_unit
from .formats import Format, widened
from .layout import Blocks, merge, split
from .rule import InOptax
from .weights import Weights, remainder_dtype


@dataclass(frozen=True)
class StoredSlot:
    """How one moment of a leaf is stored.

    Attributes:
      name: of the slot.
      format: how.
      dtype: of the codes: the format's, or the parameter's where that is wider.
      initial: the value that each moment starts with; None: known to `init` alone.
      shape: where the slot has another shape than its parameter; else None.
      in_optax: what optax keeps of the moment; see `Slot.in_optax`.
      reference: number of the slot by whose root the moment is divided before it is
        stored; None: it is stored as it is.
    """

    name: str
    format: Format
    dtype: np.dtype[Any]
    initial: float | None = 0.0
    shape: tuple[int, ...] | None = None
    in_optax: InOptax = "same"
    reference: int | None = None


@dataclass(frozen=True)
class Storage:
    """The storage record of a leaf, or of one shard of it.

    It is hashable, and says nothing of where the leaf is in a tree: equal leaves have
    equal records, and share what is compiled for them.

    Attributes:
      dtype: of the parameter.
      blocks: the parameter's shape, and which of its values share a scale.
      slots: how each moment is stored.
      weights: how the parameter is, if it has 16 bits and is known; else None.
      folded: whether rows of its arrays are grouped, for host memory: see `folding`.
    """

    dtype: np.dtype[Any]
    blocks: Blocks
    slots: tuple[StoredSlot, ...]
    weights: Weights | None = None
    folded: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the parameter."""
        return self.blocks.shape

    @cached_property
    def steps(self) -> bool:
        """Whether a step changes the leaf: integers and empty ones are left alone."""
        return jnp.issubdtype(self.dtype, jnp.inexact) and 0 not in self.shape

    @cached_property
    def formats(self) -> tuple[Format, ...]:
        """Of the slots."""
        return tuple(slot.format for slot in self.slots)

    @cached_property
    def quantized(self) -> bool:
        """Whether any slot has blocks."""
        return any(form.quantized for form in self.formats)

    @cached_property
    def packed(self) -> bool:
        """Whether some value stores several codes."""
        return any(form.packed > 1 for form in self.formats)

    @cached_property
    def elementwise(self) -> bool:
        """Whether every slot has a value for each of the parameter's."""
        return all(slot.shape is None for slot in self.slots)

    @property
    def rounds(self) -> bool:
        """Whether an update depends on how its parameter will be rounded."""
        return self.weights is not None and (
            # float16 must not leave its range, however it is rounded.
            self.weights != "nearest" or self.dtype == jnp.float16
        )

    @cached_property
    def has_remainder(self) -> bool:
        """Whether what rounding the parameter loses is kept."""
        return remainder_dtype(self.weights) is not None

    @property
    def remainder(self) -> jax.ShapeDtypeStruct:
        """What is kept of it; small, and unused, where nothing is."""
        dtype = remainder_dtype(self.weights)
        if dtype is None:
            return jax.ShapeDtypeStruct(self.blocks.scale_shape, jnp.int8)
        shape = folded(self.shape, CODE_ROWS) if self.folded else self.shape
        return jax.ShapeDtypeStruct(shape, dtype)

    def codes(self, k: int) -> jax.ShapeDtypeStruct:
        """The codes of slot k, or its moments themselves where it is not quantized."""
        slot = self.slots[k]
        shape = self.shape if slot.shape is None else slot.shape
        if slot.format.packed > 1:
            shape = _packed(slot.format, self.blocks).shape
        shape = folded(shape, CODE_ROWS) if self.folded else shape
        return jax.ShapeDtypeStruct(shape, slot.dtype)

    def scales(self, k: int) -> jax.ShapeDtypeStruct:
        """The scales of slot k: also where it is not quantized, and they are unused."""
        shape, groups = (
            self.blocks.scale_shape,
            self.folded and self.formats[k].quantized,
        )
        shape = folded(shape, SCALE_ROWS) if groups else shape
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16)

    def initial(self, k: int) -> tuple[Any, Any]:
        """The code and the scale with which slot k starts, as numbers."""
        slot = self.slots[k]
        if slot.initial is None:
            raise ValueError(
                f"slot {slot.name!r} starts with a value that is not known"
            )
        if slot.initial == 0.0 or not slot.format.quantized:
            pairs = jnp.issubdtype(slot.dtype, jnp.complexfloating)
            return slot.initial * (1 + 1j) if pairs else slot.initial, 0.0
        with jax.ensure_compile_time_eval():
            x = jnp.full((slot.format.packed,), slot.initial, jnp.float32)
            scale = slot.format.scale(slot.format.magnitude(x[:1]))
            code = packed(slot.format, slot.format.encode(x, scale), 0)
            return np.asarray(code)[0], np.asarray(scale)[0]

    @cached_property
    def unfolded(self) -> "Storage":
        """The record of the same leaf with rows one by one, as kernels want them."""
        return replace(self, folded=False)

    @cached_property
    def row_unit(self) -> int:
        """How many rows of the parameter are whole groups in each of its arrays."""
        return row_unit(self.blocks, self.formats)

    def shard(self, parts: Sequence[int]) -> "Storage":
        """The record of one shard, the parameter's axes being partitioned so."""
        lengths = zip(self.shape, parts, strict=True)
        shape = tuple(n // k for n, k in lengths)
        whole = self.shape if self.blocks.whole is None else self.blocks.whole
        return replace(self, blocks=replace(self.blocks, shape=shape, whole=whole))

    def absolute(self, stored: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
        """Moments, from what each slot's format decodes to."""
        return tuple(
            x if slot.reference is None else x * root(stored[slot.reference])
            for x, slot in zip(stored, self.slots, strict=True)
        )

    def relative(self, moments: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
        """What each slot's format encodes, from the moments."""
        return tuple(
            x if slot.reference is None else x * inverse_root(moments[slot.reference])
            for x, slot in zip(moments, self.slots, strict=True)
        )

    def decode(
        self,
        k: int,
        codes: jax.Array,
        scales: jax.Array | None,
        reference: jax.Array | None = None,
    ) -> jax.Array:
        """The moment of slot k, float32 (or wider, if stored so).

        Args:
          k: the slot.
          codes: its codes.
          scales: its scales; None if it has none.
          reference: the moment of its slot of reference, if it has one.
        """
        form = self.slots[k].format
        codes = codes.reshape(self.unfolded.codes(k).shape)
        if not form.quantized:
            return codes.astype(jnp.promote_types(codes.dtype, jnp.float32))
        assert scales is not None
        scales = scales.reshape(self.blocks.scale_shape)
        wide = jnp.expand_dims(scales.astype(jnp.float32), self.blocks.within)
        moment = merge(form.decode(self.split_codes(k, codes), wide), self.blocks)
        return moment if reference is None else moment * root(reference)

    def encode(
        self, k: int, moment: jax.Array, reference: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array | None]:
        """Codes and scales of a moment of slot k, rounded to the nearest.

        With the moment of its slot of `reference`, if it has one. Where that is zero,
        so is what is stored.
        """
        form, dtype = self.slots[k].format, self.slots[k].dtype
        if reference is not None:
            ratio = moment.astype(jnp.float32) * inverse_root(reference)
            moment = jnp.where(reference > 0.0, ratio, 0.0)
        if not form.quantized:
            return moment.astype(dtype).reshape(self.codes(k).shape), None
        within = self.blocks.within
        parts = split(moment.astype(jnp.float32), self.blocks)
        scales = form.scale(jnp.max(form.magnitude(parts), axis=within, keepdims=True))
        codes = self.merge_codes(k, form.encode(parts, scales).astype(dtype))
        scales = jnp.squeeze(scales, within).astype(jnp.bfloat16)
        return codes.reshape(self.codes(k).shape), scales.reshape(self.scales(k).shape)

    def split_codes(self, k: int, codes: jax.Array) -> jax.Array:
        """The codes of slot k one by one, in 32 bits, each block on an axis of its own.

        As `layout.split` does it with the parameter.
        """
        form = self.slots[k].format
        if form.packed == 1:
            return widened(split(codes, self.blocks))
        parts = widened(split(codes, _packed(form, self.blocks)))
        return unpacked(form, parts, self.blocks.within)

    def merge_codes(self, k: int, codes: jax.Array) -> jax.Array:
        """The inverse of `split_codes`, as stored."""
        form, dtype = self.slots[k].format, self.slots[k].dtype
        if form.packed == 1:
            return merge(codes.astype(dtype), self.blocks)
        parts = packed(form, codes, self.blocks.within)
        return merge(parts.astype(dtype), _packed(form, self.blocks))


def _packed(form: Format, blocks: Blocks) -> Blocks:
    """The blocks of the array that stores a parameter's codes, several in a value."""
    assert blocks.axis is not None and blocks.size % form.packed == 0

    def fewer(shape: tuple[int, ...]) -> tuple[int, ...]:
        stored = -(-shape[blocks.axis or 0] // form.packed)
        return tuple(stored if k == blocks.axis else n for k, n in enumerate(shape))

    return replace(
        blocks, shape=fewer(blocks.shape), size=blocks.size // form.packed, whole=None
    )


def packed(form: Format, codes: jax.Array, axis: int) -> jax.Array:
    """Codes, int32, several in each value, the first in the low bits."""
    if form.packed == 1:
        return codes
    bits, n = 8 // form.packed, form.packed
    parts = codes.reshape(*codes.shape[:axis], -1, n, *codes.shape[axis + 1 :])
    mask = (1 << bits) - 1
    each = [jnp.take(parts, k, axis + 1) & mask for k in range(n)]
    byte = sum(code << (bits * k) for k, code in enumerate(each[1:], 1)) + each[0]
    return jnp.where(byte > 127, byte - 256, byte)  # what int8 holds


def unpacked(form: Format, stored: jax.Array, axis: int) -> jax.Array:
    """The inverse of `packed`, where several are in each value."""
    bits = 8 // form.packed
    mask = (1 << bits) - 1
    each = [(stored >> (bits * k)) & mask for k in range(form.packed)]
    shape = (*stored.shape[:axis], -1, *stored.shape[axis + 1 :])
    return jnp.stack(each, axis + 1).reshape(shape)


def nbytes(x: jax.ShapeDtypeStruct) -> int:
    """Bytes of an array."""
    return math.prod(x.shape) * x.dtype.itemsize
