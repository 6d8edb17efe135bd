"""Roots and quotients: exact, or as a device has them.

What a step does with moments of 8 bits needs no correctly rounded root: special cases
and refinements would cost more instructions than the rest of Adam. A kernel names its
own operations while it is traced, and XLA's path takes quick ones for quantized leaves.
Everything else, 32-bit state included, is exact.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# Below it, float32 and bfloat16 are denormal; some devices flush those to zero.
SMALLEST = float(np.finfo(np.float32).tiny)


class Arithmetic(NamedTuple):
    """What `root`, `inverse_root` and `divide` compute.

    Args:
      inverse_root: of positive numbers; None: 1 / sqrt, exact.
      reciprocal: of positive numbers; None: quotients are exact.
      lowest: what is smaller than this counts as this; it broadcasts.
    """

    inverse_root: Callable[[jax.Array], jax.Array] | None
    reciprocal: Callable[[jax.Array], jax.Array] | None
    lowest: jax.Array | float = SMALLEST


EXACT = Arithmetic(None, None)
# Of float32: within two units in the last place.
QUICK = Arithmetic(lax.rsqrt, lambda x: 1.0 / x)

_chosen: ContextVar[Arithmetic] = ContextVar("arithmetic", default=EXACT)


@contextlib.contextmanager
def using(arithmetic: Arithmetic) -> Iterator[None]:
    """Trace what is inside with these operations."""
    token = _chosen.set(arithmetic)
    try:
        yield
    finally:
        _chosen.reset(token)


@contextlib.contextmanager
def not_below(lowest: jax.Array | None) -> Iterator[None]:
    """Take roots of numbers of at least this; None: of any."""
    now = _chosen.get()
    if lowest is None:
        yield
        return
    with using(now._replace(lowest=jnp.maximum(lowest, now.lowest))):
        yield


def root(x: jax.Array) -> jax.Array:
    """The square root of what is not negative."""
    now = _chosen.get()
    if now.inverse_root is None:
        return jnp.sqrt(x)
    positive = jnp.maximum(x, now.lowest)
    return positive * now.inverse_root(positive)


def inverse_root(x: jax.Array) -> jax.Array:
    """1 / sqrt(x) of what is not negative, finite for zeros."""
    now = _chosen.get()
    positive = jnp.maximum(x, now.lowest)
    found = now.inverse_root
    return 1.0 / jnp.sqrt(positive) if found is None else found(positive)


def divide(x: jax.Array, y: jax.Array) -> jax.Array:
    """x / y for y > 0."""
    reciprocal = _chosen.get().reciprocal
    return x / y if reciprocal is None else x * reciprocal(y)
