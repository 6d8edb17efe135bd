"""Flax linen's TrainState, with the fused step."""

from typing import Any

import jax.numpy as jnp
from flax.training import train_state

from ..stepping.transformation import step


class TrainState(train_state.TrainState):
    """`flax.training.train_state.TrainState` whose `apply_gradients` is fused.

    >>> import jax.numpy as jnp
    >>> from octavo import optim
    >>> state = optim.TrainState.create(
    ...     apply_fn=None, params={"w": jnp.ones(3)}, tx=optim.adam(0.1)
    ... )
    >>> state = state.apply_gradients(grads={"w": jnp.ones(3)})
    >>> print(state.step, f"{state.params['w'][0]:.4f}")
    1 0.9000
    """

    @classmethod
    def create(cls, *, apply_fn: Any, params: Any, tx: Any, **kwargs: Any) -> Any:
        """A fresh state. Its `step` is an array: a jitted step compiles only once."""
        state = super().create(apply_fn=apply_fn, params=params, tx=tx, **kwargs)
        return state.replace(step=jnp.zeros((), jnp.int32))

    def apply_gradients(self, *, grads: Any, **kwargs: Any) -> "TrainState":
        """A step: new `params`, `opt_state` and `step`, and what `kwargs` replaces."""
        if _OVERWRITE in grads:  # fp8 statistics, which Flax takes out of the tree
            return super().apply_gradients(grads=grads, **kwargs)
        params, opt_state = step(self.tx, grads, self.opt_state, self.params)
        return self.replace(
            step=self.step + 1, params=params, opt_state=opt_state, **kwargs
        )


_OVERWRITE = "_overwrite_with_gradient"
