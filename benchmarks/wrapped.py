"""How far optimizers of optax get from their 32-bit selves when they are quantized.

The problem: a network of two layers (64, 128, 64) learns what another one computes,
from batches of 32 noisy examples whose features differ in size (log-normal, sigma 1).
The learning rate falls to zero in a half cosine. The same optimizer runs freely twice,
on the same batches, with its moments in 32 bits and in 8.

* bytes: of the state, per parameter of a leaf of 4096 x 4096, in 32 bits and in 8;
* after 20, after all: |p8 - p32| / |p32 - p0| of all matrices, after so many steps;
* batches: likewise, of two runs in 32 bits on other batches, after all steps;
* loss: mean over the last tenth of the steps, of the run in 8 bits over that in 32.

The last rows store the same moments in other ways.
"""

import argparse
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from rich.console import Console
from rich.progress import track
from rich.table import Table

from octavo import optim

IN, HIDDEN, OUT, BATCH = 64, 128, 64, 32
contrib = optax.contrib


class Case(NamedTuple):
    """An optimizer, from its learning rate, and how it is quantized."""

    make: Callable[[Any], optax.GradientTransformation]
    rate: float = 1e-2
    options: dict[str, Any] = {}  # noqa: RUF012


def _scaled(tx: optax.GradientTransformation, rate: Any) -> Any:
    """A part of an optimizer, as one."""
    return optax.chain(tx, optax.scale_by_learning_rate(rate))


_ROOT = {"slots": {"nu": "root"}}
_WIDER = {"slots": {"mu": "16bit"}}
CASES: dict[str, Case] = {
    "adam": Case(optax.adam),
    "adamax, nu root": Case(optax.adamax, 1e-2, _ROOT),
    "nadam": Case(optax.nadam),
    "adabelief": Case(optax.adabelief),
    "yogi": Case(optax.yogi),
    "adan": Case(optax.adan),
    "contrib.ademamix": Case(contrib.ademamix, 1e-3),
    "contrib.prodigy": Case(lambda rate: contrib.prodigy(lambda n: 100 * rate(n))),
    "contrib.schedule_free_adamw": Case(contrib.schedule_free_adamw),
    "adafactor, momentum": Case(lambda rate: optax.adafactor(rate, momentum=0.9)),
    "novograd": Case(optax.novograd),
    "trace": Case(lambda rate: _scaled(optax.trace(0.9), rate)),
    "ema": Case(lambda rate: _scaled(optax.ema(0.9), rate), 1e-1),
    "contrib.muon": Case(contrib.muon),
    "contrib.sophia": Case(contrib.sophia, 1e-3),
    "lion": Case(optax.lion, 1e-3),
    "contrib.muon, mu 16bit": Case(contrib.muon, 1e-2, _WIDER),
    "contrib.sophia, mu 16bit": Case(contrib.sophia, 1e-3, _WIDER),
    "lion, mu 16bit": Case(optax.lion, 1e-3, _WIDER),
    "contrib.schedule_free_adamw, z signed": Case(
        contrib.schedule_free_adamw, 1e-2, {"slots": {"z": "signed"}}
    ),
    "contrib.madgrad, s signed": Case(
        contrib.madgrad, 1e-2, {"slots": {"s": "signed"}}
    ),
}


def network(params: Any, x: jax.Array) -> jax.Array:
    """Two layers."""
    return jax.nn.gelu(x @ params["first"] + params["bias"]) @ params["second"]


def made(key: jax.Array) -> Any:
    """Parameters."""
    first, second = jax.random.split(key)
    return {
        "first": jax.random.normal(first, (IN, HIDDEN)) / math.sqrt(IN),
        "bias": jnp.zeros(HIDDEN),
        "second": jax.random.normal(second, (HIDDEN, OUT)) / math.sqrt(HIDDEN),
    }


def batch(key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Examples, with noise."""
    keys = jax.random.split(key)
    size = jnp.exp(jax.random.normal(jax.random.key(2), (IN,)))
    x = size * jax.random.normal(keys[0], (BATCH, IN))
    y = network(made(jax.random.key(1)), x)
    return x, y + 0.1 * jax.random.normal(keys[1], y.shape)


def run(tx: Any, params: Any, steps: int, seed: int) -> tuple[list[Any], jax.Array]:
    """Parameters after 20 steps and after all, and the losses."""
    keys = jax.random.split(jax.random.key(seed), steps)

    def step(carry: Any, key: jax.Array) -> Any:
        params, state = carry
        x, y = batch(key)

        def loss(params: Any) -> jax.Array:
            return jnp.mean((network(params, x) - y) ** 2)

        value, grads = jax.value_and_grad(loss)(params)
        extra = {"obj_fn": loss}
        return optim.step(tx, grads, state, params, **extra), value

    @jax.jit
    def steps_of(carry: Any, keys: jax.Array) -> Any:
        return jax.lax.scan(step, carry, keys)

    early, losses = steps_of((params, tx.init(params)), keys[:20])
    late, more = steps_of(early, keys[20:])
    return [early[0], late[0]], jnp.concatenate([losses, more])


def distance(a: Any, b: Any) -> float:
    """Of all matrices."""
    matrices = [x - y for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True)]
    return float(jnp.sqrt(sum(jnp.sum(x**2) for x in matrices if x.ndim > 1)))


def bytes_of(tx: Any) -> float:
    """Per parameter of a large leaf."""
    like = jax.ShapeDtypeStruct((4096, 4096), jnp.float32)
    state = jax.eval_shape(tx.init, {"kernel": like})
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)) / 4096**2


def row(case: Case, steps: int) -> list[float]:
    """The numbers of one case."""
    rate = optax.cosine_decay_schedule(case.rate, steps)
    tx = case.make(rate)
    quantized = optim.quantized(tx, **case.options)
    params = made(jax.random.key(0))
    exact, losses = run(tx, params, steps, 0)
    other, _ = run(tx, params, steps, 1)
    rounded, lossy = run(quantized, params, steps, 0)
    moved = [distance(p, params) for p in exact]
    tail = -max(steps // 10, 1)
    return [
        bytes_of(tx),
        bytes_of(quantized),
        *(distance(a, b) / m for a, b, m in zip(rounded, exact, moved, strict=True)),
        distance(other[1], exact[1]) / moved[1],
        float(lossy[tail:].mean() / losses[tail:].mean()),
    ]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--only", nargs="*", help="names of rows")
    args = parser.parse_args()
    columns = "32 bits", "8 bits", "after 20", "after all", "batches", "loss"
    table = Table("optimizer", *columns)
    chosen = {k: case for k, case in CASES.items() if k in (args.only or CASES)}
    for name, case in track(chosen.items(), console=Console(stderr=True)):
        table.add_row(name, *(f"{x:.4f}" for x in row(case, args.steps)))
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
