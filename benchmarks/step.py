"""How long a step takes, and what share of the memory's bandwidth it gets.

An optimizer by Octavo (fused `step`, and `update` + `optax.apply_updates`) and by
optax, jitted with parameters and state donated, on one large leaf and on a tree; with
`--rivals` those of other libraries, too. The phase `adam` is the step alone; `whole`
also clips by the global norm, and skips steps that are not finite.
They take turns, round by round, with a plain copy that moves as many bytes as the
first of them: its bandwidth is the ceiling. The bytes of a fused step are those of its
kernels' operands and results, whatever runs here.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from _optimizers import OPTIMIZERS
from _rivals import RIVALS, Contender, Task, installed, measure, nbytes
from jax.extend.core import jaxprs_in_params
from rich.console import Console
from rich.table import Table

from octavo import optim


class Model(NamedTuple):
    """Sizes of a transformer."""

    layers: int
    width: int
    heads: int
    vocabulary: int
    context: int


MODELS = {
    "tiny": Model(1, 32, 4, 128, 32),
    "small": Model(4, 256, 4, 16384, 512),
    "gpt2": Model(12, 768, 12, 50304, 1024),
    "1b": Model(18, 2048, 16, 50304, 2048),
}


def shapes(model: Model) -> dict[str, Any]:
    """The parameter shapes of a GPT-2 of these sizes."""
    _, d, heads, vocabulary, context = model
    norm = {"scale": (d,), "bias": (d,)}
    into = {"kernel": (d, heads, d // heads), "bias": (heads, d // heads)}
    out_of = {"kernel": (heads, d // heads, d), "bias": (d,)}
    up = {"kernel": (d, 4 * d), "bias": (4 * d,)}
    down = {"kernel": (4 * d, d), "bias": (d,)}
    attention = {"query": into, "key": into, "value": into, "out": out_of}
    mlp = {"up": up, "down": down}
    layer = {"norm1": norm, "attention": attention, "norm2": norm, "mlp": mlp}
    layers = {f"layer{i}": layer for i in range(model.layers)}
    embedding = {"token": (vocabulary, d), "position": (context, d)}
    return {"embedding": embedding, **layers, "norm": norm}


def moe(model: Model, experts: int = 8) -> dict[str, Any]:
    """The same with a router and stacked experts in the place of each MLP."""
    d = model.width
    up, down = (experts, d, 4 * d), (experts, 4 * d, d)
    mlp = {"router": (d, experts), "up": up, "down": down}
    tree = shapes(model)
    for name in [name for name in tree if name.startswith("layer")]:
        tree[name] = {**tree[name], "mlp": mlp}
    return tree


def small(leaves: int) -> dict[str, Any]:
    """Small matrices, each with a vector."""
    layer = {"kernel": (64, 128), "bias": (128,)}
    return {f"layer{i}": layer for i in range(leaves // 2)}


TREES = {
    **{name: shapes(model) for name, model in MODELS.items()},
    "moe-tiny": moe(Model(1, 32, 4, 128, 32)),
    "moe": moe(Model(6, 1024, 16, 50304, 2048)),
    "small12": small(12),
    "small300": small(300),
}


def kernel_bytes(tx: optim.Transformation, grads: Any, params: Any) -> int:
    """Bytes that the kernels of a step read and write: their operands and results.

    And those of Muon's second pass, which XLA runs: it reads directions and parameters,
    and writes these. What is between the passes is not counted.
    """
    state = jax.eval_shape(tx.init, params)
    jaxpr = jax.make_jaxpr(tx.step)(grads, state, params).jaxpr
    second = 0
    if isinstance(state, optim.MuonState):
        paths = set(state.muon.codes("mu").paths)
        leaves, _ = jax.tree_util.tree_flatten_with_path(params)
        named = [
            (jax.tree_util.keystr(path, simple=True, separator="/"), p)
            for path, p in leaves
        ]
        second = 3 * sum(p.nbytes for path, p in named if path in paths)
    return sum(_pallas_bytes(jaxpr)) + second


def _pallas_bytes(jaxpr: Any) -> Iterator[int]:
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "pallas_call":
            yield sum(x.aval.size * x.aval.dtype.itemsize for x in eqn.invars)
            yield sum(x.aval.size * x.aval.dtype.itemsize for x in eqn.outvars)
        else:
            for inner in jaxprs_in_params(eqn.params):
                yield from _pallas_bytes(inner)


def fused_step(tx: Any, grads: Any, carry: Any) -> Any:
    """Parameters and state after `tx.step`."""
    params, state = carry
    return tx.step(grads, state, params)


def plain_step(tx: Any, grads: Any, carry: Any) -> Any:
    """Parameters and state after `tx.update` and `optax.apply_updates`."""
    params, state = carry
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state


def guarded(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """optax's whole phase."""
    patience = 2**30  # Octavo never gives up
    return optax.chain(
        optax.clip_by_global_norm(1.0), optax.apply_if_finite(tx, patience)
    )


