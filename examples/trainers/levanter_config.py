"""Train with Levanter: Octavo's AdamW, registered as an optimizer of its configs.

Put this file where your `train_lm` script imports it, and call `register()` before the
script's `levanter.config.main(main)()`. A config then says

    optimizer:
      type: octavo
      learning_rate: 3e-4
      weight_decay: 0.1

Models are trees of haliax' NamedArrays, and `levanter.named` gives names to the state,
too: Levanter shards and restores arrays by the names of their axes, and replicates what
has none. While a step is traced, the names and the trainer's axis mapping say how each
parameter is sharded, and the step runs in kernels.
"""

from dataclasses import dataclass
from typing import Any

import optax

from octavo import optim
from octavo.optim.integrations import levanter

SHARDS = 256  # the most devices over which one axis of a parameter will ever be divided


def octavo_adamw(learning_rate: Any, config: Any, mask: Any = None) -> Any:
    """The optimizer of a config. Its own clipping takes the place of optax's."""
    tx = optim.adamw(
        learning_rate,
        b1=config.beta1,
        b2=config.beta2,
        eps=config.epsilon,
        weight_decay=config.weight_decay,
        mask=mask,
        grad_clip_norm=config.max_grad_norm,
        min_shards=SHARDS,
    )
    return levanter.named(tx)


def register() -> type:
    """The config's class, once Levanter knows it."""
    from levanter.optim import OptimizerConfig

    @OptimizerConfig.register_subclass("octavo")
    @dataclass(frozen=True)
    class OctavoConfig(OptimizerConfig):
        beta1: float = 0.9
        beta2: float = 0.95
        epsilon: float = 1e-8
        max_grad_norm: float | None = 1.0

        def build(self, num_train_steps: int) -> optax.GradientTransformation:
            mask = self.build_weight_decay_mask()

            def made(learning_rate: Any) -> Any:
                return octavo_adamw(learning_rate, self, mask)

            rate = self.lr_scheduler(num_train_steps)
            return optax.inject_hyperparams(made)(learning_rate=rate)  # logged so

    return OctavoConfig
