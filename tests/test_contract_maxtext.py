"""MaxText's contract: what it does with an optimizer's state, and the recipe in it.

Read in MaxText e591f30 (22 August 2026) and 0.2.5: `get_abstract_state_nnx` (shapes
under `nnx.eval_shape`; each variable's sharding from its own metadata; jit with them),
`add_data_to_sharding` and `maybe_update_params_sharding_with_opt_nnx` (ZeRO-1), and
`to_linen_checkpoint_dict` with its inverse. What follows asks the same of a state.
"""

import re
import sys
from collections.abc import Callable, Mapping
from functools import cache
from types import ModuleType, SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import maxtext_train
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from octavo import optim

from contracts import KERNELS, auto_mesh

CONFIG = SimpleNamespace(
    adam_b1=0.9,
    adam_b2=0.95,
    adam_eps=1e-8,
    adam_eps_root=0.0,
    adam_weight_decay=0.1,
    adamw_mask=["norm"],
    shard_optimizer_over_data=False,
)


class Model(nnx.Module):
    """Layers are stacked along the second axis, as MaxText's scan does."""

    def __init__(self, width: int, spec: tuple[Any, ...]) -> None:
        scanned = {"out_sharding": spec}
        kernel = 0.1 * jax.random.normal(jax.random.key(0), (width, 2, 128))
        self.kernel = nnx.Param(kernel, **scanned, eager_sharding=False)
        self.norm = nnx.Param(jnp.ones(128), out_sharding=(None,), eager_sharding=False)

    def __call__(self, x: jax.Array) -> jax.Array:
        return (x @ self.kernel[:, 0] + x @ self.kernel[:, 1]) * self.norm[...][None]


class TrainState(nnx.Module):
    """The model beside its optimizer."""

    def __init__(self, model: Model, tx: optax.GradientTransformation) -> None:
        self.model, self.optimizer = model, nnx.Optimizer(model, tx, wrt=nnx.Param)


def is_variable(x: Any) -> bool:
    return isinstance(x, nnx.Variable)


def shardings_of(state: nnx.State, mesh: Any) -> nnx.State:
    """Each variable's, by its metadata. It has to divide the variable's own shape."""

    def of(x: Any) -> Any:
        spec = x.get_metadata().get("out_sharding") or ()
        sharding = NamedSharding(mesh, P(*spec[: x.get_value().ndim]))
        sharding.shard_shape(x.get_value().shape)  # raises where it does not divide
        return x.replace(sharding)

    return jax.tree.map(of, state, is_leaf=is_variable)


def abstract_model(width: int, spec: tuple[Any, ...], mesh: Any) -> Model:
    """What MaxText passes to `get_optimizer`: shapes with their shardings."""
    graph, state = nnx.split(nnx.eval_shape(lambda: Model(width, spec)))

    def sharded(x: Any, s: Any) -> Any:
        value = x.get_value()
        struct = jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=s.get_value())
        return x.replace(struct)

    shardings = shardings_of(state, mesh)
    return nnx.merge(
        graph, jax.tree.map(sharded, state, shardings, is_leaf=is_variable)
    )


def add_data(mesh: Any, path: Any, leaf: Any, sharding: NamedSharding) -> NamedSharding:
    """ZeRO-1's rule: `data` goes to the first axis whose shards it divides."""
    del path
    spec = [*sharding.spec, *(None,) * (len(leaf.shape) - len(sharding.spec))]
    shape = sharding.shard_shape(leaf.shape)
    for k, n in enumerate(shape):
        if n % mesh.shape["data"] == 0 and spec[k] is None:
            return NamedSharding(mesh, P(*spec[:k], "data", *spec[k + 1 :]))
    return sharding


def find_mu(tree: Any) -> Any:
    """ZeRO-1's search: the first mapping that has both `mu` and `nu`."""
    if isinstance(tree, Mapping | nnx.State) and "mu" in tree and "nu" in tree:
        return tree["mu"]
    children = tree.values() if isinstance(tree, Mapping | nnx.State) else ()
    return next((x for x in map(find_mu, children) if x is not None), None)


def losses_of(tx: Any, mesh: Mesh, spec: tuple[Any, ...], zero1: bool) -> Any:
    """Losses of some steps as MaxText takes them, and the last state."""
    made = lambda: TrainState(Model(128, spec), tx)  # noqa: E731
    graph, shapes = nnx.split(nnx.eval_shape(made))
    shardings = shardings_of(shapes, mesh)
    if zero1:
        shardings["optimizer"] = jax.tree.map(
            lambda x, s: s.replace(add_data(mesh, (), x.get_value(), s.get_value())),
            shapes["optimizer"],
            shardings["optimizer"],
            is_leaf=is_variable,
        )
    raw = jax.tree.map(lambda s: s.get_value(), shardings, is_leaf=is_variable)
    state = jax.jit(lambda: nnx.state(made()), out_shardings=raw)()

    def train_step(state: Any, x: jax.Array) -> Any:
        merged = nnx.merge(graph, state)
        loss, grads = nnx.value_and_grad(lambda m: (m(x) ** 2).mean())(merged.model)
        merged.optimizer.update(merged.model, grads)
        return nnx.state(merged), loss

    jitted = jax.jit(train_step, out_shardings=(raw, None), donate_argnums=0)
    batches = [jax.random.normal(jax.random.key(k), (16, 128)) for k in range(4)]
    step = jitted.lower(state, batches[0]).compile()
    gathered = re.findall(r"= *\(?(\w+)\[[^=]* all-gather", step.as_text())
    # Parameters may be, but no codes and no scales.
    assert not {"s8", "u8", "bf16"} & set(gathered)
    losses = []
    for batch in batches:
        state, loss = step(state, batch)
        losses.append(float(loss))
    return losses, state


