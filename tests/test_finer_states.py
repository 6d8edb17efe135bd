"""ZeRO-1: parameters on every device, each of which steps its part of them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from _compiled import collectives
from _topologies import devices_of
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from octavo import optim
from octavo.optim.sharding.finer import finer

from aot import sharding as device_of
from meshes import AXES, abstract, mesh_of

SHAPES = {"up": (512, 256), "down": (256, 512), "norm": (512,), "odd": (7, 96)}
# Replicated over "d"; one is partitioned over "m", too.
SPECS = {"up": P(None, "m"), "down": P(), "norm": P(), "odd": P()}
STATES = {"up": P("d", "m"), "down": P(None, "d"), "norm": P("d"), "odd": P(None, "d")}
every_axes = pytest.mark.parametrize("axes", AXES)


def tree(seed: int) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    return {k: jnp.asarray(rng.normal(size=s), "float32") for k, s in SHAPES.items()}


def placed(axes: str) -> tuple[Any, dict[str, Any]]:
    mesh = mesh_of("4x2", axes)
    shardings = {name: NamedSharding(mesh, spec) for name, spec in SPECS.items()}
    return mesh, jax.device_put(tree(0), shardings)


def expect_specs(found: Any, specs: dict[str, P]) -> None:
    for name, x in found.items():
        where = NamedSharding(x.sharding.mesh, specs[name])
        assert x.sharding.is_equivalent_to(where, x.ndim), (name, x.sharding)


@pytest.mark.parametrize(
    ("make", "axes"),
    [(optim.adamw, "explicit"), (optim.lamb, "auto")],
    ids=["adamw", "lamb"],
)
def test_it_is_the_same_training_with_the_state_in_parts(make: Any, axes: str) -> None:
    mesh, params = placed(axes)
    tx = make(0.01, state_sharding="d").bind(params)
    plain = make(0.01)
    whole, plain_step = plain.init(tree(0)), jax.jit(plain.step)
    with jax.set_mesh(mesh):
        state = jax.jit(tx.init)(params)
        step = jax.jit(tx.step)
        update = jax.jit(tx.update)
        expected = tree(0)
        for seed in (1, 2):
            grads = jax.device_put(
                tree(seed), jax.tree.map(lambda p: p.sharding, params)
            )
            updates, _ = update(grads, state, params)
            expect_specs(updates, SPECS)
            params, state = step(params=params, state=state, grads=grads)
            expected, whole = plain_step(tree(seed), whole, expected)
    expect_specs(params, SPECS)
    expect_specs(state.mu, STATES)
    expect_specs(state.nu_scale, STATES | {"odd": P(None, "d")})
    assert state.count.sharding.is_fully_replicated
    for name, p in params.items():
        unit = np.spacing(np.abs(expected[name]).max())
        tolerance = 4 * unit if make is optim.lamb else unit  # its norms are sums
        assert np.abs(jax.device_get(p) - expected[name]).max() <= tolerance


@every_axes
def test_it_gathers_new_parameters_and_nothing_else(axes: str) -> None:
    mesh, params = placed(axes)
    tx = optim.adamw(0.01, state_sharding="d").bind(params)
    with jax.set_mesh(mesh):
        state = jax.jit(tx.init)(params)
        step = jax.jit(lambda p, s, g: tx.step(g, s, p), donate_argnums=(0, 1))
        compiled = step.lower(params, state, params).compile()
        found = collectives(compiled.as_text())
    # XLA gathers each array on its own on a CPU; other devices gather several at once.
    assert found == {"all-gather": len(SHAPES)}


def unreduced_step(tx: optim.Transformation, mesh: Any) -> Any:
    """A step on the gradient of a batch that is sharded, not yet added up over "d"."""
    unreduced = NamedSharding(mesh, P(unreduced={"d"}))

    def step(params: Any, state: Any, a: jax.Array, b: jax.Array) -> Any:
        g = jnp.einsum("bi,bj->ij", a, b, out_sharding=unreduced)
        return tx.step({"up": g}, state, params)

    return step


def test_unreduced_gradients_are_added_up() -> None:
    """Under explicit axes, whose types say that a sum over "d" is still to do."""
    mesh = mesh_of("8 rows", "explicit")
    tx = optim.adamw(0.01, state_sharding="d")
    p = {"up": jnp.ones(SHAPES["up"])}
    with jax.set_mesh(mesh):
        params = jax.device_put(p, NamedSharding(mesh, P()))
        rows = (jnp.ones((64, n)) for n in SHAPES["up"])
        rows = jax.device_put(tuple(rows), NamedSharding(mesh, P("d")))
        step = jax.jit(unreduced_step(tx, mesh))
        new, _ = step(params, tx.init(params), *rows)
    plain = optim.adamw(0.01)
    expected, _ = plain.step({"up": jnp.full(SHAPES["up"], 64.0)}, plain.init(p), p)
    np.testing.assert_allclose(jax.device_get(new["up"]), expected["up"], rtol=1e-6)


def test_unreduced_gradients_are_reduced_and_scattered_at_once() -> None:
    """As GPUs do it; a CPU has no reduce-scatter, and a TPU hides it in a fusion."""
    device_of("sm_90")  # skips where there is no compiler
    mesh = Mesh(devices_of("h200:1x8"), ("d",), axis_types=(AxisType.Explicit,))
    tx, whole = optim.adamw(0.01, state_sharding="d"), NamedSharding(mesh, P())
    p = {"up": jax.ShapeDtypeStruct(SHAPES["up"], jnp.float32)}
    state = jax.eval_shape(tx.init, p)
    where = optim.state_sharding(tx, p, whole)
    shapes = [jax.ShapeDtypeStruct((64, n), jnp.float32) for n in SHAPES["up"]]
    params, state = abstract(p, {"up": whole}), abstract(state, where)
    rows = abstract(shapes, [NamedSharding(mesh, P("d"))] * 2)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        traced = jax.jit(unreduced_step(tx, mesh.abstract_mesh)).trace(
            params, state, *rows
        )
        compiled = traced.lower(lowering_platforms=("cuda",)).compile()
    found = collectives(compiled.as_text())
    assert found == {"reduce-scatter": 1, "all-gather": 1}


@pytest.mark.parametrize(
    ("shape", "spec", "axes", "expected"),
    [
        ((4096, 64), P(), ("d",), P("d", None)),
        ((4096, 64), P("m"), ("d",), P(("m", "d"), None)),
        ((4096, 64), P("d"), ("d",), P("d")),  # it is partitioned so already
        ((4096, 64), P("m"), ("d", "m"), P(("m", "d"), None)),
        ((6, 64), P(), ("d",), P(None, "d")),
        ((6, 6), P(), ("d",), P()),  # no axis divides
        ((), P(), ("d",), P()),
    ],
    ids=str,
)
def test_the_axis_that_is_partitioned_further(
    shape: tuple[int, ...], spec: P, axes: tuple[str, ...], expected: P
) -> None:
    mesh = AbstractMesh((4, 2), ("d", "m"), axis_types=(AxisType.Auto,) * 2)
    assert finer(NamedSharding(mesh, spec), shape, axes).spec == expected


def test_reports_know_it() -> None:
    mesh, params = placed("auto")
    tx = optim.adamw(0.01, state_sharding="d").bind(params)
    shardings = optim.state_sharding(tx, params)
    assert shardings.mu["up"].spec == STATES["up"]
    row = next(
        row
        for row in optim.explain(tx, params, platform="gpu").rows
        if row.path == "up"
    )
    assert (row.spec, row.state_spec, row.backend) == (
        SPECS["up"],
        STATES["up"],
        "triton",
    )
    assert "spec of state" in str(optim.explain(tx, params))
    shown = {"up": NamedSharding(mesh, P("d")), "down": NamedSharding(mesh, P("m"))}
    both = {name: NamedSharding(mesh, P()) for name in shown}
    tx = optim.adamw(0.01, sharding=both, state_sharding=shown)
    assert tx.init({k: params[k] for k in shown}).mu["up"].sharding.spec == P("d", None)


def test_what_cannot_be_is_named() -> None:
    _, params = placed("auto")
    with pytest.raises(ValueError, match="state_sharding='x' is no axis of the mesh"):
        optim.adamw(0.01, state_sharding="x").bind(params).init(params)
    with pytest.raises(ValueError, match="state_sharding is 3, not NamedShardings"):
        optim.adamw(0.01, state_sharding=3).bind(params).init(params)
