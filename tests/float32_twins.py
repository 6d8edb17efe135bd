"""Training of bf16 weights with `"remainder16"` beside that of float32, by bits.

    XLA_FLAGS=--xla_cpu_max_isa=AVX PYTHONPATH=examples \
        python tests/float32_twins.py STEPS RULE...

The model of `examples/train_lm.py`, small, on a mesh of eight devices. Both compute the
gradients of the same bf16 weights: those of float32 are rounded by numpy's rules. After
half of the steps the one with remainders is saved and restored. Prints how many values
have other bits, and how far the furthest are apart, in units in the last place of the
largest value of their leaf.

The flag leaves out instructions that add and multiply at once: XLA contracts two
operations to one rounding in the one program and not in the other. It also chooses the
order of sums: of LAMB and LARS, norms may differ in the last place.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from _text import batch_of, read_text
from _transformer import Transformer
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from train_lm import loss_of

from octavo import optim
from octavo.optim import checkpoint

from cases import RULES


def placed(mesh: jax.sharding.Mesh, params: Any) -> Any:
    """Matrices in both directions, where they divide; vectors everywhere."""

    def of(p: Any) -> NamedSharding:
        both = p.ndim == 2 and p.shape[0] % 16 == 0 and p.shape[1] % 2 == 0
        return NamedSharding(mesh, P("d", "m") if both else P())

    return jax.tree.map(of, params)


def rounded(x: jax.Array) -> jax.Array:
    """To bfloat16: the nearest, and ties away from zero."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + jnp.uint32(0x8000)
    cut = bits & jnp.uint32(0xFFFF0000)
    return jax.lax.bitcast_convert_type(cut, jnp.float32).astype(jnp.bfloat16)


def waited(tree: Any) -> Any:
    """Computed: on few cores, programs that reduce would wait for each other."""
    return jax.block_until_ready(tree)


def restored(folder: Path, run: optim.TrainState) -> optim.TrainState:
    """A run, saved and restored into a fresh one."""
    with ocp.CheckpointManager(folder) as manager:
        checkpoint.save(manager, 1, run)
        manager.wait_until_finished()
        fresh = jax.tree.map(jnp.zeros_like, run.params)
        fresh = jax.device_put(fresh, jax.tree.map(lambda p: p.sharding, run.params))
        target = optim.TrainState.create(apply_fn=None, params=fresh, tx=run.tx)
        return checkpoint.restore(manager, run.tx, target)


class Model:
    """The model, its first weights, and functions that are compiled once."""

    def __init__(self) -> None:
        self.text, self.length = read_text(200_000), 32
        model = Transformer(width=32, layers=1, heads=2)
        tokens = jnp.zeros((1, self.length), jnp.int32)
        params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]
        mesh = jax.make_mesh((4, 2), ("d", "m"), axis_types=(AxisType.Auto,) * 2)
        self.where = placed(mesh, params)
        self.short = jax.device_put(jax.tree.map(rounded, params), self.where)
        self._gradients = jax.jit(
            jax.grad(lambda p, rows: loss_of(p, model.apply, rows))
        )
        self.rounded = jax.jit(
            lambda tree: jax.tree.map(rounded, tree), out_shardings=self.where
        )

    def gradients(self, params: Any, t: int) -> Any:
        """Of step t; on one device: the steps are what is to be sharded."""
        rows = batch_of(self.text, 0, t, 8, self.length)
        found = self._gradients(jax.device_put(params, jax.devices()[0]), rows)
        return jax.device_put(found, self.where)


def different(model: Model, rule: str, steps: int, folder: Path) -> dict[str, float]:
    """How many values of what are not equal after so many steps, and how far apart."""
    case = RULES[rule]
    options = {**case.kwargs, "sharding": model.where, "min_quantized_size": 1024}
    tx = case.ours(1e-3, **options)
    kept = case.ours(1e-3, **options, weights="remainder16")
    first = wide = jax.tree.map(lambda p: p.astype(jnp.float32), model.short)
    state = tx.init(wide)
    run = optim.TrainState.create(apply_fn=None, params=model.short, tx=kept)
    step, own = jax.jit(tx.step), jax.jit(lambda r, g: r.apply_gradients(grads=g))
    for t in range(steps):
        g = waited(model.gradients(waited(model.rounded(wide)), t))
        wide, state = waited(step(g, state, wide))
        run = waited(own(run, waited(model.gradients(run.params, t))))
        if t == steps // 2:
            run = restored(folder / rule, run)
    moments = {name: run.opt_state.trees[name] for name in state.trees}
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).mean()), wide, first)
    assert max(jax.tree.leaves(moved)) > 1e-4
    masters = optim.masters(run.opt_state, run.params)
    return {
        "weights": unequal(wide, masters),
        "ulps": max(jax.tree.leaves(jax.tree.map(ulps, wide, masters))),
        "rounded": unequal(model.rounded(wide), run.params),
        "moments": unequal(state.trees, moments),
    }


def unequal(a: Any, b: Any) -> int:
    """How many values have other bits."""
    counts = jax.tree.map(
        lambda x, y: int(np.sum(np.asarray(x) != np.asarray(y))), a, b
    )
    return sum(jax.tree.leaves(counts))


def ulps(a: Any, b: Any) -> float:
    """The largest difference of two leaves."""
    a, b = np.asarray(a), np.asarray(b)
    return float(np.abs(a - b).max() / np.spacing(np.abs(a).max()))


def main(steps: int, rules: list[str]) -> None:
    """Print a line of JSON for each rule."""
    jax.config.update("jax_num_cpu_devices", 8)
    model = Model()
    with tempfile.TemporaryDirectory() as folder:
        for rule in rules:
            found = different(model, rule, steps, Path(folder))
            print(json.dumps({"rule": rule, "steps": steps} | found), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:] or list(RULES))
