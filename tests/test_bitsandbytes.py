"""States from state_dicts of bitsandbytes that are written from its formulas."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from octavo import optim

from bits import assert_same_bits
from torch_states import CASES, IN_ORDER, LR, STEPS, Arrays, flat, values, written


@pytest.mark.parametrize(
    ("size", "nested"), [(256, True), (2048, False)], ids=["nested", "flat"]
)
@pytest.mark.parametrize("name", CASES)
def test_values_are_books_times_scales_and_the_next_step_is_bitsandbytes(
    name: str, size: int, nested: bool
) -> None:
    case = CASES[name]
    state_dict, stood = written(case, size, nested)
    params, grads = jax.tree.map(jnp.asarray, (values(1, LR), values(2)))
    tx = case.ours(state="32bit")
    state = optim.from_bitsandbytes(state_dict, params, tx, IN_ORDER)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, tx.init(params))
    assert state.count == STEPS
    for slot in state.slots:
        assert_same_bits(flat(state._asdict()[slot]), [x[slot] for x in stood])
    after, _ = jax.jit(tx.step)(grads, state, params)
    for got, p, g, moments in zip(
        *map(flat, (after, params, grads)), stood, strict=True
    ):
        wide = {k: np.float64(x) for k, x in moments.items()}
        step = LR * case.step(np.float64(g), wide, STEPS + 1)
        # Some 10 roundings, of values up to the largest step or parameter: sums of
        # moments and gradients lose digits where they cancel.
        largest = max(np.abs(step).max(), np.abs(p).max())
        np.testing.assert_allclose(got, p - step, rtol=0, atol=10 * 2.0**-24 * largest)


def test_moments_of_torch_itself() -> None:
    """Where torch keeps something else than Octavo: a root, and a mean of squares."""
    rng = np.random.default_rng(0)
    mean = np.float32(rng.standard_normal((6, 5)))
    square = mean**2 + np.float32(rng.random((6, 5)))
    centered = optim.rmsprop(
        0.1, centered=True, momentum=0.9, learning_rate_first=False, state="32bit"
    )
    entries: list[tuple[Any, Arrays, Arrays]] = [
        (
            optim.adamax(0.1, state="32bit"),
            {"exp_avg": mean, "exp_inf": square},
            {"mu": mean, "nu": square**2},
        ),
        (
            centered,
            {"square_avg": square, "grad_avg": mean, "momentum_buffer": -mean},
            {"mu": mean, "variance": square - mean**2, "trace": -mean},
        ),
    ]
    for tx, saved, expected in entries:
        entry = {"step": np.float32(3.0)} | saved
        state_dict = {"state": {0: entry}, "param_groups": [{"params": [0]}]}
        state = optim.from_bitsandbytes(state_dict, [jnp.zeros((6, 5))], tx)
        assert state.slots == tuple(expected)
        for slot, x in expected.items():
            assert_same_bits(getattr(state, slot), [x])


def test_eight_bits_are_rounded_once() -> None:
    """As `requantize` rounds, whose rounding test_convert.py measures."""
    state_dict, stood = written(CASES["adam"])
    params = values(1)
    tx = CASES["adam"].ours(min_quantized_size=0)
    state = optim.from_bitsandbytes(state_dict, params, tx, IN_ORDER)
    treedef = jax.tree.structure(params)
    moments = {
        slot: treedef.unflatten([x[slot] for x in stood]) for slot in ("mu", "nu")
    }
    assert_same_bits(state, optim.requantize(tx.init(params), moments, STEPS))


NAMES = ["embed.weight", "layers.0.attention.weight", "layers.1.attention.weight"]
MODEL_SHAPES = [(100, 50), (64, 64), (64, 64)]


def model() -> tuple[dict[str, Any], Arrays]:
    """A state_dict of Lion for a model of torch, and the moments by name."""
    rng = np.random.default_rng(0)
    moments = {
        name: np.float32(rng.standard_normal(shape))
        for name, shape in zip(NAMES, MODEL_SHAPES, strict=True)
    }
    entries = {k: {"step": 1, "state1": x} for k, x in enumerate(moments.values())}
    group = {"betas": (0.9, 0.99), "eps": 0.0}
    groups = [group | {"params": [0]}, group | {"params": [1, 2]}]
    return {"state": entries, "param_groups": groups}, moments


def linear(path: str) -> Any:
    """Flax's names from torch's."""
    *modules, kind = path.split("/")
    name = ".".join([*modules, "weight"])
    return (name, np.transpose) if kind == "kernel" else name


def test_names_transposed_kernels_and_layers_in_one_leaf() -> None:
    state_dict, moments = model()
    tx = optim.lion(0.1, state="32bit")
    embed, *layers = (jnp.zeros(shape) for shape in MODEL_SHAPES)
    params = {
        "embed": {"embedding": embed},
        "layers": [{"attention": {"kernel": x}} for x in layers],
    }
    state = optim.from_bitsandbytes(state_dict, params, tx, linear, NAMES)
    expected = [moments[NAMES[0]], *(moments[name].T for name in NAMES[1:])]
    assert_same_bits(flat(state.mu), expected)

    # torch's own names, of an optimizer that was given model.named_parameters().
    for group in state_dict["param_groups"]:
        group["param_names"] = [NAMES[k] for k in group["params"]]
    named = optim.from_bitsandbytes(state_dict, params, tx, linear)
    assert_same_bits(named, state)

    # Names in place of numbers, as a state_dict that was gathered has them.
    for group in state_dict["param_groups"]:
        group["params"] = group.pop("param_names")
    entries = state_dict["state"]
    state_dict["state"] = {NAMES[k]: entry for k, entry in entries.items()}
    keyed = optim.from_bitsandbytes(state_dict, params, tx, linear)
    assert_same_bits(keyed, state)

    stacked = {"embed": {"weight": embed}, "layers": jnp.stack(layers)}
    together = (NAMES[1:], lambda *each: np.stack([x.T for x in each]))
    state = optim.from_bitsandbytes(state_dict, stacked, tx, {"layers": together})
    assert_same_bits(flat(state.mu), [expected[0], np.stack(expected[1:])])


def test_a_list_is_in_order_and_what_maps_to_none_starts_anew() -> None:
    state_dict, moments = model()
    params = [jnp.zeros(shape) for shape in MODEL_SHAPES]
    tx = optim.lion(0.1, state="32bit")
    state = optim.from_bitsandbytes(state_dict, params, tx)
    assert_same_bits(state.mu, list(moments.values()))
    del state_dict["state"][1]
    state = optim.from_bitsandbytes(state_dict, params, tx, {"1": None})
    assert_same_bits(flat(state.mu)[::2], [moments[NAMES[0]], moments[NAMES[2]]])
    assert not state.mu[1].any()


def test_chains_counts_norms_and_shards() -> None:
    """Wherever the state is, however it is sharded; norms clip nothing before they are.

    As `from_optax` does it: the history of a fresh state would clip the next gradients.
    """
    state_dict, _ = written(CASES["adam"])
    mesh = jax.make_mesh((4,), ("x",))
    rows = NamedSharding(mesh, PartitionSpec("x", None))
    params = values(1)
    params["a"] = jax.device_put(params["a"], rows)
    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.masked(CASES["adam"].ours(percentile_clipping=5), {"a": True, "b": True}),
        optax.scale_by_schedule(optax.constant_schedule(1.0)),
    )
    chained = optim.from_bitsandbytes(state_dict, params, tx, IN_ORDER, count=9)
    fresh = tx.init(params)
    chex.assert_trees_all_equal_shapes_and_dtypes(chained, fresh)
    state = chained[1].inner_state
    assert (state.count, chained[2].count) == (9, 9)
    assert state.mu["a"].sharding == fresh[1].inner_state.mu["a"].sharding == rows
    assert np.isposinf(state.extra["clip_history"]).all()
    whole = CASES["adam"].ours()
    alone = optim.from_bitsandbytes(state_dict, values(1), whole, IN_ORDER)
    assert_same_bits(state.mu, alone.mu)
