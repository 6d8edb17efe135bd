"""Train with Keras: on a mesh, with a schedule, saved and loaded.

    python examples/trainers/keras_fit.py

A perceptron learns scikit-learn's digits on 8 devices: each batch in 4 parts along
`data`, kernels in 2 along `model`. Where there is no accelerator, the devices are made
of the CPU.
"""

import os
import tempfile

os.environ["KERAS_BACKEND"] = "jax"  # before keras is imported

import jax
import keras
from keras import distribution, layers
from sklearn.datasets import load_digits

from octavo import schedules
from octavo.optim.integrations.keras import Optimizer

SIZE, BATCH, EPOCHS = 1792, 64, 5  # a batch has to divide into 4


def use_mesh() -> None:
    """Before the model and the optimizer are made. The optimizer needs no more."""
    axes = ("data", "model")
    mesh = distribution.DeviceMesh((4, 2), axes, distribution.list_devices()[:8])
    layout = distribution.LayoutMap(mesh)
    layout[".*kernel"] = (None, "model")
    parallel = distribution.ModelParallel(layout_map=layout, batch_dim_name="data")
    distribution.set_distribution(parallel)


def make_model(optimizer: keras.optimizers.Optimizer) -> keras.Model:
    """Compiled, and the same each time."""
    keras.utils.set_random_seed(0)
    hidden = [layers.Dense(width, "relu") for width in (256, 128)]
    model = keras.Sequential([keras.Input((64,)), *hidden, layers.Dense(10)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, metrics=["accuracy"])
    return model


def make_optimizer() -> Optimizer:
    """AdamW with 8-bit state. Its schedule is saved with the model, too."""
    schedule = schedules.PolynomialLR(2e-3, total_steps=2 * EPOCHS * SIZE // BATCH)
    return Optimizer("adamw", learning_rate=schedule, weight_decay=0.01)


def fit(model: keras.Model) -> list[float]:
    """The losses of some epochs."""
    images, labels = load_digits(return_X_y=True)
    images, labels = images[:SIZE] / 16, labels[:SIZE]
    done = model.fit(images, labels, batch_size=BATCH, epochs=EPOCHS, verbose=2)
    return done.history["loss"]


def main() -> None:
    """Train, save, load, go on."""
    jax.config.update("jax_num_cpu_devices", 8)  # does nothing to other devices
    use_mesh()
    model = make_model(make_optimizer())
    fit(model)
    print(model.optimizer.explain(platform="tpu"))
    with tempfile.TemporaryDirectory() as folder:
        model.save(f"{folder}/digits.keras")
        fit(keras.saving.load_model(f"{folder}/digits.keras"))


if __name__ == "__main__":
    main()
