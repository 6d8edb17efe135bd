"""The same steps with the state on the device, and in host memory.

    python examples/paged.py --values 16_000_000

Prints where the bytes are, what a compiled step takes beside them, and its time.
On a CPU both memories are one, and paging only costs time.
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
parser.add_argument("--values", type=int, default=4_000_000, help="of the one leaf")
parser.add_argument("--steps", type=int, default=5)
parser.add_argument("--page-bytes", type=int, default=8 * 2**20)
args = parser.parse_args()


def params_of(seed: int) -> dict[str, jax.Array]:
    """A leaf with rows of 1,024 values."""
    x = jax.random.normal(jax.random.key(seed), (args.values // 1024, 1024))
    return jax.device_put({"kernel": x}, jax.devices()[0])


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
    beside = compiled.memory_analysis().temp_size_in_bytes
    shown = (report.device_bytes, report.host_bytes, beside)
    cells = "".join(f"{n / 2**20:>14.1f}" for n in shown)
    print(f"{cells}{seconds * 1e3:>14.1f}")
    return params["kernel"]


paged = partial(optim.adamw, 1e-3, paged=True, page_bytes=args.page_bytes)
titles = ("device MiB", "host MiB", "beside MiB", "ms per step")
print(f"{'':<12}" + "".join(f"{title:>14}" for title in titles))
results = []
for name, tx in {
    "32 bits": optim.adamw(1e-3, state="32bit"),
    "8 bits": optim.adamw(1e-3),
    "paged": paged(),
}.items():
    print(f"{name:<12}", end="", flush=True)
    results.append(trained(tx))
furthest = float(jnp.abs(results[1] - results[2]).max())
print(f"paged and unpaged weights differ by at most {np.float32(furthest):.1e}")
