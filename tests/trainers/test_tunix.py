"""tunix fine-tunes with Octavo as with optax, sharded, accumulated and resumed."""

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest
import tunix_sft
from flax import nnx
from jax.sharding import AxisType

from octavo import optim

STEPS = 20
# tunix still enters meshes with `with mesh:`, and other things that are deprecated.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def losses(trainer: Any) -> np.ndarray:
    return trainer.metrics_logger.get_metric_history("", "loss", "train")


def state(trainer: Any) -> Any:
    return nnx.as_pure(nnx.state(trainer.optimizer, nnx.optimizer.OptState))


def state_bytes(trainer: Any) -> tuple[int, int]:
    """Of the moments, in all and on one device: without what MultiSteps adds up."""
    inner = jax.tree.leaves(state(trainer)["opt_state"]["inner_opt_state"])
    shards = (math.prod(x.sharding.shard_shape(x.shape)) * x.itemsize for x in inner)
    return sum(x.nbytes for x in inner), sum(shards)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All of the recipe's steps, at once."""
    makes = {
        "optax": lambda model: optax.adamw(2e-3),
        "32bit": lambda model: optim.adamw32bit(2e-3).bind(model),
        "8bit": tunix_sft.make_optimizer,
    }
    return {
        name: tunix_sft.train(str(tmp_path_factory.mktemp(name)), STEPS, make)
        for name, make in makes.items()
    }


def test_losses_are_those_of_optax(runs: dict[str, Any]) -> None:
    own, full, ours = map(losses, runs.values())
    sizes = {name: state_bytes(trainer) for name, trainer in runs.items()}
    print(f"losses {own[-1]:.4f} {full[-1]:.4f} {ours[-1]:.4f}, bytes {sizes}")
    assert own[-1] < 0.6 * own[0]
    np.testing.assert_allclose(full, own, atol=1e-3)
    np.testing.assert_allclose(ours, own, atol=2e-2)
    for whole_or_shard in (0, 1):  # the smallest leaves are not quantized
        narrow, wide = (sizes[name][whole_or_shard] for name in ("8bit", "optax"))
        assert narrow < wide / 3


def test_a_resumed_run_is_the_same(runs: dict[str, Any], tmp_path: Path) -> None:
    first = tunix_sft.train(str(tmp_path), STEPS // 2)
    second = tunix_sft.train(str(tmp_path), STEPS)
    found = np.concatenate([losses(first), losses(second)])
    np.testing.assert_array_equal(found, losses(runs["8bit"]))
    pairs = (jax.tree.leaves(state(trainer)) for trainer in (runs["8bit"], second))
    for a, b in zip(*pairs, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(("platform", "kernel"), [("tpu", "tpu"), ("gpu", "triton")])
def test_kernels_run_on_shards(platform: str, kernel: str) -> None:
    with jax.make_mesh((4, 2), ("fsdp", "tp"), (AxisType.Auto,) * 2):
        model = tunix_sft.make_model()
        tx = tunix_sft.make_optimizer(model)
        params = nnx.as_pure(nnx.state(model, nnx.Param))
    rows = optim.explain(tx, params, platform=platform).rows
    quantized = [row for row in rows if row.blocks]
    assert len(quantized) == 16
    assert {row.backend for row in quantized} == {kernel}
    assert all(set(row.spec) & {"fsdp", "tp"} for row in rows)


def test_the_recipe_as_a_program() -> None:
    done = subprocess.run(
        [sys.executable, tunix_sft.__file__], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "Octavo" not in done.stderr  # no warning that the shardings are not known
    numbers = [
        float(x) for x in done.stdout.replace("[", " ").replace("]", " ").split()
    ]
    assert len(numbers) == STEPS
    assert numbers[STEPS // 2] < numbers[0] < 6
