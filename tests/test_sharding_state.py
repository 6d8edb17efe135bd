"""A state is sharded like its parameters: by any init, after steps, in Flax."""

from collections.abc import Callable
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from octavo import optim

from meshes import AXES, FEW, given, layer_axes, mesh_of, named, on, stored, values

every_axes = pytest.mark.parametrize("axes", AXES)
# Everything that a state can hold.
KEEPS: dict[str, Any] = {
    "record_norms": True,
    "skip_nonfinite": True,
    "percentile_clipping": 20,
}


def model(axes: str, **options: Any) -> tuple[optim.Transformation, Any, Any]:
    """LAMB, parameters on a mesh of 4 by 2, and their shardings."""
    placed = on(mesh_of("4x2", axes), FEW)
    tx = optim.lamb(
        0.01, state=stored, layer_axes=layer_axes, **options, **given(axes, placed)
    )
    return tx, jax.device_put(values(0, FEW), placed), placed


def expect_state_sharded_like(state: optim.State, placed: Any) -> None:
    """Codes and scales as their parameters, all of whose blocks are whole; else P()."""
    for name, tree in state.trees.items():
        for leaf, sharding in placed.items():
            where = tree[leaf].sharding
            assert where.is_equivalent_to(sharding, tree[leaf].ndim), (name, leaf)
    mesh = next(iter(placed.values())).mesh
    everywhere = NamedSharding(mesh, P())
    for x in jax.tree.leaves((state.count, state.extra)):
        assert x.sharding.is_equivalent_to(everywhere, x.ndim)


def eager(tx: Any, params: Any, placed: Any) -> Any:
    return tx.init(params)


def compiled(tx: Any, params: Any, placed: Any) -> Any:
    shardings = optim.state_sharding(tx, params, placed)
    return jax.jit(tx.init, out_shardings=shardings)(params)


def within_a_mesh(tx: Any, params: Any, placed: Any) -> Any:
    with jax.set_mesh(next(iter(placed.values())).mesh):
        return jax.jit(tx.init)(params)


INITS: dict[str, Callable[..., Any]] = {
    "eager": eager,
    "compiled": compiled,
    "within_a_mesh": within_a_mesh,
}


@pytest.mark.parametrize("init", INITS)
@every_axes
def test_steps_keep_a_state_where_init_put_it(axes: str, init: str) -> None:
    """And are traced once: types and shardings do not change."""
    tx, params, placed = model(axes, **KEEPS)
    state = INITS[init](tx, params, placed)
    expect_state_sharded_like(state, placed)
    chex.clear_trace_counter()
    step = jax.jit(chex.assert_max_traces(lambda p, s: tx.step(p, s, p), n=1))
    for _ in range(3):
        params, state = step(params, state)
        expect_state_sharded_like(state, placed)
        for name, sharding in placed.items():
            assert params[name].sharding.is_equivalent_to(sharding, params[name].ndim)


@every_axes
def test_loops_carry_a_state(axes: str) -> None:
    """A scan, a while loop, and init within jit: one result."""
    tx, params, placed = model(axes)
    state = tx.init(params)

    def step(p: Any, s: Any) -> Any:
        return tx.step(p, s, p)

    def scan(p: Any, s: Any) -> Any:
        return jax.lax.scan(lambda c, _: (step(*c), None), (p, s), length=2)[0]

    def loop(p: Any, s: Any) -> Any:
        return jax.lax.while_loop(lambda c: c[1].count < 2, lambda c: step(*c), (p, s))

    expected = jax.device_get(jax.jit(scan)(params, state))
    for got in (
        jax.jit(loop)(params, state),
        jax.jit(lambda p: scan(p, tx.init(p)))(params),
    ):
        expect_state_sharded_like(got[1], placed)
        chex.assert_trees_all_equal_shapes_and_dtypes(got, expected)
        # In other programs, a multiply-add is contracted or not.
        chex.assert_trees_all_close(got[0], expected[0], rtol=1e-6, atol=1e-6)
        for slot in expected[1].slots:
            codes = (getattr(state, slot) for state in (got[1], expected[1]))
            chex.assert_trees_all_equal(*codes)


@every_axes
def test_an_eager_state_of_a_large_leaf_is_never_on_one_device(axes: str) -> None:
    """Of shapes that need not divide: (24, 768) has 6 blocks for 4 shards of 6 rows."""
    mesh = mesh_of("4x2", axes)
    sharding = NamedSharding(mesh, P("d", "m"))
    p = jax.device_put(jnp.zeros((24, 768)), sharding)
    tx = optim.adam(0.1, **given(axes, sharding))
    state = tx.init(p)
    shardings = optim.state_sharding(tx, p, sharding)
    assert shardings.mu_scale.spec == P(None, "m")
    for x, where in zip(
        jax.tree.leaves(state), jax.tree.leaves(shardings), strict=True
    ):
        assert len(x.sharding.device_set) == 8
        assert x.sharding.is_equivalent_to(where, x.ndim)
    assert state.mu.addressable_shards[0].data.shape == (6, 384)


