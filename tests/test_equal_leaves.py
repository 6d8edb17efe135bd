"""Equal leaves share a kernel; XLA steps those that are small together."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from octavo import optim
from octavo.optim.stepping import execute
from octavo.pallas_kernels import backends
from octavo.pallas_kernels.backends import _together

from aot import backend_of, lower_for
from bits import assert_same_bits, moments
from cases import ADAPTING, KINDS, RULES
from meshes import mesh_of, named

# ------------------------------------------------------------------------ in a kernel

IN_MODULE = {"tpu": "@tpu_custom_call", "triton": "@__gpu$xla.gpu.triton"}


@pytest.mark.parametrize("rule", KINDS)
@pytest.mark.parametrize("target", ["v6e", "sm_90"])
def test_150_equal_leaves_have_one_kernel_for_each_pass(target: str, rule: str) -> None:
    """Traced and lowered once: the module calls it for each leaf."""
    case, backend = RULES[rule], backend_of(target)
    tx = case.ours(1e-3, **case.kwargs, backend=backend)
    tree = [jax.ShapeDtypeStruct((256, 256), jnp.float32)] * 150
    state = jax.eval_shape(tx.init, tree)
    lowered = lower_for(target, lambda p, s, g: tx.step(g, s, p), tree, state, tree)
    text = lowered.as_text()
    assert text.count(IN_MODULE[backend]) == case.kernels
    assert len(text) < 150 * 10_000  # and little else for each


# --------------------------------------------------------------------------- together

# Kernels and biases, and stacked layers.
SHAPES: dict[str, Any] = {
    **{f"block{k}": {"kernel": (64, 64), "bias": (64,)} for k in range(4)},
    **{f"stack{k}": {"kernel": (3, 64, 64)} for k in range(2)},
}
# Two blocks decay and have a ratio, two do not.
MASK = {name: name not in ("block1", "block3") for name in SHAPES}
# Each limits, measures or leaves out in its own way.
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "value": {"grad_clip_value": 0.05},
    "global": {"grad_clip_norm": 1.0, "grad_clip_value": 0.05},
    "each": {
        "percentile_clipping": 20,
        "skip_nonfinite": True,
        "record_norms": True,
    },
}
STEPS = 3


def tree(seed: int) -> Any:
    """Parameters or gradients, whose scale differs from element to element."""
    rng = np.random.default_rng(seed)

    def leaf(shape: tuple[int, ...]) -> jax.Array:
        x = np.exp(rng.normal(size=shape)) * rng.normal(size=shape)
        return jnp.asarray(x, jnp.float32)

    return jax.tree.map(leaf, SHAPES, is_leaf=lambda x: isinstance(x, tuple))


def optimizer(rule: str, **options: Any) -> optim.Transformation:
    """With masks, if it has them."""
    case, masks = RULES[rule], {}
    if "weight_decay" in case.kwargs:
        masks["mask"] = MASK
    if rule in ADAPTING:
        masks["adapt_mask"] = MASK
    return case.ours(
        0.01,
        layer_axes=lambda path: 0 if path.startswith("stack") else None,
        **case.kwargs,
        **masks,
        **options,
    )


def trained(step: Callable[..., Any], state: Any, place: Callable[..., Any]) -> Any:
    """Parameters and state."""
    params = place(tree(0))
    for t in range(1, STEPS + 1):
        params, state = step(place(tree(t)), state, params)
    return jax.device_get((params, state))


def groups_in(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that will have the sizes of the groups of leaves in what is traced."""
    groups: list[int] = []
    run, run_together = backends.run, backends.run_together

    def one(*arguments: Any) -> Any:
        groups.append(1)
        return run(*arguments)

    def several(backend: str, program: Any, leaves: Any, *operands: Any) -> Any:
        groups.append(len(leaves))
        return run_together(backend, program, leaves, *operands)

    monkeypatch.setattr(backends, "run", one)
    monkeypatch.setattr(backends, "run_together", several)
    return groups


