"""The same pass over several equal leaves, as one computation on stacks of them.

XLA compiles what each leaf needs anew, however equal leaves are: 26 s for the steps of
300 leaves of 8,192 values on a CPU, where two seconds do.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ..program import Leaf, Noise, Program, Scalars

_SMALL, _MANY, _MOST = 2**16, 8, 2**22  # values of a leaf; leaves; values together


def singles(leaves: Sequence[Leaf]) -> list[list[int]]:
    """Indices of leaves, each alone."""
    return [[k] for k in range(len(leaves))]


def groups_of(
    programs: Sequence[tuple[str, Program]],
    leaves: Sequence[Leaf],
    scalars: Sequence[Scalars],
) -> list[list[int]]:
    """Indices of leaves, those together that are equal, small, many, and XLA's.

    Fewer are not worth the copies.
    """
    equal: dict[Any, list[int]] = {}
    for k, (program, leaf, s) in enumerate(zip(programs, leaves, scalars, strict=True)):
        arrays, treedef = jax.tree.flatten((leaf, s))
        alone = k if program[0] != "xla" or leaf.g.size > _SMALL else None
        key = (program, treedef, tuple((x.shape, x.dtype) for x in arrays), alone)
        equal.setdefault(key, []).append(k)
    groups = []
    for group in equal.values():
        most = max(_MOST // max(leaves[group[0]].g.size, 1), 1)
        most = 1 if len(group) < _MANY else most
        groups += [group[k : k + most] for k in range(0, len(group), most)]
    return groups


def together(
    function: Callable[[Leaf, Scalars, Noise], Any],
    leaves: Sequence[Leaf],
    scalars: Sequence[Scalars],
    noise: Sequence[Noise],
) -> list[Any]:
    """What the function makes of each leaf, all of which are of equal shapes and types.

    Operands that all leaves share, such as the learning rate, are not stacked.
    """
    treedef = jax.tree.structure(scalars[0])
    numbers = [jax.tree.leaves(s) for s in scalars]
    shared = [all(x is same[0] for x in same) for same in zip(*numbers, strict=True)]
    own = [[x for x, s in zip(row, shared, strict=True) if not s] for row in numbers]

    def each(leaf: Leaf, own: list[jax.Array], noise: Noise) -> Any:
        rest = iter(own)
        mine = zip(numbers[0], shared, strict=True)
        operands = treedef.unflatten([x if same else next(rest) for x, same in mine])
        return function(leaf, operands, noise)

    n, rows = len(leaves), list(zip(leaves, own, noise, strict=True))
    stacks = jax.tree.map(lambda *x: jnp.stack(x, _axis(x[0])), *rows)
    results = jax.eval_shape(each, *rows[0])
    step = jax.vmap(
        each,
        in_axes=jax.tree.map(_axis, rows[0]),
        out_axes=jax.tree.map(_axis, results),
    )
    return lax.platform_dependent(
        *stacks,
        cpu=lambda *stacks: _sliced_on_cpu(step, stacks, n),
        default=lambda *stacks: _sliced(step(*stacks), n),
    )


def _axis(x: Any) -> int:
    """The axis along which arrays like this are stacked.

    Vectors side by side: blocks of one alone would leave most of a TPU's lanes empty.
    """
    return 1 if jnp.ndim(x) == 1 else 0


def _sliced(stacked: Any, n: int) -> list[Any]:
    def parts(x: jax.Array) -> list[jax.Array]:
        axis = _stacked_axis(x)
        return [lax.squeeze(part, (axis,)) for part in lax.split(x, (1,) * n, axis)]

    arrays, treedef = jax.tree.flatten(stacked)
    rows = zip(*(parts(x) for x in arrays), strict=True)
    return [treedef.unflatten(row) for row in rows]


def _stacked_axis(x: jax.Array) -> int:
    """Of a stack."""
    return 1 if x.ndim == 2 else 0


def _sliced_on_cpu(function: Callable[..., Any], stacks: Any, n: int) -> list[Any]:
    """Likewise, where XLA would compile each slice apart, for 6 ms, and recompute it.

    Slices at indices that XLA does not know are all one kernel; and what is made in a
    branch is neither recomputed nor known outside of it.
    """
    x = stacks[-1].step[0]

    def indices_and_zeros() -> Any:
        shapes = jax.eval_shape(function, *stacks)
        return [0] * n, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    always = (x * x + x) & 1 == 0  # x (x + 1) is even, which XLA does not know
    indices, stacked = lax.cond(
        always, lambda: (list(range(n)), function(*stacks)), indices_and_zeros
    )

    def at(index: jax.Array, x: jax.Array) -> jax.Array:
        axis = _stacked_axis(x)
        starts = [index if k == axis else 0 for k in range(x.ndim)]
        sizes = [1 if k == axis else n for k, n in enumerate(x.shape)]
        part = lax.dynamic_slice(x, starts, sizes, allow_negative_indices=False)
        return lax.squeeze(part, (axis,))

    return [jax.tree.map(functools.partial(at, k), stacked) for k in indices]
