"""Train a small language model with 8-bit optimizer state, on any machine.

    python examples/train_lm.py
    python examples/train_lm.py --compare --seeds 0 1 2
    python examples/train_lm.py --weights stochastic remainder8 --seeds 0 1 2

A decoder-only transformer learns to predict the next byte of Python's standard library:
text that every machine with Python has. Some of its files are held out.
"""

import argparse
import inspect
import math
import shlex
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from functools import cache, partial
from pathlib import Path
from threading import Event
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from _compare import History, draw, print_table
from _text import Text, batch_of, read_text
from _transformer import Transformer
from _weights import draw_weights, print_weights
from flax import linen as nn
from tqdm import tqdm

from octavo import optim
from octavo.optim import checkpoint
from octavo.pallas_kernels import WEIGHTS

FLOAT32 = "float32"  # in the place of weights of 16 bits

# --------------------------------------------------------------------------- training


@dataclass(frozen=True)
class Config:
    """What determines a run. Two runs with the same one end with the same bits."""

    optimizer: str
    state: str
    weights: str
    steps: int
    batch_size: int
    seed: int
    learning_rate: float
    width: int
    layers: int
    heads: int
    length: int


@dataclass
class Run:
    """A run so far."""

    config: Config
    state: optim.TrainState
    history: History

    @property
    def step(self) -> int:
        """How many steps it took."""
        return len(self.history.train)


def optimizers() -> dict[str, Any]:
    """Octavo's optimizers by name; the likes of adam8bit would overrule --state."""
    functions = {name: f for name, f in vars(optim).items() if inspect.isfunction(f)}
    return {
        name: f
        for name, f in functions.items()
        if next(iter(inspect.signature(f).parameters), None) == "learning_rate"
    }


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
    make = optimizers()[config.optimizer]
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
    history = History(
        state=config.state,
        seed=config.seed,
        weights=config.weights,
        weight_bytes=sum(x.nbytes for x in jax.tree.leaves(params)),
        state_bytes=sum(x.nbytes for x in jax.tree.leaves(state.opt_state)),
        parameters=sum(x.size for x in jax.tree.leaves(params)),
    )
    return Run(config, state, history)


