"""Learning rates as Keras takes them."""

import inspect
from collections.abc import Callable
from typing import Any

try:
    import keras
except ImportError as error:  # Keras' default backend may be missing
    raise ImportError(
        f"{error}. Octavo's optimizer of Keras needs Keras 3 and its JAX backend: pip "
        'install keras, and set the environment variable KERAS_BACKEND="jax" before '
        "it is imported"
    ) from error

from octavo import schedules

from ..checks import check_learning_rate


@keras.saving.register_keras_serializable("octavo")
class Schedule(keras.optimizers.schedules.LearningRateSchedule):
    """A schedule of Octavo or optax for Keras: it counts updates, and no batches.

    Args:
      function: from the number of updates to the learning rate. One that is not
        Octavo's is saved by its name, as Keras saves functions.
    """

    def __init__(self, function: Callable[[Any], Any]) -> None:
        try:
            inspect.signature(function).bind(0)
        except TypeError as error:
            raise ValueError(
                f"learning_rate={function!r} must take the number of updates: {error}"
            ) from None
        self.function = function

    def __call__(self, step: Any) -> Any:
        return self.function(keras.ops.convert_to_tensor(step))

    def get_config(self) -> dict[str, Any]:
        if isinstance(self.function, schedules.Schedule):
            return {"function": self.function.to_dict()}
        return {"function": keras.saving.serialize_keras_object(self.function)}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Schedule":
        function = config["function"]
        if "name" in function:
            return cls(schedules.Schedule.from_dict(function))
        return cls(keras.saving.deserialize_keras_object(function))


def for_keras(rate: Any) -> Any:
    """A learning rate as Keras takes it: a float, or a schedule of its own kind."""
    check_learning_rate(0.0 if rate != rate else rate)
    if isinstance(rate, keras.optimizers.schedules.LearningRateSchedule):
        return rate
    return Schedule(rate) if callable(rate) else float(rate)


def check_backend() -> None:
    """Raise ImportError unless Keras runs on JAX."""
    backend = keras.backend.backend()
    if backend != "jax":
        raise ImportError(
            f"Keras runs on {backend!r}, and Octavo on JAX alone. Set the environment "
            'variable KERAS_BACKEND="jax" before keras is imported'
        )
