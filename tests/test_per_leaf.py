"""Options and factors leaf by leaf: by a tree, by a prefix of it, by a function."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from octavo import optim

from cases import ADAPTING, RULES, trees
from meshes import mesh_of
from oracle import optax_run
from training import run_step

SHAPES = {"body": {"up": (96, 40), "down": (40, 96)}, "head": (80, 64)}


def tree(steps: int = 3) -> tuple[Any, list[Any]]:
    """Parameters, and gradients of some steps."""
    return trees(SHAPES, steps)


def of_path(values: dict[str, Any]) -> Any:
    """A function of the path, from values for the first name in it."""
    return lambda path: values[path.partition("/")[0]]


def ways(body: Any, head: Any) -> list[Any]:
    """The same as a tree, as a prefix, and as a function of the path."""
    whole = {"body": {"up": body, "down": body}, "head": head}
    prefix = {"body": body, "head": head}
    return [whole, prefix, of_path(prefix)]


# So large that their blocks are not shortened.
LARGE = {
    "body": {"up": (1024, 2048), "down": (2048, 1024)},
    "head": (4096, 1024),
}


def shapes(of: Any) -> Any:
    """Parameters that are nowhere."""
    is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
    return jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s, "float32"), of, is_leaf=is_shape
    )


@pytest.mark.parametrize("way", range(3), ids=["tree", "prefix", "function"])
def test_state_and_blocks_of_each_leaf(way: int) -> None:
    params = shapes(LARGE)
    tx = optim.adamw(
        1e-3,
        state=ways({"mu": "bf16", "nu": "8bit"}, "dynamic8")[way],
        block_size=ways(16, 128)[way],
        block_axis=ways(1, None)[way],
    )
    rows = {row.path: row.blocks for row in optim.explain(tx, params).rows}
    assert rows == {
        "body/up": "16 along axis 1",
        "body/down": "16 along axis 1",
        "head": "128 along axis 0",
    }
    report = optim.memory_report(tx, params)
    formats = {row.pattern: row.formats for row in report.rows}
    assert formats == {
        "body/up": "bf16/bits8",
        "body/down": "bf16/bits8",
        "head": "dynamic8/dynamic8u",
    }
    state = jax.eval_shape(tx.init, params)
    assert list(state.extra["format"]) == ["mu=by_path,nu=by_path"]


def scaled_by_optax(rule: str, scales: tuple[float, float], decays: Any) -> Any:
    """The optimizer of optax with other rates and decays, a part for each."""
    case = RULES[rule]
    kwargs = [case.kwargs | {"weight_decay": d} for d in decays]
    parts = {
        name: case.optax(0.01 * scale, **own)
        for name, scale, own in zip(("body", "head"), scales, kwargs, strict=True)
    }
    return optax.partition(parts, {"body": "body", "head": "head"})


@pytest.mark.parametrize("way", range(3), ids=["tree", "prefix", "function"])
@pytest.mark.parametrize("rule", ["adamw", "sgd", *ADAPTING])
def test_rates_and_decays_of_each_leaf_are_those_of_optax(rule: str, way: int) -> None:
    """LARS' rate multiplies what enters its momentum: a constant factor is the same."""
    params, grads = tree()
    scales, decays = (0.25, 2.0), (0.0, 0.2)
    case = RULES[rule]
    tx = case.ours(
        0.01,
        **case.kwargs | {"weight_decay": ways(*decays)[way]},
        lr_scale=ways(*scales)[way],
        state="32bit",
    )
    ours, _ = run_step(tx, params, grads)
    theirs = optax_run(scaled_by_optax(rule, scales, decays), params, grads)
    for path, x in jax.tree_util.tree_leaves_with_path(ours):
        others = jax.tree_util.tree_leaves_with_path(theirs)
        expected = {jax.tree_util.keystr(p): v for p, v in others}
        # As in test_rules.py, over three steps of at most 0.06 each; LARS' and SGD's
        # are longer, and rounded in proportion.
        np.testing.assert_allclose(
            x, expected[jax.tree_util.keystr(path)], rtol=2e-6, atol=3 * 0.06 * 7e-6
        )


