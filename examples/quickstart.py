"""Octavo in a minute: a small network learns to read handwritten digits.

    python examples/quickstart.py

The images are scikit-learn's. Octavo's are `optim.adamw`, which keeps its moments in
8 bits, and `optim.TrainState`, which is Flax's with a fused step.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from sklearn.datasets import load_digits

from octavo import optim

EPOCHS, BATCH, TRAINED_ON = 10, 32, 1440  # of 1,797 images


class Network(nn.Module):
    """Images of 8x8 pixels to the logits of ten digits."""

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x = nn.relu(nn.Dense(256)(images))
        x = nn.relu(nn.Dense(256)(x))
        return nn.Dense(10)(x)


@partial(jax.jit, donate_argnums=0)
def train_step(state: optim.TrainState, images: jax.Array, labels: jax.Array) -> Any:
    """The next state, which overwrites this one in memory, and the loss."""

    def loss_of(params: Any) -> jax.Array:
        logits = state.apply_fn({"params": params}, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    loss, grads = jax.value_and_grad(loss_of)(state.params)
    return state.apply_gradients(grads=grads), loss


images, labels = load_digits(return_X_y=True)
images = jnp.asarray(images / 16, jnp.float32)
model, tx = Network(), optim.adamw(1e-3)
params = model.init(jax.random.key(0), images)["params"]
print(optim.memory_report(tx, params))
state = optim.TrainState.create(apply_fn=model.apply, params=params, tx=tx)
for epoch in range(1, EPOCHS + 1):
    order = np.random.default_rng(epoch).permutation(TRAINED_ON)
    losses = []
    for batch in order.reshape(-1, BATCH):
        state, loss = train_step(state, images[batch], labels[batch])
        losses.append(loss)
    answers = model.apply({"params": state.params}, images[TRAINED_ON:]).argmax(-1)
    right = np.mean(answers == labels[TRAINED_ON:])
    print(f"epoch {epoch}: loss {np.mean(losses):.4f}, test accuracy {right:.1%}")
