"""How near Newton-Schulz gets to an orthogonal matrix, in 3 or 5 steps.

    python benchmarks/muon_steps.py

Matrices of 256 x 512 with normal values, and others whose singular values fall from 1
to 1/10, 1/100 or 1/1000, each by the same factor. Against the exact polar factor, from
numpy in float64:

* least, most: singular values of the result;
* mean: of |singular value - 1|;
* angle: between the result and the polar factor, in degrees.

Products are computed in the type that is named, with sums in float32.
"""

import argparse
from collections.abc import Iterator, Sequence

import jax.numpy as jnp
import numpy as np

from octavo.optim.matrices.newton_schulz import iterations, orthogonalized

SHAPE = (256, 512)


def matrices() -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Name, matrix, and its polar factor."""
    rng = np.random.default_rng(0)
    random = rng.normal(size=SHAPE)
    left, s, right = np.linalg.svd(random, full_matrices=False)
    yield "normal", random, left @ right
    for least in (1e-1, 1e-2, 1e-3):
        s = np.geomspace(1, least, SHAPE[0])
        yield f"1 to {least:g}", (left * s) @ right, left @ right


def found(
    x: np.ndarray, polar: np.ndarray, coefficients: str, steps: int, dtype: str
) -> list[float]:
    """Least, most and mean of its singular values, and the angle."""
    how = iterations(coefficients, steps, "frobenius", False, jnp.dtype(dtype))
    own = orthogonalized(jnp.asarray(x[None], jnp.float32), how, jnp.float32(1e-8))
    made = np.asarray(own[0], np.float64)
    s = np.linalg.svd(made, compute_uv=False)
    cosine = np.sum(made * polar) / np.linalg.norm(made) / np.linalg.norm(polar)
    degrees = np.degrees(np.arccos(min(1.0, cosine)))
    return [s.min(), s.max(), np.mean(np.abs(s - 1)), degrees]


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    p = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    p.add_argument("--steps", type=int, nargs="+", default=[3, 5])
    p.add_argument("--coefficients", default="standard")
    args = p.parse_args(argv)
    print("| singular values | steps | type | least | most | mean | angle |")
    print("|---|---|---|---|---|---|---|")
    for name, x, polar in matrices():
        for steps in args.steps:
            for dtype in ("float32", "bfloat16"):
                how = args.coefficients, steps, dtype
                *values, angle = found(x, polar, *how)
                numbers = " | ".join(f"{v:.2f}" for v in values)
                print(f"| {name} | {steps} | {dtype} | {numbers} | {angle:.1f} |")


if __name__ == "__main__":
    main()
