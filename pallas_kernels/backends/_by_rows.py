"""A leaf whose arrays XLA would write apart: scales first, then the rest in place.

XLA's CPU compiler writes one array per loop. It keeps a root or a quotient that two
loops need as an array of the leaf's size, and copies what one of them overwrites while
another reads it. Fresh pages for those take longer than the whole step. Nothing is
shared by what is inside of two `while` loops, and each one starts from the counter of
the last: so XLA knows that nothing needs to be copied.

A GPU's compiler writes several arrays in one loop, but transposes what it reduces along
rows of a block, to arrays of the leaf's size. It only needs the scales first.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ..layout import Blocks, merge, split
from ..norms import tile_terms
from ..program import Leaf, Noise, Program, Scalars, wide
from ..step import Random, advance, decoding_of, new_scales, settle, write

_ROWS = 4  # of a block, that one turn of a loop reads
_LARGE = 2**18  # values of a leaf; fewer are in a cache, and sooner compiled


def by_rows(program: Program) -> bool:
    """Whether the leaf is large, and of whole blocks across its rows of values."""
    storage, blocks = program.storage, program.storage.blocks
    if not storage.quantized or storage.packed or not storage.elementwise:
        return False
    if blocks.axis is None or blocks.axis in blocks.layers:
        return False
    whole = blocks.shape[blocks.axis] % blocks.size == 0
    return whole and math.prod(blocks.shape) >= _LARGE


def stepped(
    program: Program,
    random_of: Callable[[Noise, Blocks], Random],
    leaf: Leaf,
    scalars: Scalars,
    noise: Noise,
    *,
    in_turn: bool,
) -> Leaf:
    """A step of a quantized leaf: first all scales, then its arrays.

    `in_turn` or, where the compiler has loops that write several, together.
    """
    blocks = program.storage.blocks
    parts, old = _in_rows(leaf, blocks)
    wide_scales = jax.tree.map(lambda s: s.astype(jnp.float32), old)
    decoding = decoding_of(program, wide_scales)
    found = _largest(program, parts, decoding, scalars)
    settled = settle(program, found, None, scalars)
    scales = new_scales(settled, wide_scales, old, settled.keep)

    def written(now: Leaf, i: jax.Array | None) -> Leaf:
        s, n = scalars, noise
        if i is not None:
            now, s, n = _not_hoisted(i, (now, s, n))
        tile = wide(program, now, s)
        new = advance(program, tile, s, decoding=decoding)
        return write(program, now, tile, new, settled, s, random_of(n, blocks))

    if in_turn:
        out = _each_in_turn(program, parts, noise, written)
    else:
        out = written(parts, None)
    out = jax.tree.map(lambda x: merge(x, blocks), out._replace(scales=()))
    scales = jax.tree.map(lambda s: jnp.squeeze(s, blocks.within), scales)
    return out._replace(scales=scales)


def _each_in_turn(
    program: Program,
    parts: Leaf,
    noise: Noise,
    written: Callable[[Leaf, jax.Array | None], Leaf],
) -> Leaf:
    """What a step writes but scales, each array by a loop of its own."""
    # XLA does not know that it is 1, and so keeps the loops: x (x + 1) is even.
    once = 1 + ((noise.step * noise.step + noise.step) & 1)
    out, i = parts, jnp.int32(0)
    for k in range(len(_written(program, parts))):
        if k == 0 and not program.in_place:  # an update joins what is done with it
            x = written(parts, None).g
        else:
            i, x = _turn(program, written, parts, k, i, once)
        out = _put(program, out, k, x)
    return program.written(out)


def terms_by_rows(program: Program, leaf: Leaf, scalars: Scalars) -> list[jax.Array]:
    """What a program's sums add up, already added up over each block."""
    blocks = program.storage.blocks
    parts, scales = _in_rows(leaf, blocks)
    wide_scales = jax.tree.map(lambda s: s.astype(jnp.float32), scales)
    decoding = decoding_of(program, wide_scales) if program.reads_state else None

    def terms(row: Leaf) -> list[jax.Array]:
        return tile_terms(program, row, scalars, decoding=decoding)

    found = _over_rows(blocks, parts, terms, jnp.add)
    return [jnp.squeeze(x, blocks.within) for x in found]


