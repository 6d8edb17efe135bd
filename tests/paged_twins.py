"""Training with state in host memory beside the same without, by bits.

    XLA_FLAGS=--xla_cpu_max_isa=AVX python tests/paged_twins.py STEPS

On one device, and over eight; and bfloat16 parameters with remainders in host memory
beside float32 ones. Prints a line of JSON for each case: how many values of parameters
and state have other bits, and how far the furthest parameters are apart, in units in
the last place of the largest.

The flag leaves out instructions that add and multiply at once: XLA contracts two
operations to one rounding in the one program and not in the other.
"""

import json
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from octavo import optim

SHAPE = (1024, 128)  # of the one leaf, in chunks of 64 rows at most
PAGE = 100_000


class Case(NamedTuple):
    """What is trained."""

    name: str
    state: str
    in_place: bool
    devices: int
    weights: str = ""  # beside float32 weights


# Each optimizer in both formats or calls, on one device and on several.
CASES = (
    Case("adamw", "8bit", False, 1),
    Case("adamw", "8bit", True, 8, "remainder16"),
    Case("adamw", "32bit", True, 1, "remainder16"),
    Case("lion", "32bit", False, 8),
    Case("lamb", "8bit", True, 8),
    Case("lamb", "32bit", False, 1),
    Case("lars", "8bit", True, 8),
)


def values(seed: int, where: Any, dtype: Any) -> jax.Array:
    """A leaf of them."""
    made = np.random.default_rng(seed).normal(size=SHAPE).astype("float32")
    return jax.device_put(jnp.asarray(made, dtype), where)


def trained(case: Case, steps: int, paged: bool, dtype: Any) -> tuple[Any, Any]:
    """The parameters and the state after so many steps."""
    where: Any = jax.devices()[0]
    if case.devices > 1:
        mesh = jax.make_mesh((case.devices,), ("d",), axis_types=(AxisType.Auto,))
        where = NamedSharding(mesh, P("d"))
    # What both of two runs start from, and step by, whatever type they keep it in.
    grain = jnp.bfloat16 if case.weights else jnp.float32
    params = values(0, where, grain).astype(dtype)
    options: dict[str, Any] = {"state": case.state}
    if dtype == jnp.bfloat16:
        options["weights"] = case.weights
    if paged:
        options |= {"paged": True, "page_bytes": PAGE}
    tx = getattr(optim, case.name)(1e-3, **options).bind(params)
    state = tx.init(params)
    step = jax.jit(
        (lambda g, s, p: tx.step(g, s, p))
        if case.in_place
        else (lambda g, s, p: tx.update(g, s, p))
    )
    for k in range(steps):
        grads = values(1 + k, where, grain).astype(dtype)
        new, state = jax.block_until_ready(step(grads, state, params))
        # Not in the same program, where it would be contracted with the update.
        params = new if case.in_place else optax.apply_updates(params, new)
    kinds = {x.sharding.memory_kind for x in state.trees.values()}
    assert kinds == {"pinned_host" if paged else "device"}, kinds
    return params, state


def unequal(a: Any, b: Any) -> int:
    """How many values have other bits."""
    # In host memory rows are in groups.
    return int(np.sum(np.asarray(a) != np.asarray(b).reshape(np.shape(a))))


def ulps(a: Any, b: Any) -> float:
    """The largest difference."""
    a, b = np.asarray(a), np.asarray(b)
    return float(np.abs(a - b).max() / np.spacing(np.abs(a).max()))


def compared(case: Case, steps: int) -> dict[str, float]:
    """One case."""
    whole, state = trained(case, steps, False, jnp.float32)
    dtype = jnp.bfloat16 if case.weights else jnp.float32
    params, paged = trained(case, steps, True, dtype)
    if case.weights:
        params = optim.masters(paged, params)
    pairs = [(x, paged.trees[name]) for name, x in state.trees.items()]
    return {
        "parameters": unequal(whole, params),
        "ulps": ulps(whole, params),
        "moments": sum(unequal(*pair) for pair in pairs),
    }


def main(steps: int) -> None:
    """Print a line of JSON for each case."""
    jax.config.update("jax_num_cpu_devices", 8)
    for case in CASES:
        print(json.dumps(case._asdict() | compared(case, steps)), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
