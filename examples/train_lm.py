"""Train a small language model with 8-bit optimizer state, on any machine.

    python examples/train_lm.py
    python examples/train_lm.py --compare --seeds 0 1 2
    python examples/train_lm.py --weights stochastic remainder8 --seeds 0 1 2

A decoder-only transformer learns to predict the next byte of Python's standard library:
text that every machine with Python has. Some of its files are held out.
"""

import argparse
import inspect
import sys
import time
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from threading import Event
from typing import Any

import _command_line as cli
import jax
import jax.numpy as jnp
import numpy as np
import optax
from _compare import compare_states, report
from _progress import progress
from _runs import FLOAT32, Config, Run, checkpoints_of, restore, run_of, save
from _text import Text, batch_of, read_text
from _transformer import Transformer, loss_of
from _weights import compare_weights
from flax import linen as nn
from tqdm import tqdm

from octavo import optim

loss_of_batch = jax.jit(loss_of, static_argnums=1)


@cache  # one for all seeds, or else the step would be compiled for each of them
def make_model_and_optimizer(config: Config) -> tuple[nn.Module, Any]:
    """The model and its optimizer: warmup, cosine, and no decay of biases and norms."""
    rate, steps = config.learning_rate, config.steps
    warmup = max(1, steps // 20)
    schedule = optax.warmup_cosine_decay_schedule(
        rate / warmup, rate, warmup, max(steps, warmup + 1), rate / 20
    )
    matrices = partial(jax.tree.map, lambda p: p.ndim > 1)
    wanted = {"b2": 0.99, "weight_decay": 0.1, "mask": matrices, "state": config.state}
    if config.weights != FLOAT32:
        wanted["weights"] = config.weights
    make = cli.optimizers()[config.optimizer]
    known = inspect.signature(make).parameters
    tx = make(schedule, **{k: v for k, v in wanted.items() if k in known})
    return Transformer(config.width, config.layers, config.heads), tx


def start(config: Config) -> Run:
    """A run of no steps."""
    model, tx = make_model_and_optimizer(replace(config, seed=0))
    tokens = jnp.zeros((1, config.length), jnp.int32)
    params = jax.jit(model.init)(jax.random.key(config.seed), tokens)["params"]
    if config.weights != FLOAT32:
        params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    state = optim.TrainState.create(apply_fn=model.apply, params=params, tx=tx)
    return run_of(config, state)


@partial(jax.jit, donate_argnums=0)
def train_step(
    state: optim.TrainState, rows: jax.Array
) -> tuple[optim.TrainState, jax.Array]:
    """One step; the new state takes the place of the old one in memory."""
    loss, grads = jax.value_and_grad(loss_of)(state.params, state.apply_fn, rows)
    return state.apply_gradients(grads=grads), loss


def evaluate(state: optim.TrainState, rows: np.ndarray) -> float:
    """Mean loss of windows."""
    batches = np.split(rows, len(rows) // 32)
    losses = [loss_of_batch(state.params, state.apply_fn, b) for b in batches]
    return float(np.mean(losses))


def train(
    config: Config, text: Text, options: argparse.Namespace, out: Path, stop: Event
) -> Run:
    """Train to the end or until `stop` is set, with a checkpoint in either case."""
    run = start(config)
    with checkpoints_of(out, options.resume) as checkpoints:
        if options.resume:
            run = restore(checkpoints, run)
        with progress(config.steps, initial=run.step, desc=config.state) as bar:
            bar.set_postfix_str("compiling")
            while run.step < config.steps and not stop.is_set():
                advance(run, text, bar)
                if run.step % options.eval_every == 0 or run.step == config.steps:
                    loss = evaluate(run.state, text.held_out)
                    run.history.held_out.append((run.step, loss))
                    bar.write(f"step {run.step}: held-out loss {loss:.4f}")
                if run.step % options.checkpoint_every == 0:
                    save(checkpoints, run)
        save(checkpoints, run)
    return run


def advance(run: Run, text: Text, bar: tqdm) -> None:
    """One step of a run, shown in its progress bar."""
    c = run.config
    begin = time.perf_counter()
    rows = batch_of(text, c.seed, run.step, c.batch_size, c.length)
    run.state, loss = train_step(run.state, rows)
    run.history.train.append(float(loss))  # waits for the step
    seconds = time.perf_counter() - begin
    bar.set_postfix_str(
        f"loss {run.history.train[-1]:.3f}, {c.batch_size * c.length / seconds:,.0f} "
        f"tokens/s, {1e3 * seconds:.0f} ms/step",
        refresh=False,
    )
    bar.update()


def main(argv: list[str]) -> int:
    """Train as the command line says; returns the exit code."""
    options = cli.parse(argv, __doc__, make_model_and_optimizer)
    text = read_text(options.length)
    stop = cli.stopped_by_ctrl_c(Event())
    histories = []
    for out, config in cli.runs_of(options).items():
        run = train(config, text, options, out, stop)
        if run.step < config.steps:
            command = cli.command_to_resume(argv, options.resume)
            print(f"\nstopped at step {run.step}, saved in {out}; to go on:\n{command}")
            return 130
        kind = f"{config.weights} weights, {config.state} state, seed {config.seed}"
        print(f"{kind}: done, saved in {out}")
        report(run.history, text.unigram_entropy)
        histories.append(run.history)
    if options.compare:
        compare_states(histories, text.unigram_entropy, options.out)
    if options.several:
        compare_weights(histories, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
