"""AXLearn's contract: what it asks of an optimizer, and the recipe in it.

Read in AXLearn 34aed43 (8 July 2026): `optimizer_base.py`, `ParameterSpec` and
`TensorSpec`, `chain`, `Learner._get_optimizer_model_params` and
`WrappedPartitionedGradientTransformation`, and `SpmdTrainer`, which asks for the specs
of the state first, and gives their shardings to jit.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import axlearn_learner
import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from octavo import optim
from octavo.optim.integrations import axlearn

from contracts import Binds, auto_mesh, expect_equal

MESH: Any = None


@dataclass
class TensorSpec:
    """No pytree: a leaf. Its sharding is on the trainer's mesh."""

    shape: tuple[int, ...]
    dtype: Any = None
    mesh_axes: Any = None
    memory_kind: str | None = None
    weight_decay_scale: float | None = None  # of a parameter's spec

    @property
    def sharding(self) -> NamedSharding:
        spec = P() if self.mesh_axes is None else self.mesh_axes
        return NamedSharding(MESH, spec, memory_kind=self.memory_kind)


@dataclass
class OptParam:
    """A parameter, and what its spec says of its decay."""

    value: Any
    weight_decay_scale: float | None = None


class PartitionedGradientTransformation(NamedTuple):
    """Three functions; the learner checks that it is of this class."""

    init: Any
    update: Any
    partition: Any


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """The names that the adapter imports, and a mesh with automatic axes."""
    module: Any = ModuleType("axlearn.common.optimizer_base")
    module.PartitionedGradientTransformation = PartitionedGradientTransformation
    module.OptStateSpec = TensorSpec
    for name in ("axlearn", "axlearn.common"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(globals(), "MESH", auto_mesh(fsdp=8))
    monkeypatch.setattr(axlearn_learner, "SHARDS", 8)


# 16 rows a shard; a scale without decay; and what the learner does not update.
SPECS = {
    "linear": TensorSpec((128, 64), jnp.float32, P("fsdp", None)),
    "norm": TensorSpec((64,), jnp.float32, None, weight_decay_scale=0.0),
    "frozen": None,
}


def parameters() -> dict[str, Any]:
    linear = jax.random.normal(jax.random.key(0), (128, 64))
    return {"linear": linear, "norm": jnp.ones(64), "frozen": None}


def opt_params(values: Any) -> Any:
    def of(value: Any, spec: TensorSpec) -> OptParam:
        return OptParam(value, spec.weight_decay_scale)

    return jax.tree.map(of, values, SPECS)


def chain(*txs: PartitionedGradientTransformation) -> PartitionedGradientTransformation:
    """As AXLearn's: the specs of the state are a tuple, too."""
    inner = optax.chain(*(optax.GradientTransformation(t.init, t.update) for t in txs))
    return PartitionedGradientTransformation(
        inner.init, inner.update, lambda specs: tuple(t.partition(specs) for t in txs)
    )


def negated() -> PartitionedGradientTransformation:
    """A transformation of AXLearn's, without a state."""
    base = optax.scale(-1.0)
    return PartitionedGradientTransformation(
        base.init,
        lambda updates, state, params: base.update(updates, state),
        lambda specs: base.init(None),
    )


def trained(tx: PartitionedGradientTransformation) -> Any:
    """Specs, state and parameters, as the trainer makes them."""
    specs = tx.partition(SPECS)
    where = jax.tree.map(lambda s: s.sharding, specs)
    places = jax.tree.map(lambda s: s.sharding, SPECS)
    params = jax.device_put(parameters(), places)
    init = jax.jit(lambda p: tx.init(opt_params(p)), out_shardings=where)
    state = init(params)

    def step(params: Any, state: Any, k: jax.Array) -> Any:
        grads = jax.tree.map(lambda p: jnp.cos(p + k), params)
        updates, state = tx.update(grads, state=state, params=opt_params(params))
        return optax.apply_updates(params, updates), state

    jitted = jax.jit(step, out_shardings=(places, where), donate_argnums=(0, 1))
    for k in range(3):
        params, state = jitted(params, state, jnp.float32(k))
    return specs, state, params


def expected() -> Any:
    """The same with Octavo alone on one device."""
    decay = lambda path: 0.1 if path == "linear" else 0.0  # noqa: E731
    tx = optim.adamw(rate, b2=0.95, weight_decay=decay, min_shards=8)
    params = parameters()
    state = tx.init(params)
    for k in range(3):
        grads = jax.tree.map(lambda p: jnp.cos(p + k), params)  # noqa: B023
        updates, state = jax.jit(tx.update)(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params


def rate(count: jax.Array) -> jax.Array:
    return 1e-2 / (count + 1).astype(float)


def test_it_trains_and_its_state_is_as_its_specs_say() -> None:
    schedule = lambda step: 1e-2 / step.astype(float)  # noqa: E731
    tx = axlearn_learner.octavo_adamw(schedule, weight_decay=0.1)
    assert isinstance(tx, PartitionedGradientTransformation)
    specs, state, params = trained(tx)
    jax.tree.map(expect_spec, specs, state)
    for tree in (specs.mu, specs.nu, specs.mu_scale, specs.nu_scale):
        assert tree["linear"].mesh_axes == P("fsdp", None)
    assert state.mu_scale["linear"].shape == (16, 64)
    expect_equal(params, expected(), rate=1e-2)


def test_muon_is_partitioned_too() -> None:
    tx = optim.muon(1e-2, weight_decay=0.1, adam_weight_decay=0.1, min_shards=8)
    specs, state, params = trained(axlearn.partitioned(tx))
    jax.tree.map(expect_spec, specs, state)
    assert specs.muon.mu["linear"].mesh_axes == P("fsdp", None)
    assert isinstance(specs.adam.mu["linear"], optax.MaskedNode)
    alone, want = optim.muon(1e-2, weight_decay=0.1, min_shards=8), parameters()
    own = alone.init(want)
    for k in range(3):
        grads = jax.tree.map(lambda p: jnp.cos(p + k), want)  # noqa: B023
        updates, own = jax.jit(alone.update)(grads, own, want)
        want = optax.apply_updates(want, updates)
    expect_equal(params, want, rate=1e-2)


def expect_shape(spec: TensorSpec, array: Any) -> None:
    assert (spec.shape, spec.dtype) == (array.shape, array.dtype)


def expect_spec(spec: TensorSpec, array: jax.Array) -> None:
    expect_shape(spec, array)
    assert array.sharding.is_equivalent_to(spec.sharding, array.ndim)


def test_it_is_a_link_of_a_chain() -> None:
    tx = chain(negated(), axlearn_learner.octavo_adamw(1e-2))
    specs = tx.partition(SPECS)
    params = opt_params(parameters())
    state = jax.eval_shape(lambda: tx.init(params))
    jax.tree.map(expect_shape, specs, state)
    updates, after = jax.eval_shape(lambda s: tx.update(parameters(), s, params), state)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert jax.tree.structure(updates) == jax.tree.structure(parameters())


def test_scales_that_do_not_divide_are_replicated() -> None:
    """4 blocks of 32 rows over 8 devices, where `min_shards` is left out."""
    tx = axlearn.partitioned(optim.adamw(1e-3))
    specs = tx.partition({"w": TensorSpec((128, 8192), None, P("fsdp"), "device")})
    assert specs.mu_scale["w"].shape == (4, 8192)
    assert specs.mu["w"].mesh_axes == P("fsdp", None)
    assert specs.mu_scale["w"].mesh_axes == P(None, None)
    assert (specs.mu["w"].memory_kind, specs.count.memory_kind) == ("device", None)


def test_it_gets_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once `partition` was called: the trainer does that first."""
    binds = Binds(monkeypatch)
    axlearn_learner.octavo_adamw(1e-3).partition(SPECS)
    binds.expect_kernels(parameters(), "linear", P("fsdp", None))


@pytest.mark.parametrize("wrong", [optax.adam, optax.sgd])
def test_other_transformations_are_refused(wrong: Callable[..., Any]) -> None:
    with pytest.raises(TypeError, match="chain"):
        axlearn.partitioned(wrong(0.1))
