"""Train with MaxText: its own command, with Octavo's AdamW as `opt_type=adamw`.

    pip install maxtext octavo                                     # Python 3.12
    python examples/trainers/maxtext_train.py base.yml run_name=... steps=...

It takes what `python -m maxtext.trainers.pre_train.train` takes. `get_optimizer` stands
in place of the function of this name in `maxtext/optimizers/optimizers.py`; you can
also copy it there. MaxText makes the optimizer before the parameters. But it gives it
the abstract model, which knows how each parameter will be sharded: `bind` reads that,
and then the step runs in kernels. Without it XLA would partition the step.

Of MaxText's options for AdamW, `mu_dtype` has no meaning here. `adam_eps_root`,
`trainable_parameters_mask` and `skip_step_on_spikes` are refused.
"""

import re
from typing import Any

import jax
import optax
from flax import nnx

from octavo import optim

SHARDS = 256  # the most devices over which one axis of a parameter will ever be divided


def get_optimizer(
    config: Any, learning_rate_schedule: Any, model: Any = None, mesh: Any = None
) -> optax.GradientTransformation:
    """AdamW with 8-bit state, for parameters that are sharded as the model says."""
    del mesh  # the shardings of the model have it
    for name in ("adam_eps_root", "trainable_parameters_mask", "skip_step_on_spikes"):
        if getattr(config, name, None):
            raise ValueError(f"{name}={getattr(config, name)!r}: see {__file__}")

    def weight_decay(path: str) -> float:
        masked = any(re.search(x, path) for x in config.adamw_mask or ())
        return 0.0 if masked else config.adam_weight_decay

    params = nnx.state(model, nnx.Param)
    tx = optim.adamw(
        learning_rate_schedule,
        b1=config.adam_b1,
        b2=config.adam_b2,
        eps=config.adam_eps,
        weight_decay=weight_decay,
        min_shards=SHARDS,
    ).bind(params)
    if config.shard_optimizer_over_data:
        tx = tx.bind(jax.tree.map(zero1, params))
    print(optim.explain(tx, params))
    return tx


def zero1(param: jax.ShapeDtypeStruct) -> jax.sharding.Sharding:
    """The sharding of a parameter's state in MaxText's ZeRO-1, where it is stepped."""
    from maxtext.utils.sharding import add_data_to_sharding

    return add_data_to_sharding(param.sharding.mesh, (), param, param.sharding)


if __name__ == "__main__":
    from absl import app
    from maxtext.optimizers import optimizers
    from maxtext.trainers.pre_train import train

    optimizers.get_optimizer = get_optimizer
    app.run(train.main)
