"""Newton-Schulz iterations, which bring the singular values of a matrix near 1."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from ..checks import check_bool, check_int, is_number

Triple: TypeAlias = tuple[float, float, float]

PRECONDITIONINGS = ("frobenius", "spectral", "aol", "schatten")
# Jordan et al., Muon, 2024; Ahn et al., Dion, arXiv 2504.05295.
COEFFICIENTS: dict[str, tuple[Triple, ...]] = {
    "standard": ((3.4445, -4.7750, 2.0315),),
    "dion": (
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ),
}


@dataclass(frozen=True)
class Iterations:
    """What is compiled for a matrix; static.

    Attributes:
      coefficients: of x, (x x') x and (x x')^2 x, in each step.
      preconditioning: what a matrix is divided by before.
      adaptive: whether the result is multiplied by the dual norm of what it was.
      dtype: in which products are computed; None: that of the gradient.
    """

    coefficients: tuple[Triple, ...]
    preconditioning: str
    adaptive: bool
    dtype: Any


def iterations(
    ns_coeffs: Any, ns_steps: Any, preconditioning: Any, adaptive: Any, dtype: Any
) -> Iterations:
    """Check the arguments of these names.

    Raises:
      ValueError: for a value that is not allowed.
    """
    rows = _rows(ns_coeffs)
    if ns_steps is not None:
        check_int("ns_steps", ns_steps)
        if ns_steps < 1:
            raise ValueError(f"ns_steps={ns_steps} must be 1 or more, such as 5")
    if len(rows) == 1:
        rows *= 5 if ns_steps is None else ns_steps
    elif ns_steps not in (None, len(rows)):
        raise ValueError(
            f"ns_steps={ns_steps} with {len(rows)} rows of ns_coeffs: each row is one "
            "step. Leave ns_steps out, or give as many rows"
        )
    if preconditioning not in PRECONDITIONINGS:
        known = ", ".join(map(repr, PRECONDITIONINGS))
        raise ValueError(f"unknown preconditioning {preconditioning!r}; known: {known}")
    check_bool(adaptive=adaptive)
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            f"ns_dtype={dtype!r} must be a type of floating numbers, such as "
            "jnp.bfloat16, or None for that of the gradients"
        )
    name = None if dtype is None else jnp.dtype(dtype)
    return Iterations(rows, preconditioning, adaptive, name)


def _rows(ns_coeffs: Any) -> tuple[Triple, ...]:
    """The coefficients of each step; of all steps, if there is one."""
    if isinstance(ns_coeffs, str) and ns_coeffs in COEFFICIENTS:
        return COEFFICIENTS[ns_coeffs]
    if isinstance(ns_coeffs, Sequence) and not isinstance(ns_coeffs, str):
        one = all(is_number(x) for x in ns_coeffs)
        rows = [ns_coeffs] if one else ns_coeffs
        if rows and all(_is_triple(row) for row in rows):
            return tuple((float(a), float(b), float(c)) for a, b, c in rows)
    names = ", ".join(map(repr, COEFFICIENTS))
    raise ValueError(
        f"ns_coeffs={ns_coeffs!r} must be one of {names}, three numbers, or a tuple of "
        "three numbers for each step"
    )


def _is_triple(row: Any) -> bool:
    return isinstance(row, Sequence) and len(row) == 3 and all(map(is_number, row))


def orthogonalized(x: jax.Array, how: Iterations, eps: jax.Array) -> jax.Array:
    """Matrices with the singular vectors of x, and singular values near 1.

    Args:
      x: matrices, shape (count, rows, columns).
      how: the iterations.
      eps: added to what they are divided by.
    """
    given = x
    x = x if how.dtype is None else x.astype(how.dtype)
    x, gram = _preconditioned(x, how.preconditioning, eps)
    for c in how.coefficients:
        gram = _gram(x) if gram is None else gram
        factor = c[1] * gram + c[2] * _product(gram, gram)
        x = c[0] * x + (_product(x, factor) if _is_tall(x) else _product(factor, x))
        gram = None
    x = x.astype(given.dtype)
    if how.adaptive:
        x = jnp.sum(given * x, axis=(-2, -1), keepdims=True) * x
    return x


def _is_tall(x: jax.Array) -> bool:
    return x.shape[-2] > x.shape[-1]


def _gram(x: jax.Array) -> jax.Array:
    """x x', or x' x where that is smaller."""
    return _product(x.mT, x) if _is_tall(x) else _product(x, x.mT)


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, preferred_element_type=jnp.float32).astype(a.dtype)


def _preconditioned(
    x: jax.Array, how: str, eps: jax.Array
) -> tuple[jax.Array, jax.Array | None]:
    """Matrices whose singular values are at most 1; and their Gram matrices, if known.

    Frobenius' norm is taken in float32: in 16 bits it would be off by percents.
    """
    eps = eps.astype(jnp.float32)
    if how in ("frobenius", "spectral"):
        wide = x.astype(jnp.float32)
        norm = jnp.linalg.norm(
            wide, ord=2 if how == "spectral" else "fro", axis=(-2, -1), keepdims=True
        )
        return (wide / (norm + eps)).astype(x.dtype), None
    gram = _gram(x)
    wide = gram.astype(jnp.float32)
    if how == "aol":  # arXiv 2512.04632: for each row of the smaller side
        size = jnp.sum(jnp.abs(wide), axis=-1, keepdims=True)
    else:  # Schatten's 4-norm, arXiv 2506.10935
        size = jnp.linalg.norm(wide, axis=(-2, -1), keepdims=True)
    s = jax.lax.rsqrt(jnp.maximum(size, eps))
    scaled = (wide * s * s.mT).astype(x.dtype)
    wide = x.astype(jnp.float32) * (s.mT if _is_tall(x) else s)
    return wide.astype(x.dtype), scaled


@dataclass(frozen=True)
class Orthogonal:
    """How the direction of a matrix is made orthogonal, and its length.

    Attributes:
      iterations: of Newton-Schulz.
      eps: in them.
      consistent_rms: factor of sqrt(max(rows, columns)); None: the length is
        sqrt(max(1, columns / rows)).
      largest: values in a matrix that one device may have.
    """

    iterations: Iterations
    eps: Any
    consistent_rms: Any
    largest: int


@dataclass(frozen=True)
class Direction:
    """From momentum to the direction that the learning rate multiplies; static."""

    iterations: Iterations

    def __call__(
        self, x: jax.Array, eps: jax.Array, rms: jax.Array | None = None
    ) -> jax.Array:
        rows, columns = x.shape[-2:]
        if rms is None:
            scale = jnp.float32(max(1.0, columns / rows) ** 0.5)
        else:
            scale = rms * max(rows, columns) ** 0.5
        found = orthogonalized(x, self.iterations, eps)
        return (scale * found.astype(jnp.float32)).astype(x.dtype)
