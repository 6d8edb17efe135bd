"""Levanter's contract: states of NamedArrays, and the recipe in it.

Read in Levanter 9263f81 (26 September 2025) and haliax 1.3: `take_train_step` and
`TrainerState.init`, `tree_deserialize_leaves_tensorstore`, and `named_jit` with
`infer_resource_partitions`: names say how an array is sharded, and one without names
is replicated.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import levanter_config
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from octavo import optim
from octavo.optim.integrations.levanter import named

from contracts import Binds, auto_mesh, expect_equal

_MAPPING: list[dict[str, str]] = []


@dataclass(frozen=True)
class Axis:
    name: str
    size: int


@jax.tree_util.register_pytree_with_keys_class
class NamedArray:
    """Sizes of axes are checked where one is made, and not where a tree is."""

    def __init__(self, array: Any, axes: tuple[Axis, ...], check: bool = True) -> None:
        sizes = tuple(axis.size for axis in axes)
        if check and hasattr(array, "shape") and array.shape != sizes:
            raise ValueError(f"shape {array.shape} is not that of {axes}")
        self.array, self.axes = array, axes

    def tree_flatten_with_keys(self) -> Any:
        return ((jax.tree_util.GetAttrKey("array"), self.array),), self.axes

    @classmethod
    def tree_unflatten(cls, axes: tuple[Axis, ...], children: Any) -> "NamedArray":
        return cls(children[0], axes, check=False)


def is_named(x: Any) -> bool:
    return isinstance(x, NamedArray)


def sharding_for_axis(axes: tuple[Axis, ...], mapping: Any = None) -> NamedSharding:
    spec = P(*((mapping or {}).get(axis.name) for axis in axes))
    return NamedSharding(auto_mesh(data=8), spec)


@contextmanager
def axis_mapping(mapping: dict[str, str]) -> Iterator[None]:
    _MAPPING.append(mapping)
    yield
    _MAPPING.pop()


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """The names of haliax that the adapter imports."""
    haliax: Any = ModuleType("haliax")
    haliax.NamedArray = NamedArray
    haliax.partitioning = SimpleNamespace(
        current_thread_local_mapping=lambda: _MAPPING[-1] if _MAPPING else None,
        sharding_for_axis=sharding_for_axis,
    )
    monkeypatch.setitem(sys.modules, "haliax", haliax)
    monkeypatch.setattr(levanter_config, "SHARDS", 8)


def placed(tree: Any) -> Any:
    """`infer_resource_partitions`: by names; what has none is replicated."""

    def of(x: Any) -> Any:
        axes = x.axes if is_named(x) else ()
        return sharding_for_axis(axes, _MAPPING[-1])

    return jax.tree.map(of, tree, is_leaf=is_named)


def restored(saved: Any, like: Any) -> Any:
    """Arrays into the names of a state that was made for them."""

    def of(like: Any, x: Any) -> Any:
        return NamedArray(x.array, like.axes) if is_named(like) else x

    return jax.tree.map(of, like, saved, is_leaf=is_named)


EMBED, MLP = Axis("embed", 128), Axis("mlp", 64)  # 16 rows of "embed" a shard
FSDP = {"embed": "data"}
CONFIG = SimpleNamespace(
    beta1=0.9, beta2=0.95, epsilon=1e-8, weight_decay=0.1, max_grad_norm=1.0
)


def mask(model: Any) -> Any:
    """As Levanter's: a tree of bools, from names."""
    named = jax.tree_util.tree_map_with_path(lambda path, _: str(path), model)
    return jax.tree.map(lambda path: "norm" not in path, named)


def made_model() -> dict[str, Any]:
    weight = jax.random.normal(jax.random.key(0), (128, 64))
    norm, steps = jnp.ones(128), None  # None: filtered out, not trained
    return {
        "weight": NamedArray(weight, (EMBED, MLP)),
        "norm": NamedArray(norm, (EMBED,)),
        "steps": steps,
    }