def test_the_option_says_where_a_state_is() -> None:
    """Not the parameters, which are still on every device, or on one."""
    mesh = mesh_of("4x2", "auto")
    sharding = NamedSharding(mesh, P("d", "m"))
    tx = optim.adam(0.1, sharding=sharding)
    for p in (
        jnp.zeros((128, 64)),
        jax.device_put(jnp.zeros((128, 64)), NamedSharding(mesh, P())),
    ):
        assert tx.init(p).mu.sharding.is_equivalent_to(sharding, 2)


@every_axes
@pytest.mark.parametrize("placed", [True, False], ids=["placed", "on one device"])
def test_partition_specs_within_a_mesh(axes: str, placed: bool) -> None:
    mesh, spec = mesh_of("4x2", axes), P("d", "m")
    sharding = NamedSharding(mesh, spec)
    p = jnp.ones((128, 64))
    p = jax.device_put(p, sharding) if placed else p
    tx = optim.lamb(0.1, sharding=spec)
    with jax.set_mesh(mesh):
        state = tx.init(p)
        assert optim.state_sharding(tx, p, spec).mu.spec == spec
        p = jax.device_put(p, sharding)
        p, state = jax.jit(tx.step)(p, state, p)
    assert p.sharding.is_equivalent_to(sharding, 2)
    assert state.mu.sharding.is_equivalent_to(sharding, 2)


@pytest.mark.parametrize("types", ["Explicit Auto", "Auto Explicit"])
def test_meshes_with_axes_of_both_types(types: str) -> None:
    mesh = jax.make_mesh(
        (4, 2), ("d", "m"), axis_types=tuple(AxisType[t] for t in types.split())
    )
    sharding = NamedSharding(mesh, P("d", "m"))
    p = jax.device_put(jnp.ones((128, 64)), sharding)
    tx = optim.lamb(0.1, sharding=sharding)
    shardings = optim.state_sharding(tx, p, sharding)
    state = jax.jit(tx.init, out_shardings=shardings)(p)
    p, state = jax.jit(tx.step)(p, state, p)
    assert p.sharding.is_equivalent_to(sharding, 2)
    assert state.mu.sharding.is_equivalent_to(sharding, 2)


def wrapped(tx: Any) -> dict[str, Any]:
    """Transformations that contain one, and other state of each parameter."""
    return {
        "chain": optax.chain(optax.clip_by_global_norm(1.0), tx, optax.trace(0.9)),
        "named_chain": optax.named_chain(("octavo", tx), ("ema", optax.ema(0.9))),
        "multi_steps": optax.MultiSteps(tx, 2).gradient_transformation(),
        "apply_if_finite": optax.apply_if_finite(tx, 3),
    }


@pytest.mark.parametrize("wrapper", list(wrapped(optax.identity())))
@every_axes
def test_state_sharding_of_wrapped_optimizers(axes: str, wrapper: str) -> None:
    """From shapes alone: whatever has a parameter's path is sharded like it."""
    tx, params, placed = model(axes)
    tx = wrapped(tx)[wrapper]
    shapes = jax.eval_shape(lambda: values(0, FEW))
    shardings = optim.state_sharding(tx, shapes, placed)
    trees = 0
    for name, sharding in named(shardings).items():
        leaf = next((leaf for leaf in placed if name.endswith(f"/{leaf}")), None)
        expected = placed[leaf] if leaf else NamedSharding(sharding.mesh, P())
        rank = len(shapes[leaf].shape) if leaf else 0
        assert sharding.is_equivalent_to(expected, rank), name
        trees += leaf == "both"
    assert trees == 4 + (wrapper != "apply_if_finite")  # codes and scales, and another
    state = jax.jit(tx.init, out_shardings=shardings)(params)
    chex.assert_trees_all_equal_structs(state, shardings)


