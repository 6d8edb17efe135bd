"""Train with big_vision: Octavo's Adam in its chain, and the state sharded as it fits.

Copy this file to `big_vision/octavo.py`. A config names the optimizer:

    config.optax_name = "octavo.scale_by_adam"
    config.optax = dict(b1=0.9, b2=0.95)      # and any option of octavo.optim.adam

In `train.py` (or a project's own), before `bv_optax.make`, and after `infer_sharding`:

    params_sharding = octavo.use(params_shape, strategy, mesh)
    ...
    train_state_sharding["opt"] = optim.state_sharding(
        tx, params_shape, params_sharding
    )

big_vision's `fsdp` rule leaves every array under 4 MiB whole. The codes of a parameter
are a quarter of its size: between 4 and 16 MiB it would be sharded, and its codes would
be replicated, and gathered in each step. `optim.state_sharding` gives codes and scales
the sharding of their parameter. `use` tells the optimizer how parameters are sharded,
because the mesh has automatic axes: so it steps them with kernels.
"""

from types import SimpleNamespace
from typing import Any

import optax

from octavo import optim

SHARDS = 64  # the most devices over which one axis of a parameter will ever be divided


def use(params_shape: Any, strategy: Any, mesh: Any) -> Any:
    """`octavo.scale_by_adam` for these parameters, and their shardings.

    Args:
      params_shape: of `jax.eval_shape(init, ...)`, unboxed.
      strategy: `config.sharding_strategy`.
      mesh: the mesh.
    """
    from big_vision.sharding import infer_sharding

    # Strategies match paths of the whole train state, "params/...".
    tree = {"params": params_shape}
    shardings = infer_sharding(tree, strategy, mesh)["params"]

    def scale_by_adam(**options: Any) -> optax.GradientTransformation:
        """As optax': the update without learning rate and sign."""
        tx = optim.adam(1.0, min_shards=SHARDS, **options).bind(shardings)
        return optax.chain(tx, optax.scale(-1.0))

    optax.octavo = SimpleNamespace(scale_by_adam=scale_by_adam)
    return shardings
