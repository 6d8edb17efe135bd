"""The same epochs in fewer and larger batches: LAMB in 8 bits, in 32, and AdamW.

    python examples/large_batch.py
    python examples/large_batch.py --seeds 0 1 2 3 4 5 6 7 --epochs 40

A perceptron learns scikit-learn's handwritten digits at batches of 64, 256 and 1024,
45 runs in two minutes on two cores.
The larger batches have no rates of their own: the learning rate grows with the square
root of the batch and the epochs of warmup grow with the batch, as in LAMB's paper
(https://arxiv.org/abs/1904.00962, table 4).
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _arguments import count, new_parser
from _digits import TRAINED_ON, Digits, Perceptron, read_digits, shuffled
from _pictures import draw_curves, draw_ratios
from _progress import progress
from _results import Results, Run, print_accuracies, print_ratios

from octavo import optim, schedules

# ---------------------------------------------------------------------------- recipes

BASE_BATCH = 64
WARMUP = 1 / 80  # of a run at BASE_BATCH; 1/5 at 1024, the paper's at its largest


class Recipe(NamedTuple):
    """An optimizer and the highest learning rate at BASE_BATCH."""

    make: Callable[..., Any]
    learning_rate: float


# The middle of the rates that do equally well at BASE_BATCH, with other splits of the
# same images and other seeds: 3e-3 to 1e-2 for LAMB, 2e-3 to 8e-3 for AdamW. Dropout
# and the number of epochs were chosen with all batches in view.
RECIPES = {
    "LAMB 32-bit": Recipe(optim.lamb32bit, 5e-3),
    "LAMB 8-bit": Recipe(optim.lamb8bit, 5e-3),
    "AdamW 8-bit": Recipe(optim.adamw8bit, 4e-3),
}


@dataclass(frozen=True)
class Config:
    """What determines a run, but for its seed."""

    optimizer: str
    batch: int
    epochs: int
    period: int
    """Examples between two evaluations, a multiple of the batch."""

    @property
    def periods(self) -> int:
        """How many evaluations there are."""
        return self.epochs * TRAINED_ON // self.period

    @property
    def steps(self) -> int:
        """How many steps a run takes."""
        return self.periods * self.period // self.batch

    @property
    def warmup_steps(self) -> int:
        """The same number at every batch: in epochs, it grows with the batch."""
        fraction = min(WARMUP * self.batch / BASE_BATCH, 0.5)
        return int(self.steps * fraction)

    @property
    def schedule(self) -> schedules.PolynomialLR:
        """Up for the warmup, then straight down to zero."""
        base = RECIPES[self.optimizer].learning_rate
        rate = schedules.scale_lr(base, self.batch, BASE_BATCH, rule="sqrt")
        return schedules.PolynomialLR(
            rate, total_steps=self.steps, warmup_steps=self.warmup_steps
        )


def make_optimizer(config: Config) -> Any:
    """The optimizer of a run. Biases neither decay nor, in LAMB, get a trust ratio."""
    kernels = partial(jax.tree.map, lambda p: p.ndim > 1)
    make = RECIPES[config.optimizer].make
    return make(config.schedule, weight_decay=0.01, mask=kernels, record_norms=True)


# --------------------------------------------------------------------------- training


def train_step(
    digits: Digits, key: jax.Array, state: optim.TrainState, batch: jax.Array
) -> tuple[optim.TrainState, tuple[jax.Array, dict[str, jax.Array]]]:
    """One step on the examples with the indices `batch`; its loss and trust ratios."""
    rngs = {"dropout": jax.random.fold_in(key, state.step)}

    def loss_of(params: Any) -> jax.Array:
        images, labels = digits.images[batch], digits.labels[batch]
        logits = state.apply_fn({"params": params}, images, train=True, rngs=rngs)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    loss, grads = jax.value_and_grad(loss_of)(state.params)
    state = state.apply_gradients(grads=grads)
    norms = optim.last_norms(state.opt_state)
    ratios = {path: norm.ratio for path, norm in norms.items() if "kernel" in path}
    return state, (loss, ratios)


def train_period(
    digits: Digits, key: jax.Array, state: optim.TrainState, batches: jax.Array
) -> tuple[optim.TrainState, dict[str, Any]]:
    """Some steps, the means of what they log, and an evaluation."""
    step = partial(train_step, digits, key)
    state, logs = jax.lax.scan(step, state, batches)
    loss, ratios = jax.tree.map(jnp.mean, logs)
    logits = state.apply_fn({"params": state.params}, digits.test_images)
    accuracy = (logits.argmax(-1) == digits.test_labels).mean()
    return state, {"loss": loss, "accuracy": accuracy, "ratios": ratios}


@partial(jax.jit, static_argnums=0)  # compiled once for all seeds
def train(config: Config, digits: Digits, seed: jax.Array) -> dict[str, Any]:
    """A whole run; a seed sees the same examples in the same order at every batch."""
    init, order, dropout = jax.random.split(jax.random.key(seed), 3)
    model = Perceptron()
    state = optim.TrainState.create(
        apply_fn=model.apply,
        params=model.init(init, digits.images[:1])["params"],
        tx=make_optimizer(config),
    )
    indices = shuffled(order, len(digits.images), config.epochs)
    shape = config.periods, config.period // config.batch, config.batch
    batches = indices[: config.steps * config.batch].reshape(shape)
    return jax.lax.scan(partial(train_period, digits, dropout), state, batches)[1]


def train_all(configs: list[Config], seeds: list[int]) -> list[Run]:
    """Every configuration with every seed."""
    digits, runs = read_digits(), []
    with progress(len(configs) * len(seeds), unit="run") as bar:
        for config in configs:
            bar.set_postfix_str(f"{config.optimizer}, batch {config.batch}")
            for seed in seeds:
                log = jax.tree.map(np.asarray, train(config, digits, jnp.uint32(seed)))
                runs.append(
                    Run(
                        optimizer=config.optimizer,
                        batch=config.batch,
                        seed=seed,
                        steps=config.steps,
                        warmup_steps=config.warmup_steps,
                        learning_rate=config.schedule.base_lr,
                        loss=log["loss"].tolist(),
                        accuracy=log["accuracy"].tolist(),
                        ratios={k: v.tolist() for k, v in log["ratios"].items()},
                    )
                )
                bar.update()
    return runs


# ----------------------------------------------------------------------- command line


def seed(text: str) -> int:
    """An integer that random generators take."""
    if not 0 <= (value := int(text)) < 2**32:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 2**32 - 1")
    return value


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line's options, with errors for what cannot be."""
    parser = new_parser(__doc__)
    add, out = parser.add_argument, Path("out/large_batch")
    add("--epochs", type=count, default=80)
    add("--batches", type=count, nargs="+", default=[64, 256, 1024])
    add("--seeds", type=seed, nargs="+", default=[0, 1, 2, 3, 4])
    add("--out", type=Path, default=out, help=f"of pictures and numbers: {out}")
    options = parser.parse_args(argv)
    largest = max(options.batches)
    if any(largest % batch for batch in options.batches):
        parser.error(f"--batches: each must divide the largest, {largest}")
    if options.epochs * TRAINED_ON < 2 * largest:
        parser.error(f"--epochs: two batches of {largest} take more examples")
    for name in ("batches", "seeds"):
        setattr(options, name, sorted(set(getattr(options, name))))
    return options


def main(argv: list[str]) -> int:
    """Train, print and draw as the command line says; returns the exit code."""
    options = parse(argv)
    period = max(options.batches)
    configs = [
        Config(optimizer, batch, options.epochs, period)
        for batch in options.batches
        for optimizer in RECIPES
    ]
    runs = train_all(configs, options.seeds)
    results = Results(runs, epochs_per_point=period / TRAINED_ON)
    print_accuracies(results)
    print_ratios(results, "LAMB 8-bit", "LAMB 32-bit")

    options.out.mkdir(parents=True, exist_ok=True)
    results.save(options.out / "results.json")
    draw_curves(results, options.out / "accuracy.png")
    draw_ratios(results, "LAMB 8-bit", "LAMB 32-bit", options.out / "ratios.png")
    print(f"numbers and pictures are in {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
