"""On a mesh, Keras' optimizer finds the shardings itself: kernels run on shards."""

import os
import subprocess
import sys

import keras
import keras_fit
import numpy as np
import pytest
from fits import losses, model_with, octavo
from jax.sharding import PartitionSpec as P
from keras import distribution

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")


def test_the_recipe_is_sharded_and_takes_the_kernels() -> None:
    keras_fit.use_mesh()
    model = keras_fit.make_model(keras_fit.make_optimizer())
    found = keras_fit.fit(model)
    for platform, kernel in (("tpu", "tpu"), ("gpu", "triton")):
        rows = model.optimizer.explain(platform).rows
        taken = {row.path: row.backend for row in rows if row.blocks}
        assert taken == {"dense/kernel": kernel, "dense_1/kernel": kernel}
    for v in model.optimizer.variables:
        assert len(v.value.sharding.device_set) == 8, v.path
        if "kernel" in v.name:
            assert v.value.sharding.spec == P(None, "model"), v.path
    keras.distribution.set_distribution(None)
    keras.utils.clear_session()
    alone = keras_fit.fit(keras_fit.make_model(keras_fit.make_optimizer()))
    # Sums over devices are in another order; then the curves part slowly.
    np.testing.assert_allclose(found, alone, atol=2e-3)


@pytest.mark.parametrize("accumulated", [None, 2])
def test_data_parallel(accumulated: int | None) -> None:
    options = {"gradient_accumulation_steps": accumulated, "state": "8bit"}
    alone = losses(model_with(octavo(**options)))
    keras.utils.clear_session()
    distribution.set_distribution(distribution.DataParallel())
    model = model_with(octavo(**options))
    np.testing.assert_allclose(losses(model), alone, atol=1e-3)
    rows = model.optimizer.explain("tpu").rows
    assert [row.backend for row in rows if row.blocks] == ["tpu", "tpu"]


def test_the_recipe_as_a_program() -> None:
    done = subprocess.run(
        [sys.executable, keras_fit.__file__], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    losses = [
        float(line.rpartition(" ")[2])
        for line in done.stdout.splitlines()
        if "loss: " in line
    ]
    assert len(losses) == 10
    assert losses[5] < losses[4] + 0.02  # it goes on where it was saved
    assert losses[9] < losses[0] / 10


def test_another_backend_is_an_error() -> None:
    program = "import octavo.optim.integrations.keras"
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env=os.environ | {"KERAS_BACKEND": "numpy"},
    )
    assert "Keras runs on 'numpy', and Octavo on JAX alone" in done.stderr
