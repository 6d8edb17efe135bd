"""Fine-tune with tunix: sharded, accumulated, interrupted and resumed.

    python examples/trainers/tunix_sft.py

tunix' own Llama 3, small and with random weights in place of downloaded ones, learns
Python's standard library, byte by byte, on 8 devices: 4 parts along `fsdp`, 2 along
`tp`. Where there is no accelerator, they are made of the CPU.
"""

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType
from tunix.models.llama3.model import Llama3, ModelConfig
from tunix.sft import utils
from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig, TrainingInput

from octavo import optim

sys.path.append(str(Path(__file__).parents[1]))
from _text import batch_of, read_text

LENGTH = 64


def make_model() -> Llama3:
    """Sharded over the mesh of the context, as the model's metadata says."""
    small = ModelConfig(2, 256, 128, 256, 4, 32, 2, rope_theta=10_000, norm_eps=1e-5)
    rngs = nnx.Rngs(0)
    model = Llama3(small, rngs=rngs)
    params = nnx.state(model)
    random = jax.tree.map(
        lambda w: 0.05 * jax.random.normal(rngs(), w.shape) if w.ndim > 1 else w, params
    )
    specs = nnx.get_partition_spec(params)
    nnx.update(model, jax.lax.with_sharding_constraint(random, specs))
    return model


def make_optimizer(model: Llama3) -> optim.Transformation:
    """8-bit AdamW. It is told how the model is sharded: then each device runs the
    kernel on its own shards."""
    shardings = jax.tree.map(
        lambda p: p.sharding, nnx.as_pure(nnx.state(model, nnx.Param))
    )
    return optim.adamw(2e-3, sharding=shardings)


def batches() -> Iterator[TrainingInput]:
    text = read_text(LENGTH)
    for k in range(1000):
        rows = batch_of(text, 0, k, 16, LENGTH)
        yield TrainingInput(rows, np.ones(rows.shape, bool))


def model_input(batch: TrainingInput) -> dict:
    return {
        "input_tokens": batch.input_tokens,
        "input_mask": batch.input_mask,
        "positions": utils.build_positions_from_mask(batch.input_mask),
        "attention_mask": utils.make_causal_attn_mask(batch.input_mask),
    }


def train(folder: str, steps: int, make_optimizer=make_optimizer) -> PeftTrainer:
    """Until so many steps are done, from the last checkpoint in the folder."""
    mesh = jax.make_mesh((4, 2), ("fsdp", "tp"), (AxisType.Auto,) * 2)
    config = TrainingConfig(
        eval_every_n_steps=steps,
        max_steps=steps,
        gradient_accumulation_steps=2,
        checkpoint_root_directory=folder,
    )
    with mesh:
        model = make_model()
        trainer = PeftTrainer(model, make_optimizer(model), config)
        trainer.with_gen_model_input_fn(model_input).train(batches())
    return trainer


def losses(trainer: PeftTrainer) -> np.ndarray:
    return trainer.metrics_logger.get_metric_history("", "loss", "train")


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)  # does nothing to other devices
    with tempfile.TemporaryDirectory() as folder:
        for steps in (10, 20):
            print(losses(train(folder, steps)))