def contender(
    name: str, how: Callable, tx: Any, task: Task, traffic: int | None = None
) -> Contender:
    """A contender with its own copy of the parameters, which its steps overwrite."""
    params = jax.tree.map(jnp.copy, task.params)
    state = jax.jit(tx.init)(params)
    step = jax.jit(partial(how, tx), donate_argnums=1)
    size = nbytes(state)
    if traffic is None:
        traffic = task.traffic(size)
    return Contender(name, step, task.grads, (params, state), traffic, size)


def copy_contender(traffic: int) -> Contender:
    """x + 1 into another array, as large as makes reads and writes add to `traffic`.

    The array written to is donated: a fresh one each time would time the allocator.
    """
    x = jax.random.normal(jax.random.key(0), (traffic // 8,))
    step = jax.jit(lambda x, out: x + 1.0, donate_argnums=1, keep_unused=True)
    return Contender("copy", step, x, jnp.copy(x), 2 * x.nbytes)


def contenders(
    args: argparse.Namespace, tree: Any, phase: str
) -> tuple[list[Contender], dict[str, str]]:
    """Everything that is timed on parameters of these shapes, the copy last.

    And why rivals that were asked for are not among it.
    """

    def random(seed: int) -> Any:
        draw = partial(jax.random.normal, jax.random.key(seed), dtype=args.dtype)
        return jax.tree.map(draw, tree, is_leaf=lambda x: isinstance(x, tuple))

    task = Task(random(0), random(1), phase == "whole")
    ours, theirs = OPTIMIZERS[args.optimizer]
    options = {"grad_clip_norm": 1.0, "skip_nonfinite": True} if task.whole else {}
    found = []
    for state in args.state:
        make = partial(ours, 1e-4, state=state, **options)
        # The kernels' operands are the same on every device; this one takes all leaves.
        traffic = kernel_bytes(make(backend="triton"), task.grads, task.params)
        tx = make(backend=args.backend)
        found.append(contender(f"{state} step", fused_step, tx, task, traffic))
        found.append(contender(f"{state} update", plain_step, tx, task, traffic))
    tx = guarded(theirs(1e-4)) if task.whole else theirs(1e-4)
    found.append(contender("optax", plain_step, tx, task))
    others, missing = installed(task, args.rivals)
    return [*found, *others, copy_contender(found[0].traffic)], missing


def report(rivals: list[Contender], size: int) -> dict[str, dict[str, float]]:
    """The figures of each contender; `size` is the number of parameters."""
    median = {r.name: statistics.median(r.times) for r in rivals}
    copied = rivals[-1].traffic / median["copy"]
    rows = {}
    for r in rivals:
        bandwidth = r.traffic / median[r.name]
        rows[r.name] = {
            "median_ms": 1e3 * median[r.name],
            "fastest_ms": 1e3 * min(r.times),
            "bytes_per_parameter": r.traffic / size,
            "bandwidth_gb_s": bandwidth / 1e9,
            "percent_of_copy": 100 * bandwidth / copied,
            "state_bytes_per_parameter": r.state_bytes / size,
            "time_over_optax": median[r.name] / median["optax"],
        }
    return rows


_COLUMNS = {
    "median_ms": ("median ms", ".3f"),
    "fastest_ms": ("fastest ms", ".3f"),
    "bytes_per_parameter": ("HBM bytes / param", ".2f"),
    "bandwidth_gb_s": ("GB/s", ".1f"),
    "percent_of_copy": ("% of copy", ".0f"),
    "state_bytes_per_parameter": ("state bytes / param", ".3f"),
    "time_over_optax": ("time / optax", ".2f"),
}


def show(title: str, rows: dict[str, dict[str, float]], console: Console) -> None:
    """Print a table."""
    table = Table("", title=title, title_justify="left")
    for header, _ in _COLUMNS.values():
        table.add_column(header, justify="right")
    for name, row in rows.items():
        table.add_row(name, *(format(row[k], f) for k, (_, f) in _COLUMNS.items()))
    console.print(table)


def parse(argv: Sequence[str] | None, device: jax.Device) -> argparse.Namespace:
    """The command line; defaults that suit the device."""
    cpu = device.platform == "cpu"
    memory = 0 if cpu else (device.memory_stats() or {}).get("bytes_limit", 0)
    tree = "small" if cpu else "1b" if memory > 64e9 else "gpt2"
    size = [4096, 4096] if cpu else [8192, 8192]
    leaf = "the large leaf; without a number: none"
    p = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    p.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw")
    p.add_argument("--size", type=int, nargs="*", default=size, help=leaf)
    p.add_argument("--tree", choices=[*TREES, "none"], default=tree)
    p.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    p.add_argument("--phase", nargs="+", choices=["adam", "whole"], default=["adam"])
    p.add_argument("--state", nargs="+", default=["8bit"], help="formats of state")
    p.add_argument("--backend", choices=["xla", "tpu", "triton", "mosaic_gpu"])
    others = "other libraries' AdamW; without a name: all"
    p.add_argument("--rivals", nargs="*", choices=RIVALS, help=others)
    p.add_argument("--repeats", type=int, default=10, help="rounds")
    p.add_argument("--seconds", type=float, default=0.1, help="of each turn, at least")
    p.add_argument("--json", type=Path, help="also write the figures here")
    args = p.parse_args(argv)
    if args.rivals is not None and args.optimizer != "adamw":
        p.error("rivals are AdamW")
    args.rivals = [] if args.rivals is None else args.rivals or list(RIVALS)
    return args


def versions(rivals: Iterable[str]) -> dict[str, str]:
    """Of all packages that have a part in it and are installed."""
    names = ["jax", "jaxlib", "optax", "octavo", *(RIVALS[r].package for r in rivals)]
    there = {d.name for d in metadata.distributions()}
    return {name: metadata.version(name) for name in names if name in there}


def work_of(args: argparse.Namespace) -> Iterator[tuple[str, Any, str]]:
    """Title, shapes and phase of everything that is asked for."""
    work: dict[str, Any] = {}
    if args.size:
        work[f"leaf of {args.size}"] = {"leaf": tuple(args.size)}
    if args.tree != "none":
        kind = "transformer" if args.tree in MODELS else "tree"
        work[f"{args.tree} {kind}"] = TREES[args.tree]
    for title, tree in work.items():
        for phase in args.phase:
            yield title if phase == "adam" else f"{title}, whole phase", tree, phase


def main(argv: Sequence[str] | None = None) -> int:
    """Time what the command line asks for; 1 if a step of Octavo failed."""
    device, console = jax.devices()[0], Console()
    console.width = max(console.width, 120)
    args = parse(argv, device)
    about = {"device": device.device_kind, "versions": versions(args.rivals)}
    listed = ", ".join(f"{name} {v}" for name, v in about["versions"].items())
    console.print(f"{device.device_kind}; {listed}")
    results: dict[str, Any] = {}
    missing: dict[str, dict[str, str]] = {}
    for title, tree, phase in work_of(args):
        rivals, absent = contenders(args, tree, phase)
        size = sum(x.size for x in jax.tree.leaves(rivals[0].fixed))
        rivals, failed = measure(rivals, args.repeats, args.seconds)
        results[title], missing[title] = report(rivals, size), absent | failed
        heading = f"{args.optimizer}, {title}: {size:,} {args.dtype} parameters"
        show(heading, results[title], console)
        for name, why in missing[title].items():
            console.print(f"without {name}: {why}", markup=False, soft_wrap=True)
        del rivals  # their memory is for the next
        if args.json:
            figures = about | {"work": results, "missing": missing}
            args.json.write_text(json.dumps(figures, indent=2))
    ours = {f"{state} {how}" for state in args.state for how in ("step", "update")}
    return 1 if any(ours & set(why) for why in missing.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
