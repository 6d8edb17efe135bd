"""Flax linen's TrainState, with the fused step."""

from typing import Any

import jax.numpy as jnp
import optax
from flax.training import train_state

from .fused import Transformation


def step(
    tx: optax.GradientTransformation,
    grads: Any,
    state: Any,
    params: Any,
    **extra_args: Any,
) -> tuple[Any, Any]:
    """One optimization step with any optax transformation, as fused as it allows.

    Octavo's own optimizers write the parameters in their kernel; anything else, an
    `optax.chain` included, goes through `tx.update` and `optax.apply_updates`.

    Args:
      tx: the transformation.
      grads: tree like params.
      state: what `tx.init` or the last step returned.
      params: the parameters.
      **extra_args: passed on to `tx.update`.

    Returns:
      The new parameters and the new state.

    >>> import jax.numpy as jnp, optax
    >>> from octavo import optim
    >>> tx = optax.chain(optax.clip_by_global_norm(1.0), optim.adam(0.1))
    >>> params = jnp.ones(3)
    >>> params, _ = optim.step(tx, jnp.ones(3), tx.init(params), params)
    >>> print(f"{params[0]:.4f}")
    0.9000
    """
    if isinstance(tx, Transformation):
        return tx.step(grads, state, params, **extra_args)
    tx = optax.with_extra_args_support(tx)
    updates, state = tx.update(grads, state, params, **extra_args)
    return optax.apply_updates(params, updates), state


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