def _in_rows(leaf: Leaf, blocks: Blocks) -> tuple[Leaf, tuple[Any, ...]]:
    """The leaf as stored, with each block on an axis of its own; and its scales."""
    scales = jax.tree.map(lambda s: jnp.expand_dims(s, blocks.within), leaf.scales)
    parts = jax.tree.map(lambda x: split(x, blocks), leaf._replace(scales=()))
    return parts._replace(scales=(None,) * len(scales)), scales


def _turn(
    program: Program,
    written: Callable[[Leaf, jax.Array | None], Leaf],
    parts: Leaf,
    k: int,
    start: jax.Array,
    once: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Array k of what a step writes, in place, and a counter that is known after it."""

    def turn(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        i, x = carry
        return i + 1, _written(program, written(_put(program, parts, k, x), i))[k]

    first = (start, _written(program, parts)[k])
    return lax.while_loop(lambda carry: carry[0] < start + once, turn, first)


def _written(program: Program, leaf: Leaf) -> tuple[jax.Array, ...]:
    """The arrays of the parameter's shape that a step writes."""
    first = leaf.p if program.in_place else leaf.g
    last = () if leaf.remainder is None else (leaf.remainder,)
    return (first, *leaf.codes, *last)


def _put(program: Program, leaf: Leaf, k: int, x: jax.Array) -> Leaf:
    """The leaf with x as array k of those."""
    if k > len(leaf.codes):
        return leaf._replace(remainder=x)
    if k:
        return leaf._replace(codes=(*leaf.codes[: k - 1], x, *leaf.codes[k:]))
    return leaf._replace(p=x) if program.in_place else leaf._replace(g=x)


def _not_hoisted(i: jax.Array, tree: Any) -> Any:
    """The same arrays, which XLA takes for dependent on a loop's counter.

    Else it would compute what it can of them before the loop, and write that down.
    LLVM, which compiles the loop, sees through it.
    """
    never = (i < 0) & (i > 0)
    return jax.tree.map(lambda x: jnp.where(never, jnp.zeros_like(x), x), tree)


def _largest(
    program: Program, parts: Leaf, decoding: list[Any], scalars: Scalars
) -> list[jax.Array]:
    """The largest magnitudes of each block."""

    def magnitudes(row: Leaf) -> tuple[jax.Array, ...]:
        tile = wide(program, row, scalars)
        return advance(program, tile, scalars, decoding=decoding).magnitudes

    return _over_rows(program.storage.blocks, parts, magnitudes, jnp.maximum)


def _over_rows(
    blocks: Blocks,
    parts: Leaf,
    function: Callable[[Leaf], Sequence[jax.Array]],
    join: Callable[[jax.Array, jax.Array], jax.Array],
) -> list[jax.Array]:
    """What the function makes of the rows of blocks, joined.

    XLA reduces what it has written to memory before, on a GPU transposed. Row by row
    these are plain loops over vectors.
    """
    rows = math.gcd(blocks.size, _ROWS)

    def row(i: jax.Array) -> Leaf:
        def cut(x: jax.Array) -> jax.Array:
            return lax.dynamic_slice_in_dim(x, i, 1, blocks.within)

        return jax.tree.map(cut, parts)

    def turn(i: jax.Array, found: list[jax.Array]) -> list[jax.Array]:
        for k in range(rows):
            found = [*map(join, found, function(row(i * rows + k)))]
        return found

    zero = jnp.int32(0)
    like = row(zero).g
    kinds = jax.eval_shape(lambda: function(row(zero)))
    start = [jnp.zeros_like(like, x.dtype) for x in kinds]
    return lax.fori_loop(zero, jnp.int32(blocks.size // rows), turn, start)
