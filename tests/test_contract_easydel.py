"""EasyDeL's contract: what it does with an optimizer's state, and the recipe in it.

Read in EasyDeL 090a03b (22 April 2026): `EasyDeLState.apply_gradients` and `init_tx`,
`update_state_respectfully`, `_apply_step_start_point_to_optimizer_state`, and the jit
of `trainers/trainer/trainer.py`.
"""

import re
from types import SimpleNamespace
from typing import Any

import easydel_trainer
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from octavo import optim
from octavo.optim.integrations.easydel import Hooked

from contracts import Binds, auto_mesh, expect_equal

RULES = [("kernel", P("fsdp", "tp")), (".*", P())]
SCHEDULE = optax.constant_schedule(1e-2)
SHAPE = (128, 64)  # 16 rows a shard


def mesh() -> Mesh:
    return auto_mesh(fsdp=4, tp=2)


def made_model(sharded: bool) -> nnx.Linear:
    model = nnx.Linear(*SHAPE, rngs=nnx.Rngs(0))
    if sharded:
        state = nnx.state(model, nnx.Param)
        nnx.update(model, jax.device_put(state, by_rules(state)))
    return model


def by_rules(tree: Any) -> Any:
    """The first rule found in a leaf's path, less the axes that do not divide."""

    def of(path: Any, leaf: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        spec = next(s for rule, s in RULES if re.search(rule, name))
        kept = [
            axis if leaf.shape[k] % mesh().shape[axis] == 0 else None
            for k, axis in enumerate(spec)
        ]
        return NamedSharding(mesh(), P(*kept))

    return jax.tree_util.tree_map_with_path(of, tree)


def apply_gradients(tx: Any, params: Any, state: Any, grads: Any) -> Any:
    """By keyword, and then through the hook."""
    updates, state = tx.update(updates=grads, state=state, params=params)
    if hasattr(tx, "apply_updates_hook"):
        return tx.apply_updates_hook(params, updates), state
    return optax.apply_updates(params, updates), state


def trained(tx: Any, model: nnx.Linear) -> Any:
    """Parameters and state after three steps. The second has no loss and is skipped."""
    params = nnx.state(model, nnx.Param)
    where = by_rules(jax.eval_shape(tx.init, params)), by_rules(params)
    state = jax.jit(tx.init, out_shardings=where[0])(params)

    def train_step(carry: Any, batch: tuple[jax.Array, jax.Array]) -> Any:
        params, state = carry
        grads = jax.tree.map(lambda p: jnp.cos(p + batch[0]), params)
        return jax.lax.cond(
            jnp.isnan(batch[1]),
            lambda carry: carry,
            lambda carry: apply_gradients(tx, *carry, grads),
            (params, state),
        )

    step = jax.jit(train_step, out_shardings=where[::-1], donate_argnums=0)
    carry = (params, state)
    for k in range(3):
        loss = jnp.nan if k == 1 else 0.0
        carry = step(carry, (jnp.float32(k), jnp.float32(loss)))
    return carry


def arguments() -> Any:
    return SimpleNamespace(
        weight_decay=0.1,
        clip_grad=1.0,
        get_optimizer_and_scheduler=lambda steps: (None, SCHEDULE),
    )


@pytest.fixture
def tx(monkeypatch: pytest.MonkeyPatch) -> Hooked:
    """What EasyDeL's trainer gets from its arguments."""
    monkeypatch.setattr(easydel_trainer, "SHARDS", 4)
    given = arguments()
    easydel_trainer.use_octavo(given, made_model(sharded=True))
    made, schedule = given.get_optimizer_and_scheduler(10)
    assert schedule is SCHEDULE
    return made


def expected() -> Any:
    """The same without EasyDeL, on one device."""
    alone = optim.adamw(SCHEDULE, weight_decay=0.1, grad_clip_norm=1.0, min_shards=4)
    params = nnx.as_pure(nnx.state(made_model(sharded=False), nnx.Param))
    state = alone.init(params)
    for k in (0, 2):
        grads = jax.tree.map(lambda p: jnp.cos(p + jnp.float32(k)), params)  # noqa: B023
        params, state = jax.jit(alone.step)(grads, state, params)
    return params, state


def test_the_fused_step_runs_behind_the_hook(tx: Hooked) -> None:
    params, state = trained(tx, made_model(sharded=True))
    wanted, _ = expected()
    expect_equal(nnx.as_pure(params), wanted, rate=1e-2)
    assert int(state.count) == 2
    kernels = (state.mu, state.mu_scale, state.nu, state.nu_scale)
    for tree in kernels:
        assert tree["kernel"].get_value().sharding.spec == P("fsdp", "tp")


def test_it_gets_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(easydel_trainer, "SHARDS", 4)
    binds = Binds(monkeypatch)
    given, model = arguments(), made_model(sharded=True)
    easydel_trainer.use_octavo(given, model)
    given.get_optimizer_and_scheduler(10)
    binds.expect_kernels(nnx.state(model, nnx.Param), "kernel", P("fsdp", "tp"))


def test_the_count_is_a_leaf_of_that_name(tx: Hooked) -> None:
    """EasyDeL sets leaves called `count` where it starts at a later step."""
    state = jax.eval_shape(tx.init, nnx.state(made_model(False), nnx.Param))
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(state)]
    names = [getattr(path[-1], "name", None) for path in paths]
    assert names.count("count") == 1


def test_the_hook_needs_parameters(tx: Hooked) -> None:
    with pytest.raises(ValueError, match="params=params"):
        tx.update({}, None)
