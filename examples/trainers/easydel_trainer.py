"""Train with EasyDeL: its trainers, with Octavo's AdamW and the fused step.

Copy this file beside your training script, and call it before the trainer is made:

    model = ed.AutoEasyDeLModelForCausalLM.from_pretrained(...)
    arguments = ed.SFTConfig(learning_rate=1e-4, weight_decay=0.1, ...)
    use_octavo(arguments, model)
    trainer = ed.SFTTrainer(arguments=arguments, model=model, ...)
    trainer.train()

EasyDeL shards the state by the model's own partition rules. It searches them in paths
such as `mu_scale/layers/0/mlp/kernel`, so they fit codes and scales as they fit
parameters. The mesh has automatic axes, so the optimizer has to be told the shardings.
The model, which is there first, has them.
"""

from typing import Any

import jax
from flax import nnx

from octavo import optim
from octavo.optim.integrations import easydel

SHARDS = 64  # the most devices over which one axis of a parameter will ever be divided


def use_octavo(arguments: Any, model: nnx.Module) -> None:
    """Training arguments whose optimizer is Octavo's; schedule and rates are theirs.

    Args:
      arguments: EasyDeL's `TrainingArguments`, or those of one of its trainers.
      model: the model, on its devices.
    """
    theirs = arguments.get_optimizer_and_scheduler
    # Shardings alone: the arrays themselves are donated in the first step.
    shardings = jax.tree.map(lambda p: p.sharding, nnx.state(model, nnx.Param))

    def ours(steps: int | None = None) -> tuple[easydel.Hooked, Any]:
        _, schedule = theirs(steps)
        tx = optim.adamw(
            schedule,
            weight_decay=arguments.weight_decay,
            grad_clip_norm=arguments.clip_grad,
            min_shards=SHARDS,
        )
        return easydel.Hooked(tx.bind(shardings)), schedule

    arguments.get_optimizer_and_scheduler = ours
