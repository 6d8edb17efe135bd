"""EasyDeL: the fused step behind the hook that its `apply_gradients` calls."""

from typing import Any

import optax

from ..stepping.transformation import step


class Hooked(optax.GradientTransformationExtraArgs):
    """A transformation whose `update` returns new parameters, and no updates.

    EasyDeL calls `tx.update(updates=..., state=..., params=...)`, and then, if there is
    one, `tx.apply_updates_hook(params, updates)` in place of `optax.apply_updates`.
    Only what calls the hook may be given this transformation: anything else would add
    the new parameters to the old ones. So it is never inside of `optax.chain`,
    `optax.MultiSteps` or another wrapper. Let it wrap them.

    >>> import jax.numpy as jnp
    >>> from octavo import optim
    >>> from octavo.optim.integrations import easydel
    >>> tx, params = easydel.Hooked(optim.adam(0.1)), {"w": jnp.ones(3)}
    >>> state = tx.init(params)
    >>> updates, state = tx.update(updates=params, state=state, params=params)
    >>> print(f"{tx.apply_updates_hook(params, updates)['w'][0]:.4f}")
    0.9000
    """

    def __new__(cls, tx: optax.GradientTransformation) -> "Hooked":
        """Wraps an optimizer of Octavo; or any, whose step is then as fused as it is.

        Args:
          tx: the optimizer.
        """

        def update(
            updates: Any, state: Any, params: Any = None, **extra_args: Any
        ) -> tuple[Any, Any]:
            if params is None:
                raise ValueError(
                    "this update returns new parameters: call it with "
                    "tx.update(updates=grads, state=state, params=params)"
                )
            return step(tx, updates, state, params, **extra_args)

        return super().__new__(cls, tx.init, update)

    def apply_updates_hook(self, params: Any, updates: Any) -> Any:
        """The new parameters, which `update` returned in the place of updates."""
        del params
        return updates
