"""Flax nnx on a mesh, without a trainer: FSDP, 8-bit state, the fused step.

python examples/trainers/nnx_mesh.py
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from sklearn.datasets import load_digits

from octavo import optim
from octavo.optim.integrations.nnx import Optimizer

jax.config.update("jax_num_cpu_devices", 8)  # where there is no accelerator
mesh = jax.make_mesh((len(jax.devices()),), ("fsdp",), (AxisType.Auto,))
images, labels = load_digits(return_X_y=True)
images, labels = jnp.asarray(images[:1792] / 16), jnp.asarray(labels[:1792])


class Model(nnx.Module):
    """Two layers, sharded by rows."""

    def __init__(self, width: int, rngs: nnx.Rngs) -> None:
        init = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("fsdp", None))
        self.up = nnx.Linear(64, width, kernel_init=init, rngs=rngs)
        self.down = nnx.Linear(width, 10, kernel_init=init, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(nnx.relu(self.up(x)))


def loss_of(model: Model, x: jax.Array, y: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()


@nnx.jit
def train_step(
    model: Model, optimizer: Optimizer, x: jax.Array, y: jax.Array
) -> jax.Array:
    loss, grads = nnx.value_and_grad(loss_of)(model, x, y)
    optimizer.update(model, grads)
    return loss


def main(
    tx: optax.GradientTransformation, steps: int = 40
) -> tuple[Optimizer, list[float]]:
    """Train; returns the optimizer and the losses."""
    with jax.set_mesh(mesh):
        model = Model(1024, nnx.Rngs(0))
        # It binds tx to how the model is sharded: nothing else to write.
        optimizer = Optimizer(model, tx)
        x, y = jax.device_put((images, labels), jax.NamedSharding(mesh, P("fsdp")))
        losses = [float(train_step(model, optimizer, x, y)) for _ in range(steps)]
    return optimizer, losses


if __name__ == "__main__":
    # Scales of 8 bits are sharded by rows, too: min_shards makes them divide.
    _, losses = main(optim.adamw(1e-2, min_shards=mesh.size))
    print(f"loss: {losses[0]:.4f} at first, {losses[-1]:.4f} after {len(losses)} steps")
