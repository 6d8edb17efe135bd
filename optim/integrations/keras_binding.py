"""Transformations for Keras' variables: by name, bound, and stepped."""

import difflib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import optax
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from .. import aliases
from ..adagrad import adagrad
from ..adam import adam, adamw
from ..adamax import adamax
from ..ademamix import ademamix
from ..lamb import lamb
from ..lars import lars
from ..lion import lion
from ..muon import muon
from ..rmsprop import rmsprop
from ..sgd import sgd
from ..stepping.optimizer import Optimizer
from ..stepping.transformation import Transformation, step

_BASE = (
    *(adagrad, adam, adamw, adamax, ademamix, lamb, lars, lion, muon, rmsprop, sgd),
)
_NAMED: dict[str, Callable[..., Transformation]] = {
    **{function.__name__: function for function in _BASE},
    **{name: getattr(aliases, name) for name in aliases.__all__},
}
_WORDS = {
    **{"beta_1": "b1", "beta_2": "b2", "epsilon": "eps"},
    **{"adam_beta_1": "adam_b1", "adam_beta_2": "adam_b2"},  # of Muon
}


def by_name(name: str, arguments: dict[str, Any]) -> Transformation:
    """The optimizer of octavo.optim with this name; Keras sets its learning rate."""
    if name not in _NAMED:
        near = difflib.get_close_matches(name, _NAMED, n=1)
        meant = f": did you mean {near[0]!r}?" if near else "."
        raise ValueError(
            f"octavo.optim has no optimizer {name!r}{meant} There are "
            f"{', '.join(sorted(_NAMED))}"
        )
    own = {_WORDS.get(word, word): x for word, x in arguments.items()}
    return _NAMED[name](0.0, **own)


def check_transformation(tx: Any, arguments: dict[str, Any]) -> None:
    """Raise unless it is one, and alone."""
    if not isinstance(tx, optax.GradientTransformation):
        raise TypeError(
            f"optimizer is a {type(tx).__name__}: give a name, such as "
            'Optimizer("adamw"), or a transformation, Optimizer(optim.adamw(1e-3))'
        )
    given = [name for name, x in arguments.items() if x is not None]
    if given:
        raise ValueError(
            f"{', '.join(given)}: a transformation has its own. Write "
            f'Optimizer("adamw", {given[0]}=...), or give it to the transformation'
        )


def names_of(variables: Sequence[Any]) -> list[str]:
    """Their paths, without what all have in common: layer and variable at least.

    Random numbers of the rounding depend on names, and Keras gives a loaded model's
    variables paths without the model's own name. A number tells equal paths apart.
    """
    paths = [v.path.split("/") for v in variables]
    while len({path[0] for path in paths}) == 1 and min(map(len, paths)) > 2:
        paths = [path[1:] for path in paths]
    seen: Counter[str] = Counter()
    names = []
    for name in map("/".join, paths):
        seen[name] += 1
        names.append(name if seen[name] == 1 else f"{name}:{seen[name]}")
    return names


def mesh_of(params: dict[str, jax.Array]) -> Mesh | AbstractMesh | None:
    """The mesh of a Keras distribution, or None."""
    shardings = (x.sharding for x in params.values())
    return next((s.mesh for s in shardings if isinstance(s, NamedSharding)), None)


def bound_to(tx: Any, params: dict[str, jax.Array], decays: dict[str, bool]) -> Any:
    """The transformation for these variables: their shardings, and which decay."""
    excluded = not all(decays.values())
    if not isinstance(tx, Transformation):
        if excluded:
            raise ValueError(
                "exclude_from_weight_decay: the transformation is not Octavo's. Give "
                "it a mask, as optax.adamw(..., mask=...)"
            )
        return tx
    optimizer = tx.optimizer
    if excluded:
        optimizer = optimizer.each(partial(_decaying, decays))
    tx = Transformation(optimizer)
    return tx.bind(params) if optimizer.settings.sharding is None else tx


def _decaying(decays: dict[str, bool], optimizer: Optimizer) -> Optimizer:
    """Only those variables that the model decays."""
    if optimizer.masks["mask"] is not None:
        raise ValueError(
            "mask= and exclude_from_weight_decay say which variables decay: use one of "
            "them"
        )
    return replace(optimizer, masks={**optimizer.masks, "mask": decays})


def take_step(tx: Any, rate: jax.Array, grads: Any, state: Any, params: Any) -> Any:
    """New parameters and state, with Keras' learning rate where it is known."""
    if isinstance(tx, Transformation):
        tx = Transformation(tx.optimizer.with_rate(rate))
    return step(tx, grads, state, params)
