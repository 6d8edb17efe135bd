"""Flax nnx's Optimizer, with the fused step."""

from typing import Any

import optax
from flax import nnx

from ..stepping.transformation import step


class Optimizer(nnx.Optimizer):
    """`flax.nnx.Optimizer` whose `update` is the fused step.

    It binds the optimizer to the model's shardings, as `tx.bind(model)` does: on a mesh
    whose axes are not explicit, too, each device steps its own shards.

    Args:
      model: the module.
      tx: an Octavo optimizer, or any optax transformation.
      wrt: filter of the variables that are trained. Default `nnx.Param`.

    >>> from flax import nnx
    >>> from octavo import optim
    >>> from octavo.optim.integrations.nnx import Optimizer
    >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    >>> optimizer = Optimizer(model, optim.adamw(1e-3))
    >>> loss, grads = nnx.value_and_grad(lambda m: (m.kernel[...] ** 2).sum())(model)
    >>> optimizer.update(model, grads)
    >>> int(optimizer.step[...])
    1
    """

    def __init__(
        self,
        model: Any,
        tx: optax.GradientTransformation,
        *,
        wrt: Any = nnx.Param,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, _bound(tx, nnx.state(model, wrt)), wrt=wrt, **kwargs)

    def update(  # type: ignore[override]
        self, model: Any, grads: Any, /, **kwargs: Any
    ) -> None:
        """A step: the model's parameters and the state change.

        Args:
          model: the module.
          grads: of `nnx.grad`, for the same variables.
          **kwargs: passed on to the transformation.
        """
        params, grads, state, kwargs = (
            _pure(x)
            for x in (
                nnx.state(model, self.wrt),
                nnx.state(grads, self.wrt),
                self.opt_state,
                kwargs,
            )
        )
        params, state = step(self.tx, grads, state, params, **kwargs)
        nnx.update(model, params)
        nnx.update(self.opt_state, nnx.state(state))
        self.step[...] += 1


_pure: Any = getattr(nnx, "as_pure", None) or nnx.pure  # by flax' version


def _bound(tx: Any, params: Any) -> Any:
    """Where parameters do not say how they are sharded, their types may."""
    if not hasattr(tx, "bind"):
        return tx
    try:
        return tx.bind(params)
    except ValueError:
        return tx