def made_tx(learning_rate: Any = 1e-2) -> Any:
    def made(learning_rate: Any) -> Any:
        return levanter_config.octavo_adamw(learning_rate, CONFIG, mask)

    return optax.inject_hyperparams(made)(learning_rate=learning_rate)


def trained(tx: Any) -> tuple[Any, Any]:
    """Model and state, as the trainer makes and steps them."""
    with axis_mapping(FSDP):
        model = made_model()
        where = placed(model), placed(jax.eval_shape(tx.init, model))
        model = jax.device_put(model, where[0])
        state = jax.jit(tx.init, out_shardings=where[1])(model)

        def step(model: Any, state: Any, k: jax.Array) -> Any:
            grads = jax.tree.map(lambda p: jnp.cos(p + k), model)
            updates, state = tx.update(
                grads, state, params=model, obj_fn=None, loss=jnp.float32(1.0)
            )
            return jax.tree.map(jnp.add, model, updates), state

        jitted = jax.jit(step, out_shardings=where, donate_argnums=(0, 1))
        for k in range(3):
            model, state = jitted(model, state, jnp.float32(k))
    return model, state


def test_it_trains_as_octavo_alone_and_its_state_is_restored() -> None:
    tx = made_tx()
    model, state = trained(tx)
    expect_sharded(state.inner_state)
    again = restored(state, jax.eval_shape(tx.init, made_model()))
    jax.tree.map(np.testing.assert_array_equal, state, again)
    assert jax.tree.structure(state) == jax.tree.structure(again)
    expect_equal(arrays(model), alone(), rate=1e-2)


def expect_sharded(state: Any) -> None:
    """Codes and scales, by the names of their axes."""
    for tree in (state.mu, state.nu, state.mu_scale, state.nu_scale):
        named = tree["weight"]
        assert named.array.shape == tuple(axis.size for axis in named.axes)
        assert [axis.name for axis in named.axes] == ["embed", "mlp"]
        assert named.array.sharding.spec == P("data", None)


def arrays(tree: Any) -> Any:
    """Without names."""
    return jax.tree.map(lambda x: x.array, tree, is_leaf=is_named)


def alone() -> Any:
    """The same with Octavo on one device."""
    plain = arrays(made_model())
    tx = optim.adamw(
        1e-2, b2=0.95, weight_decay=0.1, mask=mask, grad_clip_norm=1.0, min_shards=8
    )
    state = tx.init(plain)
    for k in range(3):
        grads = jax.tree.map(lambda p: jnp.cos(p + k), plain)  # noqa: B023
        plain, state = jax.jit(tx.step)(grads, state, plain)
    return plain


def test_muons_states_have_names_too() -> None:
    tx = named(optim.muon(1e-2, min_shards=8))
    model, state = trained(tx)
    mu = state.muon.mu["weight"]
    assert [axis.name for axis in mu.axes] == ["embed", "mlp"]
    assert isinstance(state.adam.mu["weight"], optax.MaskedNode)
    again = restored(state, jax.eval_shape(tx.init, made_model()))
    jax.tree.map(np.testing.assert_array_equal, state, again)
    own, plain = optim.muon(1e-2, min_shards=8), arrays(made_model())
    alone = own.init(plain)
    for k in range(3):
        grads = jax.tree.map(lambda p: jnp.cos(p + k), plain)  # noqa: B023
        plain, alone = jax.jit(own.step)(grads, alone, plain)
    expect_equal(arrays(model), plain, rate=1e-2)


def test_without_the_adapter_it_is_not() -> None:
    """What the adapter is for: scales under the names of their parameter's axes."""
    state = optim.adamw(1e-2).init(made_model())
    with pytest.raises(ValueError, match="is not that of"):
        restored(state, state)


def test_it_gets_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    binds = Binds(monkeypatch)
    with axis_mapping(FSDP):
        jax.eval_shape(made_tx().init, made_model())
    binds.expect_kernels(arrays(made_model()), "weight", P("data", None))
