"""big_vision's contract: its chain, its rule by bytes, and the recipe in it.

Read in big_vision 0127fb6 (19 May 2025): `train.py` (shapes first, then the optimizer,
then shardings), `optax.py:make` and `sharding.py:infer_sharding` with its rule `fsdp`.
"""

import operator
import re
import sys
from types import ModuleType
from typing import Any

import big_vision_config
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from octavo import optim

from contracts import Binds, auto_mesh

LIMIT = 2**14  # bytes, where theirs is 4 MiB
STRATEGY = "fsdp"
SHAPES = {
    "dense": {"kernel": jax.ShapeDtypeStruct((128, 64), jnp.float32)},  # 32 KiB
    "frozen": {"kernel": jax.ShapeDtypeStruct((128, 64), jnp.float32)},
    "head": {"bias": jax.ShapeDtypeStruct((64,), jnp.float32)},
}


def mesh() -> Mesh:
    return auto_mesh(data=8)


def infer_sharding(tree: Any, strategy: str, mesh: Any) -> Any:
    """The rule `fsdp`: the largest axis that divides, of arrays above a size."""
    assert strategy == STRATEGY

    def of(x: Any) -> NamedSharding:
        spec: list[Any] = [None] * len(x.shape)
        if x.size * x.dtype.itemsize > LIMIT:
            fits = [k for k, n in enumerate(x.shape) if n % mesh.size == 0]
            if fits:
                spec[max(fits, key=lambda k: x.shape[k])] = "data"
        return NamedSharding(mesh, P(*spec))

    return jax.tree.map(of, tree)


def make(optax_name: str, **options: Any) -> optax.GradientTransformation:
    """A chain: the optimizer by name, for what is not frozen; rate, decay, schedule."""

    def trained(params: Any) -> Any:
        paths = jax.tree_util.tree_map_with_path(lambda path, _: str(path), params)
        return jax.tree.map(lambda path: not re.search("frozen", path), paths)

    def frozen(params: Any) -> Any:
        return jax.tree.map(operator.not_, trained(params))

    return optax.chain(
        optax.masked(optax.clip_by_global_norm(1.0), trained),
        optax.masked(operator.attrgetter(optax_name)(optax)(**options), trained),
        optax.scale(1e-2),
        optax.add_decayed_weights(1e-3),
        optax.scale_by_schedule(optax.constant_schedule(1.0)),
        optax.masked(optax.set_to_zero(), frozen),
        optax.scale(-1.0),
    )


@pytest.fixture
def shardings(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What `use` returns; big_vision's module is there."""
    module: Any = ModuleType("big_vision.sharding")
    module.infer_sharding = infer_sharding
    monkeypatch.setitem(sys.modules, "big_vision", ModuleType("big_vision"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(big_vision_config, "SHARDS", 8)
    monkeypatch.setattr(optax, "octavo", None, raising=False)
    return big_vision_config.use(SHAPES, STRATEGY, mesh())


def parameters() -> Any:
    def of(x: Any) -> jax.Array:
        return jnp.sin(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape)

    return jax.tree.map(of, SHAPES)


def stepped(tx: Any, where: Any, state: Any) -> Any:
    """The jitted step of `train.py`."""

    def update_fn(carry: Any, k: jax.Array) -> Any:
        params, state = carry
        grads = jax.tree.map(lambda p: jnp.cos(p + k), params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(update_fn, donate_argnums=0, out_shardings=(where, state))


def ran(tx: Any, where: Any, opt: Any) -> tuple[Any, Any, str]:
    """Parameters and state after some steps, and the compiled step."""
    params = jax.device_put(parameters(), where)
    carry = params, jax.jit(tx.init, out_shardings=opt)(params)
    step = stepped(tx, where, opt)
    text = step.lower(carry, jnp.float32(0)).compile().as_text()
    for k in range(3):
        carry = step(carry, jnp.float32(k))
    return *carry, text


def test_the_state_is_sharded_like_the_parameters(shardings: Any) -> None:
    tx = make("octavo.scale_by_adam", b1=0.9, b2=0.95)
    opt = optim.state_sharding(tx, SHAPES, shardings)
    params, state, text = ran(tx, shardings, opt)
    (adam,) = [x for x in jax.tree.leaves(state, is_leaf=is_octavo) if is_octavo(x)]
    for tree in (adam.mu, adam.nu, adam.mu_scale, adam.nu_scale):
        assert tree["dense"]["kernel"].sharding.spec == P("data", None)
        assert isinstance(tree["frozen"]["kernel"], optax.MaskedNode)
    assert "all-gather" not in text
    one = jax.tree.map(lambda _: NamedSharding(auto_mesh(data=1), P()), SHAPES)
    with jax.numpy_dtype_promotion("standard"):  # optax needs it
        plain, *_ = ran(make("scale_by_adam", b2=0.95), one, None)
    jax.tree.map(close, params, plain)


def is_octavo(x: Any) -> bool:
    return hasattr(x, "mu_scale")


def close(a: jax.Array, b: jax.Array) -> None:
    """Three steps of 0.01 whose 8-bit moments are off by a few percent."""
    np.testing.assert_allclose(a, b, atol=3 * 0.01 * 0.05)


def test_their_rule_replicates_codes(shardings: Any) -> None:
    """What the recipe is for: a quarter of the bytes falls under the limit."""
    tx = make("octavo.scale_by_adam", b1=0.9, b2=0.95)
    opt = infer_sharding(jax.eval_shape(tx.init, SHAPES), STRATEGY, mesh())
    _, state, text = ran(tx, shardings, opt)
    (adam,) = [x for x in jax.tree.leaves(state, is_leaf=is_octavo) if is_octavo(x)]
    assert adam.mu["dense"]["kernel"].sharding.is_fully_replicated
    assert "all-gather" in text


def test_it_gets_the_kernels(shardings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    binds = Binds(monkeypatch)
    make("octavo.scale_by_adam")
    binds.expect_kernels(parameters(), "dense/kernel", P("data", None))
