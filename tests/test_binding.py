"""`tx.bind` finds how parameters are sharded in whatever form they are."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from octavo import optim

from meshes import mesh_of

MESH = mesh_of("4x2", "auto")
SPECS = {"dense/kernel": P("d", "m"), "dense/bias": P()}
RULES = [("in", "d"), ("out", "m")]


class Model(nnx.Module):
    """One matrix with metadata, one vector without."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        init = nnx.with_partitioning(nnx.initializers.ones_init(), ("d", "m"))
        self.dense = nnx.Linear(512, 256, kernel_init=init, rngs=rngs)


class Linen(nn.Module):
    """Likewise, with the names of mesh axes or with logical ones."""

    logical: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        ones = nn.initializers.ones_init()
        init = nn.with_partitioning(ones, ("d", "m"))
        if self.logical:
            init = nn.with_logical_partitioning(ones, ("in", "out"))
        return nn.Dense(256, kernel_init=init, name="dense")(x)


def arrays() -> Any:
    shardings = {path: NamedSharding(MESH, spec) for path, spec in SPECS.items()}
    where = {"dense": {k.partition("/")[2]: s for k, s in shardings.items()}}
    return jax.device_put(
        {"dense": {"kernel": jnp.ones((512, 256)), "bias": jnp.ones(256)}}, where
    )


def linen(logical: bool) -> Any:
    x = jax.ShapeDtypeStruct((1, 512), jnp.float32)
    return jax.eval_shape(Linen(logical).init, jax.random.key(0), x)["params"]


FORMS: dict[str, Callable[[], Any]] = {
    "arrays": arrays,
    "shapes": lambda: jax.tree.map(
        lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=p.sharding), arrays()
    ),
    "shardings": lambda: jax.tree.map(lambda p: p.sharding, arrays()),
    "specs": lambda: jax.tree.map(lambda p: p.sharding.spec, arrays()),
    "module": lambda: Model(nnx.Rngs(0)),
    "state": lambda: nnx.state(Model(nnx.Rngs(0)), nnx.Param),
    "pure": lambda: nnx.as_pure(nnx.state(Model(nnx.Rngs(0)), nnx.Param)),
    "abstract module": lambda: nnx.eval_shape(lambda: Model(nnx.Rngs(0))),
    "linen": lambda: linen(False),
    "logical linen": lambda: linen(True),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_says_the_same(form: str) -> None:
    with jax.set_mesh(MESH), nn.logical_axis_rules(RULES):
        tx = optim.adamw(1e-3).bind(FORMS[form]())
    rows = optim.explain(tx, arrays(), platform="gpu").rows
    assert {row.path: row.spec for row in rows} == SPECS
    kernel = next(row for row in rows if row.path == "dense/kernel")
    assert kernel.backend == "triton"


def test_paths_are_those_of_unboxed_parameters() -> None:
    """nnx gives `init` its variables, and `update` arrays: options mean the same."""
    seen: set[str] = set()

    def stored(path: str) -> str:
        seen.add(path)
        return "8bit"

    with jax.set_mesh(MESH):
        model = Model(nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, optim.adamw(1e-3, state=stored), wrt=nnx.Param)
        optimizer.update(model, nnx.state(model, nnx.Param))
    assert seen == set(SPECS)


def test_what_says_nothing_is_refused() -> None:
    tx = optim.adamw(1e-3)
    with pytest.raises(ValueError, match="none of the parameters says how"):
        tx.bind({"w": jax.ShapeDtypeStruct((512, 256), jnp.float32)})


def test_parameters_on_one_of_several_devices_get_a_kernel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    p = jax.device_put({"w": jnp.ones((512, 256))}, jax.devices()[3])
    tx = optim.adamw(1e-3).bind(p)
    q, _ = tx.step(p, tx.init(p), p)
    assert q["w"].devices() == {jax.devices()[3]}
    apart = {"w": p["w"], "v": jnp.ones(3)}
    assert optim.adamw(1e-3).bind(apart).init(apart).mu["v"].devices() == {
        jax.devices()[0]
    }
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    (row,) = optim.explain(tx, p).rows
    assert row.backend == "tpu"


def test_other_parameters_than_those_it_is_bound_to_are_named() -> None:
    tx = optim.adamw(1e-3).bind(arrays())
    with pytest.raises(ValueError, match="'other' was not among the parameters"):
        tx.init({"other": jnp.ones((512, 256))})


def test_sharding_may_be_a_function_of_the_path() -> None:
    def where(path: str) -> NamedSharding:
        return NamedSharding(MESH, SPECS[path])

    tx = optim.adamw(1e-3, sharding=where)
    assert tx.init(arrays()).mu["dense"]["kernel"].sharding.spec == P("d", "m")
    shardings = optim.state_sharding(tx, arrays())
    assert shardings.mu["dense"]["kernel"].spec == P("d", "m")
    bad = optim.adamw(1e-3, sharding=lambda path: 3)
    with pytest.raises(ValueError, match=r"sharding for 'dense/.*' is 3"):
        bad.init(arrays())


def test_the_warning_names_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """On several devices whose platform has kernels, without a word on shardings."""
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    chain = optax.chain(optax.identity(), optim.adamw(1e-3, seed=12))
    p = {"w": jnp.ones((512, 256))}
    with pytest.warns(UserWarning, match=r"Write tx = tx\.bind\(params\)"):
        jax.eval_shape(chain.update, p, chain.init(p), p)
