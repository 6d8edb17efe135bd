"""One pass over a leaf whose state is in host memory, a chunk at a time.

A chunk is to a leaf what a shard is: it has whole blocks, and its random numbers and
layers go by its place in the whole. While one chunk is stepped, the next one is on its
way to the device. So no more than three are there at once, whatever the leaf's size.

What compiles to what is subtle: docs/decisions.md, "Paged state". Host arrays are
changed in place by a loop of XLA's; in a loop of Python's all chunks would be fetched
at once.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from octavo.pallas_kernels import (
    Leaf,
    Noise,
    Program,
    Scalars,
    Storage,
    choose,
    run,
    wrap,
)

from ..storage.chunks import Grid, chunk_shape, divided, grids_of, part_of

_Index: TypeAlias = Sequence[jax.Array | int]


def first_chunk(program: Program, dtypes: Sequence[Any], page_bytes: int) -> Program:
    """The program of the largest chunks, for those who choose its backend."""
    shape = chunk_shape(program.storage, dtypes, page_bytes)
    return replace(program, storage=part_of(program.storage, shape).unfolded)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def run_paged(
    backend: str,
    program: Program,
    page_bytes: int,
    leaf: Leaf,
    scalars: Scalars,
    noise: Noise,
    first: jax.Array,
) -> Any:
    """What `octavo.pallas_kernels.run` does, for a leaf whose state is on the host.

    Args:
      backend: of a chunk.
      program: of the leaf.
      page_bytes: of a chunk, at most.
      leaf: its arrays.
      scalars: operands.
      noise: likewise.
      first: number of the first chunk, which is 0; an operand so that it can be made
        to wait for other leaves.

    Returns:
      The leaf after the step, its state on the host; or sums of shape (sums, layers).
      And zero, once that is done.
    """
    dtypes = [x.dtype for x in (leaf.g, leaf.p) if x is not None]
    leaf = on_host(program.read(leaf))
    sums = jnp.zeros((len(program.sums), program.storage.blocks.layer_count))
    for grid in grids_of(program.storage, dtypes, page_bytes):
        part = replace(program, storage=part_of(program.storage, grid.shape))
        part = replace(part, storage=part.storage.unfolded)
        chunks = _Chunks(_refit(backend, part, dtypes), program, part, grid)
        leaf, sums, first = chunks.passed(first, leaf, sums, scalars, noise)
    return sums if program.sums else program.written(leaf), first


def on_host(leaf: Leaf) -> Leaf:
    """The leaf with its state in host memory, as far as types say that it is not."""
    state = (leaf.codes, leaf.scales, leaf.remainder)
    codes, scales, remainder = jax.tree.map(hosted, state)
    return leaf._replace(codes=codes, scales=scales, remainder=remainder)


def hosted(x: jax.Array) -> jax.Array:
    """An array in host memory."""
    there = jax.typeof(x).memory_space == jax.memory.Space.Host
    return x if there else jax.device_put(x, jax.memory.Space.Host)


def _refit(backend: str, part: Program, dtypes: Sequence[Any]) -> str:
    """The leaf's backend, or XLA where that does not take the last, shorter chunk."""
    try:
        return choose(part, dtypes, "", backend).backend
    except ValueError:
        return "xla"


