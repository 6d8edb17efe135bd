"""Flax linen on a mesh, without a trainer: FSDP, 8-bit state, the fused step.

python examples/trainers/linen_mesh.py
"""

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from sklearn.datasets import load_digits

from octavo import optim

jax.config.update("jax_num_cpu_devices", 8)  # where there is no accelerator
mesh = jax.make_mesh((len(jax.devices()),), ("fsdp",), (AxisType.Auto,))
images, labels = load_digits(return_X_y=True)
images, labels = jnp.asarray(images[:1792] / 16), jnp.asarray(labels[:1792])


class Model(nn.Module):
    """Two layers, sharded by rows."""

    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.with_partitioning(nn.initializers.lecun_normal(), ("fsdp", None))
        x = nn.relu(nn.Dense(self.width, kernel_init=init)(x))
        return nn.Dense(10, kernel_init=init)(x)


@jax.jit
def train_step(
    state: optim.TrainState, x: jax.Array, y: jax.Array
) -> tuple[optim.TrainState, jax.Array]:
    def loss_of(params: dict) -> jax.Array:
        logits = state.apply_fn({"params": params}, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    loss, grads = jax.value_and_grad(loss_of)(state.params)
    return state.apply_gradients(grads=grads), loss


def main(
    tx: optim.Transformation, steps: int = 40
) -> tuple[optim.TrainState, list[float]]:
    """Train; returns the state and the losses."""
    model = Model(1024)

    def init() -> dict:
        return model.init(jax.random.key(0), images[:1])["params"]

    shardings = nn.get_sharding(jax.eval_shape(init), mesh)
    params = jax.jit(lambda: nn.unbox(init()), out_shardings=shardings)()
    # Parameters are where they belong: now the optimizer may know.
    state = optim.TrainState.create(
        apply_fn=model.apply, params=params, tx=tx.bind(params)
    )
    x, y = jax.device_put((images, labels), jax.NamedSharding(mesh, P("fsdp")))
    losses = []
    for _ in range(steps):
        state, loss = train_step(state, x, y)
        losses.append(float(loss))
    return state, losses


if __name__ == "__main__":
    _, losses = main(optim.adamw(1e-2))
    print(f"loss: {losses[0]:.4f} at first, {losses[-1]:.4f} after {len(losses)} steps")