def test_factors_are_operands_that_may_change_without_tracing_again() -> None:
    params, (g, *_) = tree()
    tx = optim.adamw(1e-3)
    state = tx.init(params)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(params: Any, state: Any, scale: Any, decay: Any) -> Any:
        tx = optim.adamw(1e-3, lr_scale=scale, weight_decay=decay)
        return tx.step(g, state, params)

    moved = []
    for scale in (1.0, 3.0):
        scales = {"body": jnp.float32(scale), "head": jnp.float32(1.0)}
        new, _ = step(params, state, scales, jnp.float32(0.0))
        moved.append(jax.tree.map(jnp.subtract, new, params))
    # p is up to 4, and rounded by 2**-23 of that; a step is 1e-3.
    for name, ratio in (("up", 3.0), ("down", 3.0)):
        first, second = (m["body"][name] for m in moved)
        np.testing.assert_allclose(second, ratio * first, rtol=0, atol=2e-6)
    chex.assert_trees_all_equal(moved[0]["head"], moved[1]["head"])


def test_a_scale_of_zero_leaves_the_leaf_and_goes_on_with_its_moments() -> None:
    params, grads = tree()
    tx = optim.adamw(1e-3, lr_scale={"body": 0.0, "head": 1.0})
    plain = optim.adamw(1e-3)
    frozen, state = run_step(tx, params, grads)
    _, expected = run_step(plain, params, grads)
    chex.assert_trees_all_equal(frozen["body"], params["body"])
    chex.assert_trees_all_equal(state.trees, expected.trees)


@pytest.mark.parametrize("rule", ["adamw", "lamb"])
def test_factors_in_shards_are_those_of_one_device(rule: str) -> None:
    params, (g, *_) = tree()
    mesh = mesh_of("4x2", "explicit")
    placed = jax.tree.map(
        lambda s: NamedSharding(mesh, P("d", "m")), SHAPES, is_leaf=_is_shape
    )
    tx = RULES[rule].ours(
        0.01,
        weight_decay={"body": 0.1, "head": 0.0},
        lr_scale=of_path({"body": 0.5, "head": 2.0}),
        state="32bit",
    )
    alone, _ = run_step(tx, params, [g])
    sharded, _ = run_step(tx, *jax.device_put((params, [g]), (placed, [placed])))
    for x, y in zip(*map(jax.tree.leaves, (sharded, alone)), strict=True):
        # Sums in another order; p is up to 4, and a step 0.04.
        np.testing.assert_allclose(x, y, rtol=0, atol=2.0**-22 + 1e-6 * 0.04)


def _is_shape(x: Any) -> bool:
    return isinstance(x, tuple)


def test_embeddings_in_32bit() -> None:
    of = (512, 256)
    names = {
        "wte": {"embedding": of},
        "tok_embeddings": of,
        "decoder": {"Embed_0": of, "wpe": of, "kernel": of, "wtext": of},
    }
    tx = optim.adamw(1e-3, state=optim.embeddings_in_32bit)
    report = optim.memory_report(tx, shapes(names))
    in_8_bits = [row.pattern for row in report.rows if row.formats != "32bit"]
    assert in_8_bits == ["decoder/kernel", "decoder/wtext"]
    assert len(report.rows) == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"state": {"body": "8bit"}}, "state does not fit the parameters at 'head'"),
        ({"state": {"body": "9bit", "head": "8bit"}}, "format '9bit' for 'body/down'"),
        (
            {"state": {"body": 8, "head": "8bit"}},
            "state=8 for 'body/down': give one format",
        ),
        ({"block_size": {"body": 12, "head": 32}}, "block_size=12 for 'body/down'"),
        ({"block_axis": {"body": 3, "head": 0}}, "block_axis=3 for 'body/down' is not"),
        ({"lr_scale": {"body": 1.0}}, "lr_scale does not fit the parameters at 'head'"),
        (
            {"lr_scale": of_path({"body": "1", "head": 1})},
            "lr_scale for 'body/down' is",
        ),
        (
            {"lr_scale": {"body": -1.0, "head": 1.0}},
            "lr_scale for 'body/down'=-1.0 must",
        ),
        ({"lr_scale": -1.0}, "lr_scale=-1.0 must be finite and not negative"),
        (
            {"weight_decay": {"body": None, "head": 0.0}},
            "weight_decay at 'body/down' is None, not numbers",
        ),
        ({"weight_decay": lambda path: -1.0}, "weight_decay for 'body/down'=-1.0 must"),
    ],
)
def test_errors_name_the_option_and_the_leaf(
    options: dict[str, Any], message: str
) -> None:
    params, (g, *_) = tree()

    def run() -> None:
        tx = optim.adamw(1e-3, min_quantized_size=0, **options)
        tx.update(g, tx.init(params), params)

    with pytest.raises(ValueError, match=message):
        run()