SCHEDULE = optax.constant_schedule(1e-2)


@pytest.fixture
def maxtext(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """The recipe, with as many shards as there are devices here."""
    module = ModuleType("maxtext.utils.sharding")
    module.add_data_to_sharding = add_data  # type: ignore[attr-defined]
    for name in ("maxtext", "maxtext.utils"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(maxtext_train, "SHARDS", 8)

    def made(model: Any, **options: Any) -> Any:
        config = SimpleNamespace(**{**vars(CONFIG), **options})
        return maxtext_train.get_optimizer(config, SCHEDULE, model)

    return made


def test_scales_take_the_parameters_spec_on_a_pod() -> None:
    """4096 rows over 256 devices are 16 a shard."""
    pod, spec = AbstractMesh((256,), ("fsdp",), (AxisType.Auto,)), ("fsdp", None, None)
    model = abstract_model(4096, spec, pod)
    tx = maxtext_train.get_optimizer(CONFIG, SCHEDULE, model)
    made = nnx.eval_shape(lambda: TrainState(Model(4096, spec), tx))
    state = shardings_of(nnx.state(made), pod)["optimizer"]["opt_state"]
    for name in ("mu", "nu", "mu_scale", "nu_scale"):
        assert state[name]["kernel"].get_value().spec == P(*spec)
    shapes = nnx.state(made)["optimizer"]["opt_state"]
    assert shapes["mu_scale"]["kernel"].get_value().shape == (256, 2, 128)
    for platform, kernel in KERNELS.items():
        row, _ = optim.explain(tx, model_params(model), None, platform).rows
        assert (row.path, row.backend, row.aligned) == ("kernel", kernel, True)


def model_params(model: Model) -> Any:
    return nnx.state(model, nnx.Param)


@pytest.mark.parametrize("zero1", [False, True])
def test_it_trains_as_on_one_device(maxtext: Callable[..., Any], zero1: bool) -> None:
    spec = (None, None, None) if zero1 else ("fsdp", None, None)
    mesh = auto_mesh(data=8) if zero1 else auto_mesh(fsdp=8)
    model = abstract_model(128, spec, mesh)
    tx = maxtext(model, shard_optimizer_over_data=zero1)
    losses, state = losses_of(tx, mesh, spec, zero1)
    # A code at a boundary may differ, by 1/127 of a step: see `expect_equal`.
    np.testing.assert_allclose(losses, losses_alone(), rtol=1e-5)
    assert losses[-1] < losses[0]
    kernel = state["optimizer"]["opt_state"]["mu_scale"]["kernel"].get_value()
    assert kernel.shape == (16, 2, 128)
    assert kernel.addressable_shards[0].data.shape == (2, 2, 128)
    row, _ = optim.explain(tx, model_params(model), None, "tpu").rows
    assert (row.path, row.backend) == ("kernel", "tpu")


@cache
def losses_alone() -> list[float]:
    """On one device, without the recipe."""
    spec = (None, None, None)
    tx = optim.adamw(SCHEDULE, b2=0.95, weight_decay=decay, min_shards=8)
    losses, _ = losses_of(tx, auto_mesh(fsdp=1), spec, False)
    return losses


def decay(path: str) -> float:
    return 0.0 if "norm" in path else 0.1


def test_zero1_finds_mu(maxtext: Callable[..., Any]) -> None:
    """Its shardings replace those of the parameters at the same paths."""
    mesh, spec = auto_mesh(data=8), (None, None, None)
    tx = maxtext(abstract_model(128, spec, mesh), shard_optimizer_over_data=True)
    state = nnx.state(nnx.eval_shape(lambda: TrainState(Model(128, spec), tx)))
    mu = find_mu(state["optimizer"]["opt_state"])
    found = jax.tree_util.tree_leaves_with_path(mu, is_leaf=is_variable)
    params = nnx.filter_state(state["model"], nnx.Param)
    wanted = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_variable)
    assert [path for path, _ in found] == [path for path, _ in wanted]


def test_checkpoints_are_reshaped_and_back(maxtext: Callable[..., Any]) -> None:
    """On disk `mu` and `nu` are below `params`. No key is an index, as of a chain."""
    mesh, spec = auto_mesh(fsdp=8), ("fsdp", None, None)
    tx = maxtext(abstract_model(128, spec, mesh))
    state = nnx.state(TrainState(Model(128, spec), tx))
    before = nnx.to_pure_dict(state["optimizer"]["opt_state"])
    assert not any(str(key).isdigit() for key in before)
    wrapped = ("mu", "nu")
    disk = {k: {"params": v} if k in wrapped else v for k, v in before.items()}
    after = {k: v["params"] if k in wrapped else v for k, v in disk.items()}
    nnx.replace_by_pure_dict(state["optimizer"]["opt_state"], after)
    jax.tree.map(
        np.testing.assert_array_equal,
        nnx.to_pure_dict(state["optimizer"]["opt_state"]),
        before,
    )


@pytest.mark.parametrize("name", ["adam_eps_root", "skip_step_on_spikes"])
def test_what_the_recipe_does_not_do_is_refused(name: str) -> None:
    config = SimpleNamespace(**{**vars(CONFIG), name: 1})
    with pytest.raises(ValueError, match=name):
        maxtext_train.get_optimizer(config, SCHEDULE)
