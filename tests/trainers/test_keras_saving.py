"""What Keras saves, it loads: the model goes on as if nothing had happened."""

from pathlib import Path
from typing import Any

import keras
import numpy as np
import optax
import pytest
from fits import adam, losses, model_with, octavo

from octavo import optim, schedules
from octavo.optim.integrations.keras import Optimizer

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")


def halved(count: Any) -> Any:
    return 1e-3 / (1 + count)


CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "by name": (lambda: octavo(state="8bit", weight_decay=0.1, name="adamw"), {}),
    "schedule": (
        lambda: octavo(learning_rate=schedules.PolynomialLR(1e-3, total_steps=32)),
        {},
    ),
    "function": (lambda: octavo(learning_rate=halved), {"halved": halved}),
    "schedule of Keras": (
        lambda: octavo(
            learning_rate=keras.optimizers.schedules.PolynomialDecay(1e-3, 32)
        ),
        {},
    ),
    "accumulated": (lambda: octavo(gradient_accumulation_steps=3, clipnorm=1.0), {}),
    "by leaf": (
        lambda: octavo(state=optim.embeddings_in_32bit, grad_clip_norm=1.0),
        {},
    ),
    "loss scale": (
        lambda: keras.optimizers.LossScaleOptimizer(octavo(state="8bit")),
        {},
    ),
    "transformation": (
        lambda: Optimizer(optim.lion(1e-4)),
        {"tx": optim.lion(1e-4)},
    ),
    "chain": (
        lambda: Optimizer(optax.chain(optax.clip(0.1), optim.lion(1e-4))),
        {"tx": optax.chain(optax.clip(0.1), optim.lion(1e-4))},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_loaded_model_goes_on_the_same(case: str, tmp_path: Path) -> None:
    make, needed = CASES[case]
    model = model_with(make())
    losses(model, epochs=1)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras", custom_objects=needed)
    pairs = zip(model.optimizer.variables, loaded.optimizer.variables, strict=True)
    for ours, theirs in pairs:
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours.numpy(), theirs.numpy())
    expected = losses(model, epochs=1)
    np.testing.assert_array_equal(losses(loaded, epochs=1), expected)
    fresh = keras.saving.load_model(tmp_path / "model.keras", custom_objects=needed)
    for v in fresh.optimizer.variables:
        if "nu" in v.name or "mu" in v.name:
            v.assign(np.zeros(v.shape, v.dtype))
    assert np.any(losses(fresh, epochs=1) != expected)  # the state matters


def test_a_config_is_what_a_user_wrote() -> None:
    optimizer = octavo("adamw", weight_decay=0.1, state={"mu": "8bit", "nu": "32bit"})
    config = optimizer.get_config()
    assert config["optimizer"] == "adamw"
    assert config["weight_decay"] == 0.1
    assert config["state"] == {"mu": "8bit", "nu": "32bit"}
    again = keras.optimizers.deserialize(keras.optimizers.serialize(optimizer))
    assert again.get_config() == config


def test_a_transformation_is_needed_once_more(tmp_path: Path) -> None:
    model = model_with(Optimizer(optim.lion(1e-4)))
    losses(model, epochs=1)
    model.save(tmp_path / "model.keras")
    with pytest.raises(ValueError, match=r'custom_objects=\{"tx": tx\}'):
        keras.saving.load_model(tmp_path / "model.keras")


def test_a_state_in_other_formats_is_refused(tmp_path: Path) -> None:
    model = model_with(Optimizer(optim.adam(1e-3)))
    losses(model, epochs=1)
    model.save(tmp_path / "model.keras")
    other = {"tx": optim.adam(1e-3, state="dynamic8")}
    with pytest.raises(ValueError, match="stored in other formats"):
        keras.saving.load_model(tmp_path / "model.keras", custom_objects=other)


# ------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        (lambda: Optimizer("adanw"), ValueError, "did you mean 'adamw'"),
        (lambda: Optimizer("adam", weight_decay=0.1), ValueError, "adamw"),
        (lambda: Optimizer("adam", momentum=0.1), TypeError, "momentum"),
        (lambda: Optimizer("adam", learning_rate="fast"), ValueError, "a schedule"),
        (lambda: Optimizer("adam", learning_rate=lambda: 0.1), ValueError, "updates"),
        (lambda: Optimizer(adam()), TypeError, "a transformation"),
        (lambda: Optimizer(optim.adam(0.1), 0.1), ValueError, "has its own"),
        (
            lambda: Optimizer(optim.adam(0.1), weight_decay=0.1),
            ValueError,
            "has its own",
        ),
        (lambda: octavo().explain(), ValueError, "build"),
    ],
)
def test_errors_say_what_to_write(given: Any, error: type, says: str) -> None:
    with pytest.raises(error, match=says):
        given()


def test_keras_cannot_set_the_rate_inside_of_optax() -> None:
    optimizer = Optimizer(optax.adam(1e-3))
    assert np.isnan(optimizer.learning_rate.numpy())
    with pytest.raises(TypeError, match=r"octavo\.optim"):
        optimizer.learning_rate = 0.1
    with pytest.raises(ValueError, match="mask"):
        optimizer.exclude_from_weight_decay(var_names=["bias"])
        model_with(optimizer).optimizer.build(model_with(adam()).trainable_variables)


def test_gradients_for_some_variables_are_refused() -> None:
    model = model_with(octavo())
    variables = model.trainable_variables
    model.optimizer.build(variables)
    with pytest.raises(ValueError, match="gradients for 1 of the 6"):
        model.optimizer.apply([variables[0].value], variables[:1])
