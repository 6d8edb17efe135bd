"""How well Muon runs on a momentum of 8 bits: formats, roundings and block sizes.

    python benchmarks/muon_formats.py

Every candidate keeps its own rounded momentum, beside an exact one that sees the same
gradients. What is measured is |step - exact step| / |exact step|, the mean of 20 steps,
each of five iterations of Newton-Schulz:

* early, late: after 10 and after 130 steps, the mean of the four matrices of the middle
  layer of `examples/train_lm.py`, whose gradients are recorded from a run in 32 bits;
* rows: after 200 steps of a matrix of 256 x 512, whose gradients are a slowly turning
  signal of rank 8 with rows of log-normal sizes (sigma 1), and noise of the same size;
* left: rms(m) / rms(m at its start) of rows that get no more gradients for 200 steps,
  beside a row of the same block whose gradient is the same in every step (exact: 4e-5,
  or 0 where that is no code);
* bytes per parameter.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from octavo import optim
from octavo.optim.matrices.newton_schulz import Iterations, iterations, orthogonalized
from octavo.pallas_kernels import Format, rounding
from octavo.pallas_kernels.formats import Dynamic8, Linear8, Mixed8, MuLaw, widened

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from _runs import FLOAT32, Config
from _text import batch_of, read_text
from _transformer import loss_of
from train_lm import start

SHAPE, RANK, BETA, SETTLE, MEASURED = (256, 512), 8, 0.95, 200, 20
EARLY, LATE = 10, 130


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
        return jnp.dtype(self.format.dtype).itemsize + 2 / self.size

    @property
    def how(self) -> str:
        """Of rounding."""
        if isinstance(self.format, Mixed8):
            return "mixed"
        return "unbiased" if self.unbiased else "nearest"


CANDIDATES = [
    Candidate("mulaw8", Mixed8(), True, 128),
    Candidate("mulaw8", Mixed8(), True, 32),
    Candidate("mulaw8", MuLaw(), True, 32),
    Candidate("mulaw8", MuLaw(), True, 128),
    Candidate("mulaw8", MuLaw(), False, 32),
    Candidate("linear8", Linear8(), True, 32),
    Candidate("linear8", Linear8(), False, 32),
    Candidate("dynamic8", Dynamic8(True), False, 32),
    Candidate("mulaw16", MuLaw(16), True, 32),
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


def recorded(path: Path) -> dict[str, jax.Array]:
    """Gradients of the example's matrices in each step, kept in a file."""
    if not path.exists():
        text = read_text(128)
        how = ("muon", "32bit", FLOAT32, 250, 8, 0, 1.6e-2, 128, 3, 4, 128)
        state, found = start(Config(*how)).state, []

        @jax.jit
        def step(state: optim.TrainState, rows: Any) -> tuple[optim.TrainState, Any]:
            grads = jax.grad(loss_of)(state.params, state.apply_fn, rows)
            own = grads["block_1"]
            kept = {k: x["kernel"] for k, x in own.items() if "kernel" in x}
            return state.apply_gradients(grads=grads), kept

        for k in range(LATE + MEASURED):
            state, kept = step(state, batch_of(text, 0, k, 8, 128))
            found.append(jax.tree.map(np.asarray, kept))
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, **{k: np.stack([x[k] for x in found]) for k in found[0]})
    return {k: jnp.asarray(x) for k, x in np.load(path).items()}


def error(
    candidate: Candidate,
    gradient: Callable[[jax.Array], jax.Array],
    settle: int,
    key: jax.Array,
) -> jax.Array:
    """Of a step, after some."""

    def step(carry: Any, t: jax.Array) -> Any:
        exact, own = carry
        g = gradient(t)
        exact = BETA * exact + (1 - BETA) * g
        new = BETA * own + (1 - BETA) * g
        own = candidate.stored(new, jax.random.fold_in(key, t + 10_000))
        a, b = direction(exact, g), direction(new, g)
        return (exact, own), jnp.linalg.norm(b - a) / jnp.linalg.norm(a)

    zeros = jnp.zeros_like(gradient(jnp.int32(0)))
    times = jnp.arange(settle)
    begun, _ = jax.lax.scan(lambda c, t: (step(c, t)[0], None), (zeros, zeros), times)
    _, errors = jax.lax.scan(step, begun, settle + jnp.arange(MEASURED))
    return jnp.mean(errors)


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


def row(candidate: Candidate, grads: dict[str, jax.Array]) -> list[float]:
    """Its numbers."""
    key = jax.random.key(0)

    def of_example(settle: int) -> float:
        found = jax.jit(
            lambda x: error(candidate, lambda t: x[t], settle, jax.random.key(1))
        )
        return float(np.mean([found(x) for x in grads.values()]))

    rows = jax.jit(lambda: error(candidate, gradients(key), SETTLE, key))
    left = jax.jit(lambda: dead(candidate, key))
    return [of_example(EARLY), of_example(LATE), float(rows()), float(left())]


def main() -> None:
    """Print the table."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--gradients", type=Path, default=Path("out/muon/gradients.npz"))
    grads = recorded(p.parse_args().gradients)
    print("| format | rounding | block | bytes | early | late | rows | left |")
    print("|---|---|---|---|---|---|---|---|")
    for c in CANDIDATES:
        numbers = " | ".join(f"{x:.4f}" for x in row(c, grads))
        print(
            f"| {c.name} | {c.how} | {c.size} | {c.bytes:.4f} | {numbers} |", flush=True
        )


if __name__ == "__main__":
    main()