def loss_of(params: Any, apply: Callable[..., jax.Array], rows: jax.Array) -> jax.Array:
    """Mean cross entropy of each byte given those before it, in nats.

    Computed in float32, whatever weights are stored in: so nothing else differs.
    """
    params = jax.tree.map(lambda p: p.astype(jnp.float32), params)
    logits = apply({"params": params}, rows[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, rows[:, 1:]).mean()


@partial(jax.jit, donate_argnums=0)
def train_step(
    state: optim.TrainState, rows: jax.Array
) -> tuple[optim.TrainState, jax.Array]:
    """One step; the new state takes the place of the old one in memory."""
    loss, grads = jax.value_and_grad(loss_of)(state.params, state.apply_fn, rows)
    return state.apply_gradients(grads=grads), loss


@jax.jit
def evaluate_batch(state: optim.TrainState, rows: jax.Array) -> jax.Array:
    """Loss of one batch of windows."""
    return loss_of(state.params, state.apply_fn, rows)


def evaluate(state: optim.TrainState, rows: np.ndarray) -> float:
    """Mean loss of windows."""
    batches = np.split(rows, len(rows) // 32)
    return float(np.mean([evaluate_batch(state, batch) for batch in batches]))


def save(checkpoints: ocp.CheckpointManager, run: Run) -> None:
    """Write a checkpoint, unless this step has one."""
    if checkpoints.latest_step() != run.step:
        log = {"config": asdict(run.config), "history": asdict(run.history)}
        log = ocp.args.JsonSave(log)
        checkpoint.save(checkpoints, run.step, run.state, log=log)


def restore(checkpoints: ocp.CheckpointManager, fresh: Run) -> Run:
    """The run of the latest checkpoint, or the fresh one if there is none."""
    step = checkpoints.latest_step()
    if step is None:
        return fresh
    args = ocp.args.Composite(log=ocp.args.JsonRestore())
    log = checkpoints.restore(step, args=args)["log"]
    if log["config"] != asdict(fresh.config):
        sys.exit(f"{checkpoints.directory} has another run's options: {log['config']}")
    state = checkpoint.restore(checkpoints, fresh.state.tx, fresh.state, step=step)
    return Run(fresh.config, state, History(**log["history"]))


def train(
    config: Config, text: Text, options: argparse.Namespace, out: Path, stop: Event
) -> Run:
    """Train to the end or until `stop` is set, with a checkpoint in either case."""
    # The files are written while training goes on. The next step overwrites the
    # state's memory, but saving has copied it before it returns.
    kept = ocp.CheckpointManagerOptions(max_to_keep=2)
    with ocp.CheckpointManager(out.absolute(), options=kept) as checkpoints:
        run = start(config)
        if options.resume:
            run = restore(checkpoints, run)
        else:
            for step in checkpoints.all_steps():
                checkpoints.delete(step)
        with tqdm(total=config.steps, initial=run.step, desc=config.state) as bar:
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


# ----------------------------------------------------------------------- command line


def count(text: str) -> int:
    """A positive integer."""
    if (value := int(text)) <= 0:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return value


def seed(text: str) -> int:
    """An integer that random generators take."""
    if (value := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return value


def rate(text: str) -> float:
    """A learning rate."""
    if not 0 < (value := float(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not positive and finite")
    return value


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line's options, with errors for what cannot be."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, names = parser.add_argument, sorted(optimizers())
    add("--optimizer", choices=names, default="adamw", help="one of octavo.optim's")
    add("--state", default="8bit", help="8bit (default), dynamic8, bf16 or 32bit")
    stored = "float32 (default), or bfloat16 stored so; several: compare with float32"
    names = [FLOAT32, *WEIGHTS]
    add("--weights", nargs="+", choices=names, default=[FLOAT32], help=stored)
    add("--learning-rate", type=rate, default=2e-3, help="its highest, after warmup")
    add("--steps", type=count, default=1400)
    add("--batch-size", type=count, default=8)
    add("--length", type=count, default=128, help="of each text in a batch, in bytes")
    add("--width", type=count, default=128, help="of the model: a multiple of 2 heads")
    add("--layers", type=count, default=3)
    add("--heads", type=count, default=4)
    add("--seed", type=seed, default=0, help="of the parameters and of the batches")
    add("--eval-every", type=count, default=200, metavar="STEPS")
    add("--checkpoint-every", type=count, default=400, metavar="STEPS")
    add("--out", type=Path, default=Path("out/train_lm"), help="replaced, or resumed")
    add("--resume", action="store_true", help="go on from the last checkpoint in --out")
    add("--compare", action="store_true", help="train with 32bit, too, and draw both")
    add("--seeds", type=seed, nargs="+", help="of the runs to compare; default: --seed")
    options = parser.parse_args(argv)
    if options.width % (2 * options.heads):
        parser.error("--width must be a multiple of 2 * heads")
    if options.resume and not options.out.exists():
        parser.error(f"--resume: there is no {options.out}")
    if options.compare and options.state == "32bit":
        parser.error("--compare compares --state with 32bit: give it another one")
    options.several = len(options.weights) > 1
    if options.compare and options.weights != [FLOAT32]:
        parser.error("--compare compares states; --weights A B compares weights")
    if options.seeds and not (options.compare or options.several):
        parser.error("--seeds is for comparisons; one run has one --seed")
    try:
        make_model_and_optimizer(config_of(options))
    except ValueError as error:
        parser.error(str(error))
    return options


def config_of(options: argparse.Namespace, **changes: Any) -> Config:
    """The options that determine a run."""
    chosen = {**vars(options), "weights": options.weights[0], **changes}
    return Config(**{field.name: chosen[field.name] for field in fields(Config)})


def runs_of(options: argparse.Namespace) -> dict[Path, Config]:
    """Where each run keeps its checkpoints, and its configuration."""
    seeds = options.seeds or [options.seed]
    if options.several:
        names = dict.fromkeys([FLOAT32, *options.weights])
        return {
            options.out / f"{name}-seed{seed}": config_of(
                options, weights=name, seed=seed
            )
            for seed in seeds
            for name in names
        }
    if not options.compare:
        return {options.out: config_of(options)}
    return {
        options.out / f"{state}-seed{seed}": config_of(options, state=state, seed=seed)
        for seed in seeds
        for state in ("32bit", options.state)
    }


def report(history: History, text: Text) -> None:
    """What a run came to."""
    losses = {"held-out loss": history.final, "unigram entropy": text.unigram_entropy}
    for name, nats in losses.items():
        print(f"{name:>16}: {nats:.4f} nats, {nats / math.log(2):.4f} bits per byte")
    size = history.state_bytes
    print(
        f" optimizer state: {size / 1e6:.2f} MB for {history.parameters / 1e6:.2f}M "
        f"parameters, {size / history.parameters:.2f} bytes each"
    )


def main(argv: list[str]) -> int:
    """Train as the command line says; returns the exit code."""
    options = parse(argv)
    text = read_text(options.length)
    stop = Event()

    def interrupt(*_: Any) -> None:
        stop.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second one ends it

    signal.signal(signal.SIGINT, interrupt)
    histories = []
    for out, config in runs_of(options).items():
        run = train(config, text, options, out, stop)
        if run.step < config.steps:
            again = [*argv, *([] if options.resume else ["--resume"])]
            command = shlex.join([sys.executable, sys.argv[0], *again])
            print(f"\nstopped at step {run.step}, saved in {out}; to go on:\n{command}")
            return 130
        kind = f"{config.weights} weights, {config.state} state, seed {config.seed}"
        print(f"{kind}: done, saved in {out}")
        report(run.history, text)
        histories.append(run.history)
    if options.compare:
        reference, other = histories[::2], histories[1::2]
        print_table(reference, other)
        draw(reference, other, text.unigram_entropy, options.out / "compare.png")
        print(f"drawn in {options.out / 'compare.png'}")
    if options.several:
        print_weights(histories)
        draw_weights(histories, options.out / "weights.png")
        print(f"drawn in {options.out / 'weights.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
