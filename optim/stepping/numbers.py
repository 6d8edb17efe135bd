"""Numbers that options give to each leaf, as operands."""

from typing import Any

import jax
import jax.numpy as jnp

from ..checks import check_not_negative
from ..storage.tree import NUMBERS, Leaves, per_leaf
from ..values import at


def numbers(
    name: str, value: Any, tree: Leaves, times: jax.Array | None = None
) -> list[jax.Array]:
    """The operand of each leaf; equal ones are one array, which leaves then share."""
    made: dict[Any, jax.Array] = {}
    found = []
    for path, x in zip(tree.names, per_leaf(name, value, tree, NUMBERS), strict=True):
        key = x if isinstance(x, int | float) else id(x)
        if key not in made:
            check_not_negative(**{f"{name}{at(path)}": x})
            number = jnp.asarray(x, jnp.float32)
            made[key] = number if times is None else _product(times, number, x)
        found.append(made[key])
    return found


def _product(times: jax.Array, number: jax.Array, x: Any) -> jax.Array:
    """Without a product by the number 1."""
    return times if isinstance(x, int | float) and x == 1 else times * number
