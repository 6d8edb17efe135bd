"""Keras' Adam and Octavo's, and small fits of the recipe's model."""

from typing import Any

import keras
import keras_fit
import numpy as np

from octavo.optim.integrations.keras import Optimizer

# Keras adds epsilon before Adam's bias correction, Octavo and the paper after it. With
# one so small that is all the same; what is left is the rounding of float32.
SMALL = 1e-10
RATE = 5e-4


def model_with(optimizer: Any, **options: Any) -> keras.Model:
    model = keras_fit.make_model(optimizer)
    if options:
        model.compile(optimizer, model.loss, **options)
    return model


def losses(model: keras.Model, epochs: int = 2, **options: Any) -> np.ndarray:
    """Of each epoch of 8 batches."""
    rng = np.random.default_rng(0)
    images = rng.random((256, 64), np.float32)
    labels = (images @ rng.random((64, 10))).argmax(1)
    done = model.fit(
        images,
        labels,
        batch_size=32,
        epochs=epochs,
        verbose=0,
        shuffle=False,
        **options,
    )
    return np.array(done.history["loss"])


def adam(**arguments: Any) -> keras.optimizers.Optimizer:
    return keras.optimizers.Adam(
        **{"learning_rate": RATE, "epsilon": SMALL, **arguments}
    )


def octavo(name: str = "adam", **arguments: Any) -> Optimizer:
    given = {"learning_rate": RATE, "eps": SMALL, "state": "32bit", **arguments}
    return Optimizer(name, **given)


def state_bytes(model: keras.Model) -> int:
    return sum(v.value.nbytes for v in model.optimizer.variables)
