"""Octavo as an optimizer of Keras 3, on its JAX backend."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from ..accumulate import in_place_if
from ..explain import Explanation, explain
from ..stepping.transformation import Transformation
from ..storage.tree import path_name
from ..values import embeddings_in_32bit
from .keras_binding import (
    bound_to,
    by_name,
    check_transformation,
    mesh_of,
    names_of,
    take_step,
)
from .keras_rates import Schedule, check_backend, for_keras, keras

check_backend()

# What Keras does itself: all arguments of its optimizers but the two that are a step's.
_OF_KERAS = frozenset(inspect.signature(keras.optimizers.Optimizer).parameters) - {
    *("learning_rate", "weight_decay", "kwargs")
}

keras.saving.register_keras_serializable("octavo")(embeddings_in_32bit)


@dataclass(frozen=True)
class _Source:
    """What an optimizer was made of: its name or itself, and arguments of a name."""

    optimizer: Any
    arguments: dict[str, Any]
    tx: optax.GradientTransformation


@dataclass(frozen=True)
class _Built:
    """What is known once there are variables.

    Attributes:
      tx: the transformation, for these variables.
      step: `take_step` of it, compiled.
      variables: what it steps, by name.
      state: its state's leaves, each a variable.
      structure: of the state.
      tables: those of the leaves that say how the state is stored.
    """

    tx: Any
    step: Callable[..., Any]
    variables: dict[str, Any]
    state: list[Any]
    structure: Any
    tables: list[Any]


@keras.saving.register_keras_serializable("octavo")
class Optimizer(keras.optimizers.Optimizer):
    """An optimizer of Keras that is Octavo's, or any optax transformation.

    By name it is saved with the model. Keras' learning rate holds: its number, which
    callbacks may change; its schedules, which count batches; or Octavo's and optax',
    which count updates. It reaches the kernel as an operand. The learning rate of an
    Octavo transformation becomes Keras'. Any other transformation keeps its own, which
    Keras does not know: `learning_rate` is nan then, and cannot be set.

    Args:
      optimizer: the name of one in `octavo.optim`, "adamw" or "lion8bit"; or a
        transformation. `keras.saving.load_model` then needs it once more:
        `custom_objects={"tx": tx}`.
      learning_rate: number or schedule, with a name. Default 1e-3.
      weight_decay: with a name, of optimizers that decay; in the kernel. Default: the
        optimizer's own. `exclude_from_weight_decay` works.
      **arguments: those of Keras' optimizers (`clipnorm`, `use_ema`,
        `gradient_accumulation_steps`, ...), and with a name the optimizer's own,
        `octavo.optim.Options` included. Keras' `beta_1`, `beta_2` and `epsilon` are
        `b1`, `b2` and `eps`.

    Raises:
      ValueError: for a name or an argument that there is not.
      TypeError: where optimizer is neither a name nor a transformation.

    State: a Keras variable for each of its arrays, sharded as the model's variables.

    >>> import keras
    >>> from octavo.optim.integrations.keras import Optimizer
    >>> model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(128)])
    >>> model.compile(Optimizer("adamw", learning_rate=1e-3), loss="mse")
    >>> model.optimizer.build(model.trainable_variables)
    >>> sum(x.dtype == "int8" for x in model.optimizer.variables)
    2
    """

    def __init__(
        self,
        optimizer: str | optax.GradientTransformation,
        learning_rate: Any = None,
        **arguments: Any,
    ) -> None:
        of_keras = {key: x for key, x in arguments.items() if key in _OF_KERAS}
        rest = {key: x for key, x in arguments.items() if key not in _OF_KERAS}
        if isinstance(optimizer, str):
            rate = 1e-3 if learning_rate is None else learning_rate
            tx = by_name(optimizer, rest)
        else:
            check_transformation(optimizer, {"learning_rate": learning_rate, **rest})
            tx = optimizer
            known = isinstance(tx, Transformation)
            rate = tx.optimizer.rate if known else float("nan")
        super().__init__(for_keras(rate), **of_keras)
        self._source = _Source(optimizer, rest, tx)
        # Keras' exclude_from_weight_decay looks at this name: it comes before `build`.
        self._built: _Built | None = None

    def _get_current_learning_rate(self) -> Any:
        if isinstance(self._learning_rate, Schedule):
            return self._learning_rate(self.iterations)
        return super()._get_current_learning_rate()

    @keras.optimizers.Optimizer.learning_rate.setter
    def learning_rate(self, value: Any) -> None:
        if not isinstance(self._source.tx, Transformation):
            raise TypeError(
                "the learning rate is inside of the optax transformation, where Keras "
                "cannot set it: give an optimizer of octavo.optim"
            )
        value = for_keras(value) if callable(value) else value
        keras.optimizers.Optimizer.learning_rate.fset(self, value)  # type: ignore

    # ------------------------------------------------------------------------ its steps

    def build(self, variables: Sequence[Any]) -> None:
        """Make the state: like the variables, and sharded as they are."""
        if self.built:
            return
        super().build(variables)
        stepped = [
            v for v in variables if not self._overwrite_variable_with_gradient(v)
        ]
        named = dict(zip(names_of(stepped), stepped, strict=True))
        params = {name: v.value for name, v in named.items()}
        decays = {name: self._use_weight_decay(v) for name, v in named.items()}
        tx = bound_to(self._source.tx, params, decays)
        flat, structure = jax.tree_util.tree_flatten_with_path(tx.init(params))
        paths = [path_name(path) for path, _ in flat]
        mesh = mesh_of(params)
        state = [
            self._variable_of(path, x, mesh)
            for path, (_, x) in zip(paths, flat, strict=True)
        ]
        tables = [v for path, v in zip(paths, state, strict=True) if "format/" in path]
        compiled = jax.jit(partial(take_step, tx))
        self._built = _Built(tx, compiled, named, state, structure, tables)

    def _variable_of(self, name: str, value: jax.Array, mesh: Any) -> Any:
        layout = value.sharding if mesh is not None else None
        if mesh is not None and not isinstance(layout, NamedSharding):
            layout = NamedSharding(mesh, PartitionSpec())
        return self.add_variable(
            value.shape,
            initializer=lambda shape, dtype: value,  # type: ignore
            dtype=value.dtype.name,
            layout=layout,
            name=name.replace("/", "_"),
        )

    def _backend_update_step(
        self, grads: Sequence[Any], trainable_variables: Sequence[Any], rate: Any
    ) -> None:
        built = self._built
        assert built is not None
        if len(trainable_variables) != len(built.variables):
            raise ValueError(
                f"gradients for {len(trainable_variables)} of the "
                f"{len(built.variables)} variables that the optimizer was built with: "
                "give all of them, zeros where a variable has none"
            )
        gradient_of = {
            id(v): g for v, g in zip(trainable_variables, grads, strict=True)
        }
        g = {name: gradient_of[id(v)] for name, v in built.variables.items()}
        p = {name: v.value for name, v in built.variables.items()}
        state = built.structure.unflatten([v.value for v in built.state])
        rate = keras.ops.convert_to_tensor(rate, "float32")
        if self.gradient_accumulation_steps:
            # Keras takes a step with each batch, and throws most of them away.
            last = (self._iterations + 1) % self.gradient_accumulation_steps == 0
            p, state = in_place_if(
                last, lambda p, s: built.step(rate, g, s, p), p, state
            )
        else:
            p, state = built.step(rate, g, state, p)
        for name, v in built.variables.items():
            v.assign(p[name])
        for v, x in zip(built.state, jax.tree.leaves(state), strict=True):
            v.assign(x)

    def explain(self, platform: str | None = None) -> Explanation:
        """What a step does with each variable: see `octavo.optim.explain`.

        Raises:
          ValueError: before the optimizer is built.
          TypeError: where the transformation is not Octavo's.
        """
        if self._built is None:
            raise ValueError(
                "explain needs variables: call optimizer.build(model.trainable_"
                "variables), or fit, first"
            )
        params = {
            name: jax.ShapeDtypeStruct(v.shape, v.dtype)
            for name, v in self._built.variables.items()
        }
        return explain(self._built.tx, params, platform=platform)

    # ---------------------------------------------------------------- saving, restoring

    def get_config(self) -> dict[str, Any]:
        """What `from_config` needs, for JSON."""
        config = super().get_config()
        del config["weight_decay"]  # it is one of the arguments
        source = self._source
        if not isinstance(source.optimizer, str):
            del config["learning_rate"]  # it is the transformation's
            return {"optimizer": None, **config}
        arguments: Any = keras.saving.serialize_keras_object(source.arguments)
        return {"optimizer": source.optimizer, **config, **arguments}

    @classmethod
    def from_config(
        cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None
    ) -> "Optimizer":
        """The optimizer that wrote a config, without its state.

        Raises:
          ValueError: if it was made of a transformation, and `custom_objects` has none.
        """
        config = keras.saving.deserialize_keras_object(config, custom_objects)
        optimizer = config.pop("optimizer")
        if optimizer is None:
            optimizer = keras.saving.get_registered_object("tx", custom_objects)
        if optimizer is None:
            raise ValueError(
                "the optimizer was made of a transformation, which no file holds. Give "
                'the same one: keras.saving.load_model(path, custom_objects={"tx": tx})'
            )
        return cls(optimizer, **config)

    def load_own_variables(self, store: Any) -> None:
        """As Keras does; but no state that is stored in other formats.

        Raises:
          ValueError: for such a state.
        """
        places = {id(v): str(i) for i, v in enumerate(self.variables)}
        for table in self._built.tables if self._built else ():
            saved = np.asarray(store[places[id(table)]])
            if not np.array_equal(saved, table.numpy()):
                raise ValueError(
                    "the saved state of the optimizer is stored in other formats or "
                    "blocks, or has other variables: give the optimizer the arguments "
                    "that it was saved with"
                )
        super().load_own_variables(store)
