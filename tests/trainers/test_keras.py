"""Keras 3 trains with Octavo as with its own optimizers, on a mesh and off it."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import keras
import keras_fit
import numpy as np
import optax
import pytest

from octavo import optim, schedules
from octavo.optim.integrations.keras import Optimizer

# Keras adds epsilon before Adam's bias correction, Octavo and the paper after it. One so
# small tells them apart nowhere; what is left is the rounding of float32.
SMALL = 1e-10
RATE = 5e-4


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Names of layers start anew: the same in each test."""
    keras.utils.clear_session()
    yield
    keras.distribution.set_distribution(None)
    keras.config.set_dtype_policy("float32")


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


# ------------------------------------------------------------------------------- losses


def test_a_real_fit_has_the_losses_of_keras_adam() -> None:
    models = [keras_fit.make_model(x) for x in (adam(), octavo(), octavo(state="8bit"))]
    own, wide, narrow = (np.array(keras_fit.fit(model)) for model in models)
    assert own[-1] < own[0] / 4
    np.testing.assert_allclose(wide, own, atol=1e-4)
    np.testing.assert_allclose(narrow, own, atol=5e-3)
    sizes = [state_bytes(model) for model in models]
    print(f"losses {own[-1]:.4f} {wide[-1]:.4f} {narrow[-1]:.4f}, bytes {sizes}")
    assert sizes[2] < sizes[0] / 2.5  # biases and the last kernel are not quantized


ALIKE: dict[str, Callable[[], tuple[Any, Any]]] = {
    "accumulation": lambda: (
        adam(gradient_accumulation_steps=2),
        octavo(gradient_accumulation_steps=2),
    ),
    "a schedule of Keras counts batches": lambda: tuple(
        make(
            learning_rate=keras.optimizers.schedules.PolynomialDecay(1e-3, 16),
            gradient_accumulation_steps=2,
        )
        for make in (adam, octavo)
    ),
    "a schedule of Octavo counts updates": lambda: (
        adam(
            learning_rate=keras.optimizers.schedules.PolynomialDecay(1e-3, 16),
            gradient_accumulation_steps=2,
        ),
        octavo(
            learning_rate=lambda count: 1e-3 * (1 - (2 * count + 1) / 16),
            gradient_accumulation_steps=2,
        ),
    ),
    "clipnorm": lambda: (adam(clipnorm=0.01), octavo(clipnorm=0.01)),
    "global_clipnorm": lambda: (
        adam(global_clipnorm=0.01),
        octavo(global_clipnorm=0.01),
    ),
    "clipvalue": lambda: (adam(clipvalue=1e-4), octavo(clipvalue=1e-4)),
    "moving average": lambda: (adam(use_ema=True), octavo(use_ema=True)),
    "loss scale": lambda: (
        keras.optimizers.LossScaleOptimizer(adam()),
        keras.optimizers.LossScaleOptimizer(octavo()),
    ),
    "Keras' words": lambda: (
        adam(beta_1=0.8, beta_2=0.9),
        Optimizer(
            "adam32bit", learning_rate=RATE, beta_1=0.8, beta_2=0.9, epsilon=SMALL
        ),
    ),
    "a transformation": lambda: (adam(), Optimizer(optim.adam32bit(RATE, eps=SMALL))),
    "optax' transformation": lambda: (
        adam(global_clipnorm=0.01),
        Optimizer(
            optax.chain(optax.clip_by_global_norm(0.01), optax.adam(RATE, eps=SMALL))
        ),
    ),
}


@pytest.mark.parametrize("name", ALIKE)
def test_what_keras_has_works(name: str) -> None:
    theirs, ours = (losses(model_with(x)) for x in ALIKE[name]())
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_each_of_these_cases_changes_losses() -> None:
    """Or they would show nothing."""
    plain = losses(model_with(adam()))
    changed = ("accumulation", "clipvalue", "moving average", "Keras' words")
    for name in changed:
        assert np.abs(losses(model_with(ALIKE[name]()[0])) - plain).max() > 1e-3, name


def test_weight_decay_and_variables_without_it() -> None:
    found = []
    for make in (
        lambda: keras.optimizers.AdamW(RATE, weight_decay=1.0, epsilon=SMALL),
        lambda: octavo("adamw", weight_decay=1.0),
    ):
        optimizer = make()
        optimizer.exclude_from_weight_decay(var_names=["bias"])
        model = model_with(optimizer)
        for v in model.trainable_variables:
            v.assign(v + 0.1)
        losses(model)
        found.append([v.numpy() for v in model.trainable_variables])
        with pytest.raises(ValueError, match="before"):
            optimizer.exclude_from_weight_decay(var_names=["kernel"])
            assert isinstance(optimizer, keras.optimizers.AdamW)
            raise ValueError("before")  # Keras' own does not notice
    for ours, theirs in zip(found[1], found[0], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize("options", [{"jit_compile": False}, {"run_eagerly": True}])
def test_without_jit_it_is_the_same(options: dict[str, bool]) -> None:
    compiled = losses(model_with(octavo(state="8bit")), epochs=1)
    other = losses(model_with(octavo(state="8bit"), **options), epochs=1)
    np.testing.assert_allclose(other, compiled, atol=1e-4)


def test_callbacks_set_the_learning_rate() -> None:
    rates = keras.callbacks.LearningRateScheduler(lambda epoch: 1e-2 / (epoch + 1))
    theirs, ours = (
        losses(model_with(x), callbacks=[rates])
        for x in (adam(), Optimizer(optim.adam32bit(RATE, eps=SMALL)))
    )
    np.testing.assert_allclose(ours, theirs, atol=1e-3)  # the rate is 20 times larger
    assert np.abs(ours - losses(model_with(octavo()))).max() > 1e-2


def test_variables_that_do_not_train_and_layers_that_are_frozen() -> None:
    def made(optimizer: Any) -> keras.Model:
        keras.utils.set_random_seed(0)
        frozen = keras.layers.Dense(64, trainable=False)
        model = keras.Sequential(
            [keras.Input((64,)), frozen, keras.layers.BatchNormalization()]
        )
        model.add(keras.layers.Dense(10))
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(optimizer, loss)
        return model

    ours = made(octavo())
    kernel = ours.layers[0].kernel.numpy()
    np.testing.assert_allclose(losses(ours), losses(made(adam())), atol=1e-4)
    np.testing.assert_array_equal(ours.layers[0].kernel.numpy(), kernel)
    assert len(ours.optimizer.explain().rows) == 4


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16", "bfloat16"])
def test_policies(policy: str) -> None:
    keras.config.set_dtype_policy(policy)
    model = model_with(octavo(state="8bit", learning_rate=2e-3))
    found = losses(model, epochs=4)
    assert found[-1] < found[0] - 0.02
    wrapped = isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    assert wrapped == (policy == "mixed_float16")
