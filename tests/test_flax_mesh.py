"""Flax without a trainer: the recipes, which get kernels and not XLA's path."""

import importlib.util
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from octavo import optim
from octavo.optim.integrations.nnx import Optimizer

TRAINERS = Path(__file__).parents[1] / "examples" / "trainers"
LINES = 80  # what a reader copies is short


def recipe(name: str) -> Any:
    """A recipe as a module; its name is no module's, so it hides none."""
    path = TRAINERS / f"{name}.py"
    assert len(path.read_text().splitlines()) < LINES
    spec = importlib.util.spec_from_file_location(f"recipe_{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def expect_kernels(tx: optim.Transformation, params: Any, spec: Any) -> None:
    """On a TPU and on a GPU, for each matrix; without the line, XLA."""
    for platform, backend in (("tpu", "tpu"), ("gpu", "triton")):
        rows = optim.explain(tx, params, platform=platform).rows
        matrices = [row for row in rows if row.path.endswith("kernel")]
        assert {row.backend for row in matrices} == {backend}
        assert all(row.spec[0] == spec and row.aligned for row in matrices)


@pytest.mark.parametrize("name", ["nnx_mesh", "linen_mesh"])
def test_a_recipe_trains_as_optax_does_with_kernels(name: str) -> None:
    module = recipe(name)
    ours, losses = module.main(optim.adamw(1e-2, min_shards=8), steps=20)
    adam = optax.adamw(1e-2)
    _, exact = module.main(optim.adamw(1e-2, state="32bit"), steps=20)
    assert losses[-1] < 0.1 * losses[0]
    assert losses[-1] == pytest.approx(exact[-1], rel=0.1)
    if name == "nnx_mesh":
        with jax.numpy_dtype_promotion("standard"):  # optax needs it
            _, theirs = module.main(adam, steps=20)
        np.testing.assert_allclose(exact, theirs, rtol=1e-4)
        with jax.set_mesh(module.mesh):
            shape = nnx.eval_shape(lambda: module.Model(1024, nnx.Rngs(0)))
        expect_kernels(ours.tx, nnx.as_pure(nnx.state(shape, nnx.Param)), "fsdp")
    else:
        expect_kernels(ours.tx, ours.params, "fsdp")
        assert ours.opt_state.mu["Dense_0"]["kernel"].sharding.spec[0] == "fsdp"


def test_the_fused_step_of_nnx_is_flax_own_update() -> None:
    def model() -> nnx.Module:
        return nnx.Linear(64, 128, rngs=nnx.Rngs(0))

    @nnx.jit
    def step(model: Any, optimizer: Any) -> None:
        grads = nnx.grad(lambda m: (m(jnp.ones((2, 64))) ** 2).mean())(model)
        optimizer.update(model, grads)

    tx, found = optim.adamw(1e-2), []
    for make in (Optimizer, nnx.Optimizer):
        one = model()
        optimizer = make(one, tx, wrt=nnx.Param)
        for _ in range(2):
            step(one, optimizer)
        assert int(optimizer.step[...]) == 2
        found.append(nnx.as_pure(nnx.state((one, optimizer.opt_state))))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), *found)


def test_any_optax_transformation_works_in_it() -> None:
    one = nnx.Linear(64, 128, rngs=nnx.Rngs(0))
    optimizer = Optimizer(one, optax.chain(optax.clip(1.0), optax.sgd(0.1)))
    before = one.kernel[...]
    optimizer.update(one, nnx.grad(lambda m: m.kernel[...].sum())(one))
    np.testing.assert_allclose(one.kernel[...], before - 0.1, atol=1e-7)