def both_ways(
    tx: optim.Transformation,
    monkeypatch: pytest.MonkeyPatch,
    wrap: Callable[..., Any] = lambda step: step,
    place: Callable[..., Any] = lambda tree: tree,
) -> tuple[Any, Any]:
    """Training with equal leaves together, and with each of them alone."""
    groups = groups_in(monkeypatch)
    found = []
    for fewest in (2, 1000):
        monkeypatch.setattr(_together, "_MANY", fewest)
        groups.clear()
        # What is compiled does not know the limit.
        execute._in_shards.clear_cache()
        found.append(trained(wrap(tx.step), tx.init(place(tree(0))), place))
        assert (max(groups) > 1) == (fewest == 2)
    execute._in_shards.clear_cache()
    return found[0], found[1]


@pytest.mark.parametrize(
    ("rule", "options"),
    [(rule, "plain") for rule in KINDS]
    + [("adamw", "value"), ("adamw", "each"), ("lamb", "global"), ("lamb", "each")],
)
def test_leaves_together_equal_leaves_alone(
    rule: str, options: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit where nothing is summed up, which a stack does in another order.

    But for vectors, which are stacked side by side: other products are contracted.
    """
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    got, expected = both_ways(optimizer(rule, **OPTIONS[options]), monkeypatch)
    expect_equal(got, expected)
    # AdEMAMix steps by a sum of two products: either may be contracted.
    if rule not in ("ademamix", *ADAPTING) and options in ("plain", "value"):
        pairs = zip(*(named(run).items() for run in (got, expected)), strict=True)
        for (path, x), (_, y) in pairs:
            if not path.endswith("bias"):
                assert_same_bits(x, y)


@pytest.mark.parametrize(
    ("rule", "options"), [("adamw", "global"), ("lamb", "each"), ("lars", "plain")]
)
def test_leaves_together_equal_leaves_alone_within_jit(
    rule: str, options: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """XLA fuses the passes with what is around them, and contracts other products."""
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    tx = optimizer(rule, **OPTIONS[options])
    expect_equal(*both_ways(tx, monkeypatch, wrap=jax.jit))


def test_leaves_together_in_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each device's shards of equal leaves are equal, too."""
    mesh = mesh_of("4x2", "explicit")
    specs = jax.tree.map(
        lambda shape: NamedSharding(mesh, P(*(None, "d", "m")[-len(shape) :])),
        SHAPES,
        is_leaf=lambda x: isinstance(x, tuple),
    )
    tx = optimizer("lamb")

    def place(tree: Any) -> Any:
        return jax.device_put(tree, specs)

    expect_equal(*both_ways(tx, monkeypatch, wrap=jax.jit, place=place))


def expect_equal(got: tuple[Any, Any], expected: tuple[Any, Any]) -> None:
    """Codes, and all else to 1 unit in the last place of the leaf's largest value."""
    (params, state), (own_params, own_state) = got, expected
    pairs = (params, own_params), (moments(state), moments(own_state))
    for mine, theirs in pairs:
        for x, y in zip(*map(jax.tree.leaves, (mine, theirs)), strict=True):
            if jnp.issubdtype(x.dtype, jnp.integer):
                np.testing.assert_array_equal(x, y)
            else:
                unit = np.spacing(np.abs(y).max())
                np.testing.assert_allclose(x, y, rtol=0, atol=unit)


@pytest.mark.parametrize(
    ("count", "shape", "expected"),
    [
        (20, (64, 64), [20]),
        (_together._MANY - 1, (64, 64), [1] * (_together._MANY - 1)),
        (9, (1024, 65), [1] * 9),
        (70, (256, 256), [64, 6]),
    ],
    ids=["many", "few", "large", "together large"],
)
def test_groups_have_many_small_leaves(
    count: int,
    shape: tuple[int, ...],
    expected: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Their arrays are copied."""
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    groups = groups_in(monkeypatch)
    tx = optim.adam(0.1)
    leaves = [jax.ShapeDtypeStruct(shape, jnp.float32)] * count
    jax.eval_shape(tx.step, leaves, jax.eval_shape(tx.init, leaves), leaves)
    assert groups == expected


def test_leaves_on_unknown_devices_are_stepped_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A stack would gather them."""
    groups = groups_in(monkeypatch)
    tx = optim.adam(0.1)
    leaves = [jax.ShapeDtypeStruct((64, 64), jnp.float32)] * 20
    jax.eval_shape(tx.step, leaves, jax.eval_shape(tx.init, leaves), leaves)
    assert groups == [1] * 20
