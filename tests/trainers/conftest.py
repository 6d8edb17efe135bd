"""What others wrote promotes types: it is not held to the strictness of `tests/`."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ["KERAS_BACKEND"] = "jax"  # before keras is imported

import jax
import keras
import pytest

jax.config.update("jax_numpy_dtype_promotion", "standard")
jax.config.update("jax_numpy_rank_promotion", "allow")

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "trainers"))


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Names of Keras' layers start anew: the same in each test."""
    keras.utils.clear_session()
    yield
    keras.distribution.set_distribution(None)
    keras.config.set_dtype_policy("float32")
