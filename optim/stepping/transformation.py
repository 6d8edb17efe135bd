"""From a rule and options to an optax transformation with a fused step."""

from typing import Any

import optax

from octavo.pallas_kernels import Rule

from ..checks import check_not_negative, is_number
from ..options import Options, Settings
from ..sharding.binding import bound
from .optimizer import Optimizer
from .stepper import Stepper


class Transformation(optax.GradientTransformationExtraArgs):
    """An `optax.GradientTransformationExtraArgs` that can also step in place.

    Attributes:
      init: `init(params) -> state`.
      update: `update(grads, state, params) -> (updates, state)`, as in optax.
      optimizer: the rule, the options, and what runs them.
    """

    optimizer: Stepper

    def __new__(cls, optimizer: Stepper) -> "Transformation":
        made = super().__new__(cls, optimizer.init, optimizer.update)  # type: ignore
        made.optimizer = optimizer
        return made

    def step(
        self, grads: Any, state: Any, params: Any, **extra_args: Any
    ) -> tuple[Any, Any]:
        """A step whose kernel writes the parameters itself; the state is `update`'s.

        Inside `jax.jit` with the state and parameters donated, nothing of a leaf's size
        is allocated. Let the jitted function take params before state, the order in
        which they return: XLA pairs donated arrays of equal type by order (it matters
        for 32-bit state).

        Args:
          grads: tree like params.
          state: what `init` or the last step returned.
          params: the parameters.
          **extra_args: ignored, as in optax.

        Returns:
          The new parameters and the new state.
        """
        return self.optimizer.step(grads, state, params, **extra_args)

    def bind(self, params: Any) -> "Transformation":
        """This optimizer, for parameters that are sharded as these are.

        On a mesh whose axes are not explicit, kernels need to know that; and on several
        devices, that parameters are on one of them. It sets the option `sharding`, by
        path.

        Args:
          params: tree of arrays on their devices, or of `jax.ShapeDtypeStruct` with
            shardings; a module or a state of nnx; variables of linen with metadata,
            within `jax.set_mesh` (and `nn.logical_axis_rules`); or of `NamedSharding`.

        Returns:
          The bound optimizer. Bind before you put it into `optax.chain` or a trainer.

        Raises:
          ValueError: where none of the parameters says how it is sharded.

        >>> import jax, jax.numpy as jnp
        >>> from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
        >>> from octavo import optim
        >>> mesh = jax.make_mesh((1,), ("data",), (AxisType.Auto,))
        >>> shard = NamedSharding(mesh, P("data"))
        >>> params = jax.device_put({"w": jnp.ones((4096, 512))}, shard)
        >>> tx = optim.adamw(1e-3).bind(params)
        >>> optim.state_sharding(tx, params).mu["w"].spec
        P('data', None)
        """
        found = bound(params)
        if found is None:
            return self
        return Transformation(self.optimizer.with_sharding(found))


def fused(
    rule: Rule,
    hyperparameters: Any,
    learning_rate: optax.ScalarOrSchedule,
    options: Options,
    *,
    weight_decay: Any = None,
    mask: Any = None,
    adapt_mask: Any = None,
) -> Transformation:
    """An optimizer from its rule.

    Args:
      rule: the algorithm.
      hyperparameters: what its functions take; numbers, which may be traced.
      learning_rate: number or schedule, called with the number of steps taken before.
      options: see `Options`.
      weight_decay: factor of p, for rules that decay; per leaf, like an option.
      mask: tree of bools, or function of the parameters that returns one: which leaves
        decay. None: all.
      adapt_mask: likewise, which leaves take the rule's ratio. None: those whose layers
        have rank 2 and up.
    """
    if is_number(weight_decay):
        check_not_negative(weight_decay=weight_decay)
    settings = Settings.of(options, rule.slots)
    if settings.record_norms and not rule.slots:
        raise ValueError(
            "record_norms=True: an optimizer that keeps no moments has no leaves in "
            "its state to record norms of. Leave it out, or give sgd a momentum"
        )
    masks = {"mask": mask, "adapt_mask": adapt_mask}
    return Transformation(
        Optimizer(rule, hyperparameters, learning_rate, settings, weight_decay, masks)
    )


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
    fused: Any = getattr(tx, "step", None)
    if fused is not None:
        return fused(grads, state, params, **extra_args)
    tx = optax.with_extra_args_support(tx)
    updates, state = tx.update(grads, state, params, **extra_args)
    return optax.apply_updates(params, updates), state
