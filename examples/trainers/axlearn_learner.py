"""Train with AXLearn: Octavo's AdamW as a learner's optimizer.

In an experiment's trainer config, where `adamw_optimizer` of AXLearn would stand:

    from axlearn.common import learner, optimizers, schedule
    from axlearn.common.config import config_for_function

    trainer.learner = learner.Learner.default_config().set(
        optimizer=config_for_function(octavo_adamw).set(
            learning_rate=config_for_function(schedule.cosine_with_linear_warmup).set(
                peak_lr=3e-4, max_step=100_000, warmup_steps=2_000
            ),
            weight_decay=0.1,
        )
    )

AXLearn asks its optimizer how the state is partitioned. `partitioned` answers, and
takes from the question how the parameters are. Nothing else has to be written for the
kernels. AXLearn's own transformations go beside it, in `optimizers.chain(...)`.
"""

from collections.abc import Callable
from typing import Any

import jax

from octavo import optim
from octavo.optim.integrations import axlearn

SHARDS = 256  # the most devices over which one axis of a parameter will ever be divided


def octavo_adamw(
    learning_rate: float | Callable[[jax.Array], jax.Array],
    weight_decay: float = 0.0,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    **options: Any,
) -> Any:
    """A `PartitionedGradientTransformation` with 8-bit state.

    Args:
      learning_rate: number, or a schedule of AXLearn, whose first step is 1.
      weight_decay: multiplied by each parameter's `weight_decay_scale`.
      b1: decay of the mean.
      b2: decay of the mean square.
      eps: added to the root of the mean square.
      **options: of `optim.adamw`.
    """
    rate = learning_rate
    if callable(learning_rate):
        rate = lambda count: learning_rate(count + 1)  # noqa: E731
    tx = optim.adamw(
        rate,
        b1=b1,
        b2=b2,
        eps=eps,
        weight_decay=weight_decay,
        min_shards=SHARDS,
        **options,
    )
    return axlearn.partitioned(tx)
