"""How well Muon runs on a momentum of 8 bits: formats, roundings and block sizes.

    python benchmarks/muon_formats.py

Every candidate keeps its own rounded momentum of a 256 x 512 matrix, beside an exact
one that sees the same gradients: a slowly turning signal of rank 8 whose rows have
log-normal sizes (sigma 1), and noise of the same size. All is measured on the step,
five iterations of Newton-Schulz, after 200 steps.

* error: |step - exact step| / |exact step|, the mean of 20 steps;
* way: the same of the sum of these steps;
* dead: rms(m) / rms(m at its start) of rows that get no more gradients for 200 steps,
  beside a row of the same block whose gradient is the same in every step (exact: 4e-5,
  or 0 where that is no code);
* bytes per parameter.
"""

import argparse
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from octavo.optim.matrices.newton_schulz import Iterations, iterations, orthogonalized
from octavo.pallas_kernels import Format, rounding
from octavo.pallas_kernels.formats import Dynamic8, Linear8, Mixed8, MuLaw, widened

SHAPE, RANK, BETA, SETTLE, MEASURED = (256, 512), 8, 0.95, 200, 20


@dataclass(frozen=True)
class Candidate:
    """A format, with unbiased rounding or to the nearest, in blocks of some size."""

    name: str
    format: Format
    unbiased: bool
    size: int

    def stored(self, m: jax.Array, key: jax.Array) -> jax.Array:
        """What becomes of a momentum that is stored and read again."""
        form = self.format
        if not form.quantized:
            return m
        parts = m.reshape(-1, self.size, m.shape[1])
        scale = form.scale(jnp.max(form.magnitude(parts), axis=1, keepdims=True))
        noise: Any = rounding.NEAREST
        if self.unbiased:
            noise = jax.random.randint(key, parts.shape, 0, 1 << rounding.NOISE_BITS)
        codes = form.encoded(parts, form.encoding(scale), noise).astype(form.dtype)
        return form.decoded(widened(codes), form.decoding(scale)).reshape(m.shape)

    @property
    def bytes(self) -> float:
        """For each parameter."""
        return 1 + 2 / self.size if self.format.quantized else 4.0


CANDIDATES = [
    Candidate("mixed8", Mixed8(), True, 32),
    Candidate("mixed8", Mixed8(), True, 128),
    Candidate("mulaw8", MuLaw(), True, 32),
    Candidate("mulaw8", MuLaw(), False, 32),
    Candidate("linear8", Linear8(), True, 32),
    Candidate("linear8", Linear8(), False, 32),
    Candidate("dynamic8", Dynamic8(True), False, 32),
    Candidate("mulaw8", MuLaw(), True, 64),
    Candidate("mulaw8", MuLaw(), True, 128),
    Candidate("mulaw8", MuLaw(), True, 256),
    Candidate("linear8", Linear8(), True, 128),
]
_HOW = iterations("standard", None, "frobenius", False, None)


def direction(m: jax.Array, g: jax.Array, how: Iterations = _HOW) -> jax.Array:
    """The step of a momentum."""
    u = BETA * m + (1 - BETA) * g
    return orthogonalized(u[None], how, jnp.float32(1e-8))[0]


def gradients(key: jax.Array) -> Any:
    """A function of the number of a step."""
    a, b, c, d = jax.random.split(key, 4)
    left, right = (
        jax.random.normal(a, (SHAPE[0], RANK)),
        jax.random.normal(b, (RANK, SHAPE[1])),
    )
    phases = jax.random.uniform(d, (RANK,)) * 6.28
    sizes = jnp.exp(jax.random.normal(c, (SHAPE[0], 1)))

    def gradient(t: jax.Array) -> jax.Array:
        strength = jnp.cos(t / 100 + phases) / RANK**0.5
        noise = jax.random.normal(jax.random.fold_in(key, t), SHAPE)
        return sizes * ((left * strength) @ right + noise)

    return gradient


def measured(candidate: Candidate, key: jax.Array) -> tuple[Any, Any]:
    """Error and way."""
    gradient = gradients(key)

    def step(carry: Any, t: jax.Array) -> Any:
        exact, own = carry
        g = gradient(t)
        exact = BETA * exact + (1 - BETA) * g
        new = BETA * own + (1 - BETA) * g
        own = candidate.stored(new, jax.random.fold_in(key, t + 10_000))
        return (exact, own), (direction(exact, g), direction(new, g))

    zeros = jnp.zeros(SHAPE)
    times = jnp.arange(SETTLE)
    start, _ = jax.lax.scan(lambda c, t: (step(c, t)[0], None), (zeros, zeros), times)
    _, (a, b) = jax.lax.scan(step, start, SETTLE + jnp.arange(MEASURED))

    def error(x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.linalg.norm(x - y) / jnp.linalg.norm(y)

    return jnp.mean(jax.vmap(error)(b, a)), error(b.sum(0), a.sum(0))


def dead(candidate: Candidate, key: jax.Array) -> Any:
    """What is left of rows without gradients."""
    m = jnp.abs(jax.random.normal(key, (candidate.size, 64))) * 0.3
    g = jnp.zeros_like(m).at[0].set(2.0)
    start = m.at[0].set(2.0)

    def step(m: jax.Array, t: jax.Array) -> Any:
        new = BETA * m + (1 - BETA) * g
        return candidate.stored(new, jax.random.fold_in(key, t)), None

    end, _ = jax.lax.scan(step, start, jnp.arange(200))
    return jnp.linalg.norm(end[1:]) / jnp.linalg.norm(start[1:])


def main() -> None:
    """Print the table."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    print("| format | rounding | block | bytes | error | way | dead |")
    print("|---|---|---|---|---|---|---|")
    key = jax.random.key(0)
    for c in CANDIDATES:
        found = jax.jit(lambda k, c=c: (*measured(c, k), dead(c, k)))(key)
        how = "unbiased" if c.unbiased else "nearest"
        numbers = " | ".join(f"{float(x):.4f}" for x in found)
        print(
            f"| {c.name} | {how} | {c.size} | {c.bytes:.4f} | {numbers} |", flush=True
        )


if __name__ == "__main__":
    main()
