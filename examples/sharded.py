"""Train on a mesh: FSDP and tensor parallelism, LAMB with 8-bit state that is sharded
like the parameters.

    python examples/sharded.py

On all devices of the machine; where there is no accelerator, 8 devices are made of the
CPU. The model of `train_lm.py` learns to predict the next byte of Python's standard
library.
"""

import argparse
import math
import sys
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _arguments import new_parser
from _progress import progress
from _text import Text, batch_of, read_text
from _transformer import Transformer, loss_of
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console
from rich.table import Table

from octavo import optim

# -------------------------------------------------------------------------- shardings


def mesh_shape(count: int) -> tuple[int, int]:
    """Parts along `fsdp` and `tensor` for so many devices: a power of two of them.

    >>> mesh_shape(8), mesh_shape(1)
    ((4, 2), (1, 1))
    """
    used = 2 ** (count.bit_length() - 1)
    tensor = 2 if used >= 4 else 1
    return used // tensor, tensor


def make_mesh() -> Mesh:
    """All devices. Its axes are left to XLA, as Flax's layers expect."""
    shape = mesh_shape(jax.device_count())
    devices = jax.devices()[: math.prod(shape)]
    axes = ("fsdp", "tensor")
    return jax.make_mesh(shape, axes, (AxisType.Auto,) * 2, devices=devices)


OUT_OF_TENSOR = ("attention_out", "mlp_out")


def spec_of(path: Any, param: Any) -> P:
    """Matrices are sharded along both axes of the mesh, vectors along `fsdp`.

    Into a block's heads or hidden units by columns, out of them by rows: so that
    between the two nothing has to be sent.
    """
    if param.ndim < 2:
        return P("fsdp")
    module = jax.tree_util.keystr(path, simple=True, separator="/").split("/")[-2]
    return P("tensor", "fsdp") if module in OUT_OF_TENSOR else P("fsdp", "tensor")


# --------------------------------------------------------------------------- training


class Training(NamedTuple):
    """A run's fixed parts."""

    mesh: Mesh
    model: Transformer
    tx: optim.Transformation
    shapes: Any
    shardings: Any

    @property
    def state_shardings(self) -> Any:
        """How the optimizer's state is sharded."""
        return optim.state_sharding(self.tx, self.shapes, self.shardings)


def prepare(options: argparse.Namespace, mesh: Mesh) -> Training:
    """Everything that follows from shapes alone."""
    model = Transformer(options.width, options.layers, options.heads)
    tokens = jax.ShapeDtypeStruct((1, options.length), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    shardings = jax.tree.map_with_path(
        lambda path, p: NamedSharding(mesh, spec_of(path, p)), shapes
    )
    steps = options.steps
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, options.learning_rate, max(steps // 10, 1), max(steps, 2)
    )
    tx = optim.lamb(schedule, weight_decay=0.01, sharding=shardings)
    return Training(mesh, model, tx, shapes, shardings)


def start(training: Training, length: int) -> tuple[Any, Any]:
    """Parameters and state, each made on the devices where it stays."""

    def init(key: jax.Array) -> Any:
        return training.model.init(key, jnp.zeros((1, length), jnp.int32))["params"]

    params = jax.jit(init, out_shardings=training.shardings)(jax.random.key(0))
    place = jax.jit(training.tx.init, out_shardings=training.state_shardings)
    return params, place(params)


def train(
    options: argparse.Namespace, training: Training, params: Any, state: Any, text: Text
) -> list[float]:
    """The losses of all steps."""
    apply, tx = training.model.apply, training.tx

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, rows: jax.Array) -> tuple[Any, Any, jax.Array]:
        loss, grads = jax.value_and_grad(loss_of)(params, apply, rows)
        return *tx.step(grads, state, params), loss

    split = NamedSharding(training.mesh, P("fsdp"))
    losses: list[float] = []
    with progress(options.steps) as bar:
        for k in range(options.steps):
            rows = batch_of(text, 0, k, options.batch_size, options.length)
            params, state, loss = step(params, state, jax.device_put(rows, split))
            losses.append(float(loss))
            bar.set_postfix_str(f"loss {losses[-1]:.3f}", refresh=False)
            bar.update()
    return losses


# --------------------------------------------------------------------------- pictures


def show_shardings(params: Any, state: Any) -> None:
    """Which device holds which part of one matrix and of its first moment."""
    for name, tree in (
        ("parameter", params),
        ("codes", state.mu),
        ("scales", state.mu_scale),
    ):
        x = tree["block_0"]["mlp_out"]["kernel"]
        print(f"block_0/mlp_out/kernel, {name}: {x.dtype} {x.shape}")
        narrow = min(1.0, 2.4 * x.shape[0] / x.shape[1])  # or the names do not fit
        jax.debug.visualize_array_sharding(x, scale=narrow)


def show_bytes(training: Training, params: Any, state: Any) -> None:
    """What one device holds, and what it would hold with 32-bit state."""
    full = optim.lamb32bit(1e-3)
    wide = jax.eval_shape(full.init, training.shapes)
    spread = optim.state_sharding(full, training.shapes, training.shardings)
    count = training.mesh.size
    table = Table("", "in all", f"on each of {count} devices", title="bytes")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, tree, shardings in (
        ("parameters", params, training.shardings),
        ("state, 8-bit", state, training.state_shardings),
        ("state, 32-bit", wide, spread),
    ):
        whole, part = bytes_of(tree, shardings)
        table.add_row(name, f"{whole:,}", f"{part:,}")
    Console().print(table)


def bytes_of(tree: Any, shardings: Any) -> tuple[int, int]:
    """Of all arrays, and of one device's parts of them."""
    whole = part = 0
    leaves = zip(jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True)
    for x, sharding in leaves:
        whole += x.size * x.dtype.itemsize
        part += math.prod(sharding.shard_shape(x.shape)) * x.dtype.itemsize
    return whole, part


# ----------------------------------------------------------------------- command line


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line's options."""
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--steps", type=int, default=100)
    add("--learning-rate", type=float, default=0.02, help="its highest, after warmup")
    add("--batch-size", type=int, default=32, help="a multiple of the mesh's fsdp")
    add("--length", type=int, default=64, help="of each text in a batch, in bytes")
    add("--width", type=int, default=128, help="of the model")
    add("--layers", type=int, default=2)
    add("--heads", type=int, default=4)
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    """Train as the command line says; returns the exit code."""
    options = parse(argv)
    jax.config.update("jax_num_cpu_devices", 8)  # does nothing to other devices
    training = prepare(options, make_mesh())
    shape = training.mesh.shape
    if options.batch_size % shape["fsdp"]:
        sys.exit(f"--batch-size must be a multiple of {shape['fsdp']}")
    kind = training.mesh.devices.flat[0].device_kind
    print(f"a mesh of {shape['fsdp']} fsdp x {shape['tensor']} tensor, {kind}")
    print(optim.explain(training.tx, training.shapes, training.shardings))
    params, state = start(training, options.length)
    show_shardings(params, state)
    show_bytes(training, params, state)
    losses = train(options, training, params, state, read_text(options.length))
    few = max(options.steps // 10, 1)
    first, last = np.mean(losses[:few]), np.mean(losses[-few:])
    print(f"loss of the first {few} steps: {first:.3f}, of the last: {last:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
