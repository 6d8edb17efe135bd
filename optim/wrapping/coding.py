"""The moments of one leaf, or of one shard of it, from codes and back."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from octavo.pallas_kernels import (
    Float32,
    Leaf,
    Noise,
    Program,
    Rule,
    Scalars,
    Slot,
    Storage,
)
from octavo.pallas_kernels.arithmetic import QUICK, using
from octavo.pallas_kernels.backends.xla import random_of, random_of_blocks
from octavo.pallas_kernels.layout import split
from octavo.pallas_kernels.rounding import NEAREST
from octavo.pallas_kernels.step import Random, tile_step

Moments: TypeAlias = tuple[jax.Array, ...]


class Stored(NamedTuple):
    """The arrays of a leaf.

    Args:
      codes: of each slot, or the moments themselves.
      scales: of each slot; None where it has none.
    """

    codes: tuple[Any, ...]
    scales: tuple[Any, ...]


def _given(g: jax.Array, slots: Moments, moments: Moments) -> tuple[jax.Array, Moments]:
    del slots
    return g, moments


def _no_scalars(t: jax.Array, rate: jax.Array, h: Any) -> tuple[jax.Array, ...]:
    del t, rate, h
    return ()


def storing(slots: tuple[Slot, ...]) -> Rule:
    """The rule whose moments are computed elsewhere: its step only stores them."""
    return Rule(slots, _no_scalars, _given)


def decoded(program: Program, stored: Stored, noise: Noise | None) -> Moments:
    """The moments of a leaf, or of one shard of it; takes what `encoded` takes."""
    del noise
    storage = program.storage
    found: dict[int, jax.Array] = {}
    slots = enumerate(storage.slots)
    with using(QUICK):
        for k, slot in sorted(slots, key=lambda x: x[1].reference is not None):
            other = None if slot.reference is None else found[slot.reference]
            found[k] = storage.decode(k, stored.codes[k], stored.scales[k], other)
    return tuple(found[k] for k in range(len(found)))


def encoded(
    program: Program, given: tuple[Stored, Moments], noise: Noise | None
) -> Stored:
    """What stands for new moments of a leaf, given what was stored of it before."""
    storage, blocks = program.storage, program.storage.blocks
    stored, moments = given
    if all(isinstance(form, Float32) for form in storage.formats):
        pairs = zip(moments, storage.slots, strict=True)
        return Stored(tuple(x.astype(s.dtype) for x, s in pairs), stored.scales)
    moments = tuple(x.astype(jnp.float32) for x in moments)
    g, moments = _marked(storage, moments)
    if not storage.quantized:
        leaf = Leaf(g, None, *stored)
        strides = blocks.strides
        random = noise and random_of(noise, blocks.shape, strides)
        return _stored(program, leaf, moments, lambda x: x, random)
    within = blocks.within
    split_codes = tuple(
        storage.split_codes(k, c) if form.quantized else split(c, blocks)
        for k, (form, c) in enumerate(zip(storage.formats, stored.codes, strict=True))
    )
    scales = jax.tree.map(lambda s: jnp.expand_dims(s, within), stored.scales)
    codes, scales = _stored(
        program,
        Leaf(split(g, blocks), None, split_codes, scales),
        tuple(split(x, blocks) for x in moments),
        lambda x: jnp.max(x, axis=within, keepdims=True),
        noise and random_of_blocks(noise, blocks),
    )
    return Stored(
        tuple(storage.merge_codes(k, c) for k, c in enumerate(codes)),
        jax.tree.map(lambda s: jnp.squeeze(s, within), scales),
    )


def _marked(storage: Storage, moments: Moments) -> tuple[jax.Array, Moments]:
    """What a step looks at to see that moments are not finite.

    Of dense slots that is the gradient, here 0 or infinite; of those that are relative
    to another, the other.
    """
    g, marked = jnp.zeros_like(moments[0]), list(moments)
    for x, slot in zip(moments, storage.slots, strict=True):
        bad = ~jnp.isfinite(x)
        if not slot.format.quantized:
            g = jnp.where(bad, jnp.inf, g)
        if slot.reference is not None:
            marked[slot.reference] = jnp.where(bad, jnp.inf, marked[slot.reference])
    return g, tuple(marked)


def _stored(
    program: Program,
    leaf: Leaf,
    moments: Moments,
    largest: Callable[[jax.Array], jax.Array],
    random: Random | None,
) -> Stored:
    """The library's own step of a tile, which only stores what it is given."""

    def nearest(draw: Any) -> Any:
        del draw
        return NEAREST

    with using(QUICK):
        out = tile_step(
            program,
            leaf,
            Scalars(jnp.float32(0.0), moments),
            largest=largest,
            random=random or nearest,
        )
    return Stored(out.codes, out.scales)