def test_state_sharding_of_a_prefix() -> None:
    mesh = mesh_of("4x2", "auto")
    shapes = {
        "decoder": {"up": jax.ShapeDtypeStruct((64, 128), jnp.float32)},
        "head": jax.ShapeDtypeStruct((128, 96), jnp.float32),
    }
    rows, columns = (NamedSharding(mesh, P(*axes)) for axes in (("d",), (None, "m")))
    tx = optim.adamw(0.1)
    everywhere = optim.state_sharding(tx, shapes, rows)
    assert everywhere.mu["decoder"]["up"] == NamedSharding(mesh, P("d", None))
    found = optim.state_sharding(tx, shapes, {"decoder": rows, "head": columns})
    assert found.nu["decoder"]["up"].spec == P("d", None)
    assert found.nu_scale["head"].spec == P(None, "m")
    assert found.count.spec == P()
    states = [
        optim.adamw(0.1, sharding=option).init(
            jax.tree.map(lambda x: jnp.zeros(x.shape), shapes)
        )
        for option in (rows, {"decoder": rows, "head": columns})
    ]
    for state, shardings in zip(states, (everywhere, found), strict=True):
        for x, y in zip(
            jax.tree.leaves((state.mu, state.nu)),
            jax.tree.leaves((shardings.mu, shardings.nu)),
            strict=True,
        ):
            assert x.sharding.is_equivalent_to(y, x.ndim)


def loss(params: Any) -> jax.Array:
    """Elementwise, so that it needs no shardings of its own under explicit axes."""
    return sum((jnp.sum(jnp.square(x)) for x in jax.tree.leaves(params)), jnp.zeros(()))


class Linen(nn.Module):
    """With names of mesh axes on its kernels."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        init = nn.initializers.lecun_normal()
        up = nn.with_partitioning(init, ("d", "m"))
        down = nn.with_partitioning(init, ("m", "d"))
        x = nn.relu(nn.Dense(128, kernel_init=up)(x))
        return nn.Dense(64, kernel_init=down)(x)


@every_axes
def test_linen_train_state_with_partitioned_parameters(axes: str) -> None:
    mesh, linen = mesh_of("4x2", axes), Linen()

    def params(key: Any) -> Any:
        return linen.init(key, jnp.ones((2, 64)))["params"]

    key = jax.random.key(0)
    placed = nn.get_sharding(jax.eval_shape(params, key), mesh)
    tx = optim.lamb(0.01, weight_decay=0.1, **given(axes, placed))

    def create(key: Any) -> optim.TrainState:
        return optim.TrainState.create(apply_fn=linen.apply, params=params(key), tx=tx)

    shardings = nn.get_sharding(jax.eval_shape(create, key), mesh)
    state = jax.jit(create, out_shardings=shardings)(key)
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def train(state: Any) -> Any:
        value, grads = jax.value_and_grad(loss)(state.params)
        return state.apply_gradients(grads=grads), value

    losses = []
    for _ in range(3):
        state, value = train(state)
        losses.append(float(value))
    assert losses[2] < losses[1] < losses[0]
    opt_state = nn.unbox(state.opt_state)
    for tree in (nn.unbox(state.params), *opt_state.trees.values()):
        for layer, spec in (("Dense_0", P("d", "m")), ("Dense_1", P("m", "d"))):
            kernel = tree[layer]["kernel"]
            assert kernel.sharding.is_equivalent_to(NamedSharding(mesh, spec), 2)
    assert opt_state.mu["Dense_0"]["kernel"].dtype == jnp.int8


@every_axes
def test_nnx_optimizer_with_partitioned_parameters(axes: str) -> None:
    mesh = mesh_of("4x2", axes)
    init = nnx.initializers.lecun_normal()
    with jax.set_mesh(mesh):
        linear = nnx.Linear(
            128,
            64,
            kernel_init=nnx.with_partitioning(init, ("d", "m")),
            rngs=nnx.Rngs(0),
        )
        params = nnx.as_pure(nnx.state(linear, nnx.Param))
        placed = jax.tree.map(lambda p: p.sharding, params)
        tx = optim.lamb(0.01, weight_decay=0.1, **given(axes, placed))
        optimizer = nnx.Optimizer(linear, tx, wrt=nnx.Param)

        @nnx.jit
        def train(linear: Any, optimizer: Any) -> Any:
            value, grads = nnx.value_and_grad(
                lambda m: loss(nnx.as_pure(nnx.state(m, nnx.Param)))
            )(linear)
            optimizer.update(linear, grads)
            return value

        losses = [float(train(linear, optimizer)) for _ in range(3)]
    assert losses[2] < losses[1] < losses[0]
    state = nnx.as_pure(nnx.state(optimizer))["opt_state"]
    sharding = NamedSharding(mesh, P("d", "m"))
    for name in ("mu", "nu", "mu_scale", "nu_scale"):
        assert state[name]["kernel"].sharding.is_equivalent_to(sharding, 2)
    assert state["mu"]["kernel"].dtype == jnp.int8
