"""Fine-tune with tunix: sharded, accumulated, interrupted and resumed.

    python examples/trainers/tunix_sft.py

tunix' Llama 3, small and with random weights, learns the source of Python's standard
library on 8 devices, if need be made of the CPU: 4 parts along `fsdp`, 2 along `tp`.
"""

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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


def make_model() -> Llama3:
    """Sharded over the mesh of the context, as the model's metadata says."""
    small = ModelConfig(2, 256, 128, 256, 4, 32, 2, rope_theta=10_000, norm_eps=1e-5)
    model = Llama3(small, rngs=(rngs := nnx.Rngs(0)))

    def drawn(p: jax.Array) -> jax.Array:
        return 0.05 * jax.random.normal(rngs(), p.shape) if p.ndim > 1 else p

    params = jax.tree.map(drawn, nnx.state(model))
    specs = nnx.get_partition_spec(params)
    nnx.update(model, jax.lax.with_sharding_constraint(params, specs))
    return model


def make_optimizer(model: Llama3) -> optim.Transformation:
    """8-bit AdamW that knows the model's shardings: then kernels run on its shards."""
    return optim.adamw(2e-3).bind(model)


def batches(length: int = 64) -> Iterator[TrainingInput]:
    """The same ones each time: a resumed run skips those that it has seen."""
    text = read_text(length)
    for k in range(1000):
        rows = batch_of(text, 0, k, 16, length)
        yield TrainingInput(rows, np.ones(rows.shape, bool))


def inputs(batch: TrainingInput) -> dict[str, Any]:
    """What the model and tunix' loss take."""
    positions = utils.build_positions_from_mask(batch.input_mask)
    mask = utils.make_causal_attn_mask(batch.input_mask)
    return {**vars(batch), "positions": positions, "attention_mask": mask}


def train(folder: str, steps: int, make_optimizer: Any = make_optimizer) -> PeftTrainer:
    """Up to this step, from the last checkpoint in the folder."""
    saved = {"checkpoint_root_directory": folder, "gradient_accumulation_steps": 2}
    config = TrainingConfig(max_steps=steps, eval_every_n_steps=steps, **saved)
    with jax.make_mesh((4, 2), ("fsdp", "tp"), (AxisType.Auto,) * 2):
        model = make_model()
        trainer = PeftTrainer(model, make_optimizer(model), config)
        trainer.with_gen_model_input_fn(inputs).train(batches())
    return trainer


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)  # does nothing to other devices
    with tempfile.TemporaryDirectory() as folder:
        for steps in (10, 20):
            logger = train(folder, steps).metrics_logger
            print(logger.get_metric_history("", "loss", "train"))