class _Chunks(NamedTuple):
    """A pass over one grid of chunks."""

    backend: str
    program: Program
    part: Program
    grid: Grid

    def passed(
        self,
        first: jax.Array,
        leaf: Leaf,
        sums: jax.Array,
        scalars: Scalars,
        noise: Noise,
    ) -> tuple[Leaf, jax.Array, jax.Array]:
        """The leaf after it, sums with those of these chunks, and how many are left."""
        last = self.grid.chunks - 1

        def turn(carry: Any, ahead: bool = True) -> Any:
            k, leaf, sums, state = carry
            following = self.fetched(leaf, k + 1) if ahead else state
            new = self.new(k, leaf, state, scalars, noise)
            # The next chunk is read before this one is written: else XLA copies the
            # whole array in host memory, in case that they overlap. And it is waited
            # for after the kernel.
            state, new = lax.optimization_barrier((following, new))
            return k + 1, *self.kept(k, leaf, sums, new), state

        carry = (first, leaf, sums, self.fetched(leaf, first))
        if last:
            carry = lax.while_loop(lambda c: c[0] < last, turn, carry)
        end = functools.partial(turn, ahead=False)
        k, leaf, sums, _ = lax.while_loop(lambda c: c[0] <= last, end, carry)
        return leaf, sums, last + 1 - k

    def fetched(self, leaf: Leaf, k: Any) -> Any:
        """The state of chunk k, on the device."""
        found = jax.tree.map(self.slice(k), _state(leaf), self.places)
        return jax.device_put(found, jax.memory.Space.Device)

    def new(
        self, k: Any, leaf: Leaf, state: Any, scalars: Scalars, noise: Noise
    ) -> Any:
        """Chunk k after the step, or its sums."""
        take = self.slice(k)
        g, p = (None if x is None else take(x, self.whole) for x in (leaf.g, leaf.p))
        origin = noise.origin
        at = self.grid.at(k)
        for first, stride in zip(at, self.part.storage.blocks.strides, strict=True):
            origin = origin + jnp.int32(first) * jnp.int32(wrap(stride))
        chunk = Leaf(g, p, *_reshaped(state, self.part.storage))
        own = scalars._replace(ratio=self.ratio(k, scalars.ratio))
        noise = noise._replace(origin=origin)
        new = run(self.backend, self.part, chunk, own, noise)
        if self.program.sums:
            return new
        codes, scales, remainder = _reshaped(_state(new), self.stored)
        return new._replace(codes=codes, scales=scales, remainder=remainder)

    def kept(
        self, k: Any, leaf: Leaf, sums: jax.Array, new: Any
    ) -> tuple[Leaf, jax.Array]:
        """The leaf and the sums with what became of chunk k."""
        if self.program.sums:
            return leaf, self.added(k, sums, new)
        put = self.put(k)
        name = "p" if self.program.in_place else "g"
        moved = put(getattr(leaf, name), getattr(new, name), self.whole)
        state = jax.device_put(_state(new), jax.memory.Space.Host)
        codes, scales, remainder = jax.tree.map(put, _state(leaf), state, self.places)
        written = {"codes": codes, "scales": scales, "remainder": remainder}
        return leaf._replace(**{name: moved}, **written), sums

    # ------------------------------------------------------------------ places

    @property
    def stored(self) -> Storage:
        """How host memory has a chunk."""
        return replace(self.part.storage, folded=self.program.storage.folded)

    @property
    def whole(self) -> "_Place":
        """Of arrays of the parameter's shape."""
        return _Place(self.part.storage.shape, (1,) * len(self.grid.shape))

    @property
    def places(self) -> Any:
        """Where each array of the state has a chunk: codes, scales, remainder."""
        storage = self.stored
        codes = [
            self.place(storage.codes(k).shape, form.packed)
            for k, form in enumerate(storage.formats)
        ]
        size = storage.blocks.size
        scales = [
            self.place(storage.scales(k).shape, size) if form.quantized else None
            for k, form in enumerate(storage.formats)
        ]
        kept = storage.has_remainder
        remainder = self.place(storage.remainder.shape, 1) if kept else None
        return tuple(codes), tuple(scales), remainder

    def place(self, shape: tuple[int, ...], per: int) -> "_Place":
        """Of an array with one value for so many along the blocked axis."""
        axis = self.part.storage.blocks.axis
        return _Place(
            shape, tuple(per if k == axis else 1 for k in range(len(self.grid.shape)))
        )

    def slice(self, k: Any) -> Callable[..., Any]:
        """Takes chunk k of an array."""
        at = self.grid.at(k)
        return lambda x, place: lax.dynamic_slice(x, place.index(at), place.shape)

    def put(self, k: Any) -> Callable[..., Any]:
        """Writes chunk k of an array."""
        at = self.grid.at(k)
        return lambda x, new, place: lax.dynamic_update_slice(x, new, place.index(at))

    # ------------------------------------------------------------------ layers

    def layers(self, k: Any) -> tuple[list[int], list[int], list[Any]]:
        """Lengths of the axes of layers: of the leaf, of chunk k; and where that is."""
        whole, own = self.program.storage.blocks, self.part.storage.blocks
        at = self.grid.at(k)
        return (
            [whole.shape[axis] for axis in whole.layers],
            [own.shape[axis] for axis in own.layers],
            [at[axis] for axis in own.layers],
        )

    def ratio(self, k: Any, ratio: Any) -> Any:
        """Of the layers in chunk k."""
        whole, own, at = self.layers(k)
        if ratio is None or whole == own:
            return ratio
        return lax.dynamic_slice(ratio.reshape(whole), at, own).reshape(-1)

    def added(self, k: Any, sums: jax.Array, new: jax.Array) -> jax.Array:
        """Sums (sums, layers) and those of the layers in chunk k."""
        whole, own, at = self.layers(k)
        if whole == own:
            return sums + new
        wide, index = sums.reshape(-1, *whole), (0, *at)
        before = lax.dynamic_slice(wide, index, (len(sums), *own))
        after = before + new.reshape(before.shape)
        return lax.dynamic_update_slice(wide, after, index).reshape(sums.shape)


class _Place:
    """The shape of a chunk of one array, and of how many values it has one."""

    def __init__(self, shape: tuple[int, ...], per: tuple[int, ...]) -> None:
        self.shape, self.per = shape, per

    def index(self, at: _Index) -> list[Any]:
        """Where the chunk starts, from where it starts in the parameter."""
        found = [divided(i, n)[0] for i, n in zip(at, self.per, strict=True)]
        if len(self.shape) == len(found):
            return found
        *outer, row, column = found
        group, within = divided(row, self.shape[-2])
        return [*outer, group, within, column]


def _reshaped(state: Any, storage: Storage) -> Any:
    """The state of a chunk with the shapes of this record."""
    codes, scales, remainder = state
    return (
        tuple(x.reshape(storage.codes(k).shape) for k, x in enumerate(codes)),
        tuple(
            None if x is None else x.reshape(storage.scales(k).shape)
            for k, x in enumerate(scales)
        ),
        None if remainder is None else remainder.reshape(storage.remainder.shape),
    )


def _state(leaf: Leaf) -> Any:
    return leaf.codes, leaf.scales, leaf.remainder
