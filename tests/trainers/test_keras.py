"""Keras 3 trains with Octavo as with its own optimizers, on a mesh and off it."""

from collections.abc import Callable
from typing import Any

import keras
import keras_fit
import numpy as np
import optax
import pytest
from fits import RATE, SMALL, adam, losses, model_with, octavo, state_bytes

from octavo import optim
from octavo.optim.integrations.keras import Optimizer

# numpy deprecates how Keras hands out its variables.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")


# ------------------------------------------------------------------------------- losses


def test_a_real_fit_has_the_losses_of_keras_adam() -> None:
    found, sizes = [], []
    for optimizer in (adam(), octavo(), octavo(state="8bit")):
        model = keras_fit.make_model(optimizer)
        found.append(np.array(keras_fit.fit(model)))
        sizes.append(state_bytes(model))
    own, wide, narrow = found
    print(f"losses {own[-1]:.4f} {wide[-1]:.4f} {narrow[-1]:.4f}, bytes {sizes}")
    assert own[-1] < own[0] / 4
    np.testing.assert_allclose(wide, own, atol=1e-4)
    np.testing.assert_allclose(narrow, own, atol=5e-3)
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
            learning_rate=lambda n: 1e-4 + 9e-4 * (1 - (2 * n + 1) / 16),
            gradient_accumulation_steps=2,
        ),
    ),
    "clipnorm": lambda: (adam(clipnorm=0.01), octavo(clipnorm=0.01)),
    "global_clipnorm": lambda: (
        adam(global_clipnorm=0.01),
        octavo(global_clipnorm=0.01),
    ),
    "clipvalue": lambda: (adam(clipvalue=1e-4), octavo(clipvalue=1e-4)),
    "moving average": lambda: tuple(
        make(use_ema=True, ema_momentum=0.5, ema_overwrite_frequency=4)
        for make in (adam, octavo)
    ),
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
        lambda: keras.optimizers.AdamW(RATE, weight_decay=10.0, epsilon=SMALL),
        lambda: octavo("adamw", weight_decay=10.0),
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
        # Decay changes 0.1 by 0.008 in these 16 steps of at most 5e-4.
        np.testing.assert_allclose(ours, theirs, atol=1e-3)


def test_muon_has_one_rate_or_two_and_masks_both_parts() -> None:
    """Without gradients that move anything, decay alone does: 1 - RATE * 10 a step."""

    def moved(**arguments: Any) -> list[bool]:
        optimizer = Optimizer("muon", eps=1e30, weight_decay=10.0, **arguments)
        optimizer.exclude_from_weight_decay(var_names=["bias"])
        model = model_with(optimizer)
        for v in model.trainable_variables:
            v.assign(np.ones(v.shape))
        losses(model, epochs=1)
        return [
            bool(abs(v.numpy() - 1).max() > 1e-3) for v in model.trainable_variables
        ]

    model = model_with(octavo("muon", state="8bit", learning_rate=1e-2))
    kernels = [len(v.shape) == 2 for v in model.trainable_variables]
    found = losses(model, epochs=2)
    assert found[-1] < found[0]
    assert moved(learning_rate=RATE) == kernels
    own = {"learning_rate": 0.0, "adam_learning_rate": RATE}
    assert moved(**own, adam_weight_decay=10.0) == [False] * len(kernels)


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
