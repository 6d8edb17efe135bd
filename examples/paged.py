"""The same steps with the state on the device, and in host memory.

    python examples/paged.py --values 16_000_000

Prints where the state's bytes are, what a compiled step takes on the device, what goes
over the link to the host, and its time. `auto` may take a byte less than all that is
there, so the largest leaf is paged. On a CPU both memories are one, and paging only
costs time.
"""

import argparse
import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from octavo import optim

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--values", type=int, default=8_000_000, help="in three leaves")
parser.add_argument("--steps", type=int, default=5)
parser.add_argument("--page-bytes", type=int, default=2**20)
args = parser.parse_args()
MIB = 2**20
(DEVICE,) = jax.devices()[:1]


def params_of(seed: int) -> dict[str, jax.Array]:
    """A leaf with half of the values and two with a quarter, in rows of 256."""
    made = {}
    for name, parts in (("embed", 2), ("up", 4), ("down", 4)):
        key = jax.random.fold_in(jax.random.key(seed), len(made))
        made[name] = jax.random.normal(key, (args.values // parts // 256, 256))
    return jax.device_put(made, DEVICE)


def on_device(compiled: Any, host: int) -> int:
    """Bytes that a step takes there: arguments, other results, temporary arrays.

    A CPU counts its host memory among them, and has no kernel without such arrays.
    """
    memory = compiled.memory_analysis()
    own = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    own += memory.output_size_in_bytes - memory.alias_size_in_bytes
    return own - (host if DEVICE.platform == "cpu" else 0)


def trained(tx: optim.Transformation) -> Any:
    """The parameters after some steps; prints what those took."""
    params, grads = params_of(0), params_of(1)
    tx = tx.bind(params)
    state, report = tx.init(params), optim.memory_report(tx, params)
    step = jax.jit(lambda p, s, g: tx.step(g, s, p), donate_argnums=(0, 1))
    compiled = step.lower(params, state, grads).compile()
    begin = time.perf_counter()
    for _ in range(args.steps):
        params, state = jax.block_until_ready(compiled(params, state, grads))
    seconds = (time.perf_counter() - begin) / args.steps
    whole, link = on_device(compiled, report.host_bytes), 2 * report.host_bytes
    peak = (DEVICE.memory_stats() or {}).get("peak_bytes_in_use")
    for n in (report.device_bytes, report.host_bytes, whole, peak, link):
        print(f"{'-' if n is None else f'{n / MIB:.1f}':>14}", end="")
    print(f"{seconds * 1e3:>14.1f}")
    return params["embed"]


paged = partial(optim.adamw, 1e-3, page_bytes=args.page_bytes)
shapes = jax.eval_shape(lambda: params_of(0))
values = sum(x.size for x in jax.tree.leaves(shapes))
state_bytes = optim.memory_report(optim.adamw(1e-3), shapes).device_bytes
less = 2 * 4 * values + state_bytes - 1024  # parameters, gradients, and not all of it
titles = ("state: device", "state: host", "step: device", "peak", "link, a step")
print("MiB".ljust(10) + "".join(f"{x:>14}" for x in (*titles, "ms, a step")))
results = []
# What takes least comes first: a device reports the highest peak so far.
for name, tx in {
    "paged": paged(paged=True),
    "auto": paged(paged="auto", device_bytes=less),
    "8 bits": optim.adamw(1e-3),
    "32 bits": optim.adamw(1e-3, state="32bit"),
}.items():
    print(f"{name:<10}", end="", flush=True)
    results.append(trained(tx))
furthest = float(jnp.abs(jnp.stack(results[:2]) - results[2]).max())
print(f"paged and unpaged weights differ by at most {np.float32(furthest):.1e}")
for what, size in (("moments", 8), ("moments and weights", 12)):
    print(
        f"float32 {what} on the host: {2 * size * values / MIB:,.1f} MiB over the link"
    )
