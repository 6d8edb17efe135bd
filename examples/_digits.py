"""The data of `large_batch.py`, scikit-learn's digits, and a model for them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

TRAINED_ON = 1280  # of 1,797; a whole number of batches of 64 and of 256


class Digits(NamedTuple):
    """Images of 8x8 pixels from 0 to 1 and the digits that they show."""

    images: jax.Array
    labels: jax.Array
    test_images: jax.Array
    test_labels: jax.Array


class Perceptron(nn.Module):
    """Logits of the ten digits. All kernels but the last have quantized state.

    Without dropout it soon knows the images by heart: gradients vanish, LAMB's steps
    become noise and decay, and trust ratios approach 1 / weight_decay.
    """

    widths: tuple[int, ...] = (256, 128, 128)
    dropout: float = 0.4

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        x = images.reshape(len(images), -1)
        for width in self.widths:
            x = nn.relu(nn.Dense(width)(x))
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(10)(x)


def read_digits() -> Digits:
    """The digits that scikit-learn ships, the same ones held out each time."""
    images, labels = load_digits(return_X_y=True)
    images, test_images, labels, test_labels = train_test_split(
        images / 16, labels, train_size=TRAINED_ON, stratify=labels, random_state=0
    )
    return Digits(
        jnp.asarray(images, jnp.float32),
        jnp.asarray(labels, jnp.int32),
        jnp.asarray(test_images, jnp.float32),
        jnp.asarray(test_labels, jnp.int32),
    )


def shuffled(key: jax.Array, size: int, epochs: int) -> jax.Array:
    """Indices of `size` examples in a new order for each epoch, one after the other."""
    keys = jax.random.split(key, epochs)
    return jax.vmap(lambda key: jax.random.permutation(key, size))(keys).reshape(-1)
