"""How long a step takes, and what share of the memory's bandwidth it gets.

An optimizer by Octavo (fused `step`, and `update` + `optax.apply_updates`) and by
optax, jitted with parameters and state donated, on one large leaf and on a
transformer's tree.
They take turns, round by round, with a plain copy that moves as many bytes as the
first of them: its bandwidth is the ceiling. The bytes of a fused step are those of its
kernels' operands and results, whatever runs here.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from _optimizers import OPTIMIZERS
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


@dataclass
class Contender:
    """Something to time: `carry = step(fixed, carry)`, and what it has to move."""

    name: str
    step: Callable[[Any, Any], Any]
    fixed: Any
    carry: Any
    traffic: int
    state_bytes: int = 0
    times: list[float] = field(default_factory=list)

    def run(self, repeats: int) -> float:
        """Seconds for each of some steps in a row."""
        start = time.perf_counter()
        for _ in range(repeats):
            self.carry = self.step(self.fixed, self.carry)
        jax.block_until_ready(self.carry)
        return (time.perf_counter() - start) / repeats


def nbytes(tree: Any) -> int:
    """Bytes of all arrays of a tree."""
    return sum(x.nbytes for x in jax.tree.leaves(tree))


def kernel_bytes(tx: optim.Transformation, grads: Any, params: Any) -> int:
    """Bytes that the kernels of a step read and write: their operands and results."""
    state = jax.eval_shape(tx.init, params)
    jaxpr = jax.make_jaxpr(tx.step)(grads, state, params).jaxpr
    return sum(_pallas_bytes(jaxpr))


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


def contender(
    name: str,
    how: Callable,
    tx: Any,
    grads: Any,
    params: Any,
    traffic: int | None = None,
) -> Contender:
    """A contender with its own copy of the parameters, which its steps overwrite.

    Without `traffic` it is one read of everything, and one write of all but gradients.
    """
    params = jax.tree.map(jnp.copy, params)
    state = jax.jit(tx.init)(params)
    step = jax.jit(partial(how, tx), donate_argnums=1)
    if traffic is None:
        traffic = nbytes(grads) + 2 * nbytes(params) + 2 * nbytes(state)
    return Contender(name, step, grads, (params, state), traffic, nbytes(state))


def copy_contender(traffic: int) -> Contender:
    """x + 1 into another array, as large as makes reads and writes add to `traffic`.

    The array written to is donated: a fresh one each time would time the allocator.
    """
    x = jnp.zeros(traffic // 8, jnp.float32)
    step = jax.jit(lambda x, out: x + 1.0, donate_argnums=1, keep_unused=True)
    return Contender("copy", step, x, jnp.copy(x), 2 * x.nbytes)


def contenders(args: argparse.Namespace, tree: Any) -> list[Contender]:
    """Everything that is timed on parameters of these shapes, the copy last."""

    def random(seed: int) -> Any:
        draw = partial(jax.random.normal, jax.random.key(seed), dtype=args.dtype)
        return jax.tree.map(draw, tree, is_leaf=lambda x: isinstance(x, tuple))

    params, grads = random(0), random(1)
    make = partial(contender, grads=grads, params=params)
    ours, theirs = OPTIMIZERS[args.optimizer]
    found = []
    for state in args.state:
        # The kernels' operands are the same on every device; this one takes all leaves.
        counted = ours(1e-4, state=state, backend="triton")
        traffic = kernel_bytes(counted, grads, params)
        tx = ours(1e-4, state=state, backend=args.backend)
        found.append(make(f"{state} step", fused_step, tx, traffic=traffic))
        found.append(make(f"{state} update", plain_step, tx, traffic=traffic))
    found.append(make("optax", plain_step, theirs(1e-4)))
    return [*found, copy_contender(found[0].traffic)]


def measure(rivals: list[Contender], repeats: int, seconds: float) -> None:
    """Time the contenders in turn, `repeats` times.

    Each turn takes as many steps in a row as last `seconds`, so that on a fast device
    neither dispatch nor the wait at the end counts.
    """
    inner = []
    for rival in rivals:
        rival.run(2)  # compiles; and again, for what only the first run allocates
        inner.append(min(max(math.ceil(seconds / rival.run(1)), 1), 1000))
    for _ in range(repeats):
        for rival, n in zip(rivals, inner, strict=True):
            rival.times.append(rival.run(n))


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
    p = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    p.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw")
    p.add_argument("--size", type=int, nargs="+", default=size, help="the large leaf")
    p.add_argument("--tree", choices=[*MODELS, "none"], default=tree)
    p.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    p.add_argument("--state", nargs="+", default=["8bit"], help="formats of state")
    p.add_argument("--backend", choices=["xla", "tpu", "triton"])
    p.add_argument("--repeats", type=int, default=10, help="rounds")
    p.add_argument("--seconds", type=float, default=0.1, help="of each turn, at least")
    p.add_argument("--json", type=Path, help="also write the figures here")
    return p.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Time what the command line asks for."""
    device, console = jax.devices()[0], Console()
    console.width = max(console.width, 120)
    args = parse(argv, device)
    packages = ("jax", "jaxlib", "optax", "octavo")
    versions = {name: metadata.version(name) for name in packages}
    listed = ", ".join(f"{name} {version}" for name, version in versions.items())
    console.print(f"{device.device_kind}; {listed}")
    work: dict[str, Any] = {f"leaf of {args.size}": {"leaf": tuple(args.size)}}
    if args.tree != "none":
        work[f"{args.tree} transformer"] = shapes(MODELS[args.tree])
    results = {}
    for title, tree in work.items():
        rivals = contenders(args, tree)
        size = sum(x.size for x in jax.tree.leaves(rivals[0].fixed))
        measure(rivals, args.repeats, args.seconds)
        results[title] = report(rivals, size)
        about = f"{args.optimizer}, {title}: {size:,} {args.dtype} parameters"
        show(about, results[title], console)
    if args.json:
        about = {"device": device.device_kind, "versions": versions}
        args.json.write_text(json.dumps(about | {"work": results}, indent=2))


if __name__ == "__main__":
    main()
