"""Muon on meshes: who computes which matrices, and what moves."""

import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import muon_steps
import numpy as np
import pytest
from _compiled import collectives
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from matrices import NUMBERS, SHAPES, SPECS, expect_near, stepped, values

from octavo import optim
from octavo.optim.matrices import exchange, whole
from octavo.optim.matrices.bins import Kind, length, shared_out
from octavo.optim.matrices.stack import Tiling

TYPES = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}


def placed(axes: str, shape: tuple[int, int], names: Any = SHAPES) -> Any:
    mesh = jax.make_mesh(shape, ("d", "m"), axis_types=(TYPES[axes],) * 2)
    where = {k: NamedSharding(mesh, SPECS[k]) for k in names}
    return jax.device_put({k: values(0, 0.1)[k] for k in names}, where)


@functools.cache
def _alone() -> tuple[Any, Any]:
    here = jax.device_put(values(0, 0.1), jax.devices()[0])
    return stepped(_decaying().bind(here), here, 2)


def _decaying() -> Any:
    return optim.muon(
        0.1, muon_weight_dimension_numbers=NUMBERS, min_shards=8, weight_decay=0.1
    )


@pytest.mark.parametrize(
    ("axes", "shape"), [("auto", (4, 2)), ("auto", (8, 1)), ("explicit", (2, 4))]
)
def test_numbers_do_not_depend_on_the_mesh(axes: str, shape: tuple[int, int]) -> None:
    params = placed(axes, shape)
    tx = _decaying()
    alone, one = _alone()
    many, other = stepped(tx.bind(params) if axes == "auto" else tx, params, 2)
    jax.tree.map(np.testing.assert_array_equal, one.muon.mu, other.muon.mu)
    expect_near(many, alone, values(0, 0.1), 1e-5)
    assert all(
        p.sharding.is_equivalent_to(q.sharding, p.ndim)
        for p, q in zip(many.values(), params.values(), strict=True)
    )


def compiled(tx: Any, params: Any) -> dict[str, int]:
    """Collectives of a step."""
    shapes = jax.eval_shape(tx.init, params)
    if isinstance(shapes, optim.MuonState):
        state = jax.device_put(tx.init(params), optim.state_sharding(tx, params))
    else:
        state = tx.init(params)
    step = jax.jit(lambda p, s, g: optim.step(tx, g, s, p))
    return collectives(step.lower(params, state, params).compile().as_text())


def test_two_exchanges_for_all_matrices() -> None:
    equal = [k for k in SHAPES if k.startswith("layer")]
    params = placed("auto", (4, 2), equal)
    assert compiled(optim.muon(0.1).bind(params), params) == {"all-to-all": 2}
    params = placed("auto", (4, 2), [*equal, "heads", "bias"])
    tx = optim.muon(
        0.1, muon_weight_dimension_numbers=lambda p: {k: NUMBERS[k] for k in p}
    )
    assert compiled(tx.bind(params), params) == {"all-to-all": 2}
    # Whole on some devices: results are gathered there.
    params = placed("auto", (4, 2), ["down"])
    found = compiled(optim.muon(0.1).bind(params), params)
    assert found == {"all-to-all": 2, "all-gather": 1}


def test_what_is_computed_in_16_bits_travels_in_16() -> None:
    params = placed("auto", (4, 2), ["layer_0/kernel", "layer_1/kernel"])
    grads = {k: jax.device_put(values(1)[k], p.sharding) for k, p in params.items()}
    steps = []
    for dtype in (None, jnp.bfloat16):
        tx = optim.muon(0.1, ns_dtype=dtype).bind(params)
        state = tx.init(params)
        text = jax.jit(tx.step).lower(grads, state, params).as_text()
        sent = set(re.findall(r"all_to_all.*-> tensor<\S*x(\w+)>", text))
        assert sent == {"f32" if dtype is None else "bf16"}
        updates, _ = jax.jit(tx.update)(grads, state, params)
        assert all(u.dtype == jnp.float32 for u in updates.values())
        steps.append(updates["layer_0/kernel"])
    error = np.linalg.norm(steps[1] - steps[0]) / np.linalg.norm(steps[0])
    assert 1e-3 < error < 0.1  # as on one device


def test_large_exchanges_go_in_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    equal = [k for k in SHAPES if k.startswith("layer")]
    params = placed("auto", (2, 2), [*equal, "heads"])
    tx = optim.muon(
        0.1, muon_weight_dimension_numbers=lambda p: {k: NUMBERS[k] for k in p}
    ).bind(params)
    grads = {k: jax.device_put(values(1)[k], p.sharding) for k, p in params.items()}
    once, _ = jax.jit(tx.step)(grads, tx.init(params), params)
    # A device sends its quarter of one kernel in a round: fewer than there are devices.
    monkeypatch.setattr(exchange, "_IN_A_ROUND", 64 * 128 // 4)
    jax.clear_caches()
    assert compiled(tx, params) == {"all-to-all": 4}
    found, _ = jax.jit(tx.step)(grads, tx.init(params), params)
    jax.clear_caches()
    expect_near(found, once, params, 1e-6)


@pytest.mark.parametrize("sharded", [True, False])
def test_matrices_for_which_there_is_no_memory(
    monkeypatch: pytest.MonkeyPatch, sharded: bool
) -> None:
    params = placed("auto", (4, 2), ["bias", "down", "layer_0/kernel"])
    if not sharded:
        params = jax.device_put(params, jax.devices()[0])
    tx = optim.muon(0.1).bind(params)
    # Twice 64 x 128 values and twice 64 x 64; and what comes from others: two matrices
    # on two devices, or one on eight.
    least = 4 * 2 * (64 * 128 + 64 * 64) + (4 * 64 * 128 if sharded else 0)
    monkeypatch.setattr(whole, "memory_of", lambda device: least)
    tx.init(params)
    monkeypatch.setattr(whole, "memory_of", lambda device: least - 1)
    with pytest.raises(ValueError, match=rf"of 128 x 64 .* {least:,} bytes .*=8191"):
        tx.init(params)
    optim.muon(0.1, ns_dtype=jnp.bfloat16).bind(params).init(params)
    if sharded:
        optim.muon(0.1, max_matrix_size=8191).bind(params).init(params)


@given(
    kinds=st.lists(
        st.builds(
            Kind, st.integers(1, 40), st.integers(1, 10**6), st.integers(1, 1000)
        ),
        min_size=1,
        max_size=6,
    ),
    bins=st.integers(1, 33),
    most=st.integers(1, 40_000),
)
def test_all_matrices_are_shared_out(kinds: list[Kind], bins: int, most: int) -> None:
    rounds = shared_out(kinds, bins, most)
    own = np.zeros((bins, len(kinds)), int)
    for runs in rounds:
        assert sum(run.bins for run in runs) == bins
        each = np.repeat([run.counts for run in runs], [r.bins for r in runs], axis=0)
        assert each.sum()
        sizes = each * [kind.size for kind in kinds]
        assert length(runs, kinds) == sizes.sum(axis=1).max()
        # Not more than it may be; but always one for each device, if there is any.
        assert sizes.sum() <= most or (each.sum(axis=0) > 0).sum() == 1
        assert sizes.sum() <= most or each.sum() <= bins
        own += each
    np.testing.assert_array_equal(own.sum(axis=0), [kind.count for kind in kinds])
    loads = (own * [kind.cost for kind in kinds]).sum(axis=1)
    assert loads.max() - loads.min() <= max(kind.cost for kind in kinds)


def test_few_slices_move_the_matrices_of_a_model() -> None:
    # Llama 3 8B: gate and up, down, query, attention_out, key and value.
    sizes = [(64, 58_720_256), (32, 58_720_256), (32, 2**24), (32, 2**24), (64, 2**22)]
    kinds = [Kind(n, size, size) for n, size in sizes]
    total = sum(n * size for n, size in sizes)
    (runs,) = shared_out(kinds, 256, total)
    assert length(runs, kinds) == 58_720_256 and len(runs) == 6  # no device has two
    (runs,) = shared_out(kinds, 8, total)
    assert len(runs) == 1 and length(runs, kinds) == total / 8
    rounds = shared_out(kinds, 8, 18 * 58_720_256)  # none is filled up with zeros
    assert sum(8 * length(runs, kinds) for runs in rounds) == total


@pytest.mark.parametrize(
    ("local", "axes", "rows"),
    [
        ((16, 256), ((0,), (1,)), 1),
        ((3, 5), ((1,), (0,)), 1),
        ((3, 5), ((), (1, 0)), 1),
        ((2, 8, 128), ((1,), (), (0,)), 2),
        ((4, 3, 2), ((0, 1), (), ()), 1),
    ],
)
def test_parts_make_whole_matrices(local: Any, axes: Any, rows: int) -> None:
    tiling = Tiling((2, 3), axes, local, rows)
    full = np.random.default_rng(0).normal(size=(4, *tiling.whole))
    lengths = [
        n * math.prod(tiling.sizes[k] for k in a)
        for n, a in zip(local, axes, strict=True)
    ]
    sent = []
    for device in np.ndindex(*tiling.sizes):  # the part of each, cut out by hand
        x = full.reshape(4, *lengths)
        for k, (n, own) in enumerate(zip(local, axes, strict=True)):
            first = 0
            for name in own:
                first = first * tiling.sizes[name] + device[name]
            x = np.take(x, range(n * first, n * (first + 1)), axis=k + 1)
        part = jnp.asarray(x, jnp.float32)
        flat = tiling.flat(part)
        np.testing.assert_array_equal(tiling.parts(flat), part)
        sent.append(flat)
    joined = tiling.joined(jnp.stack(sent))
    np.testing.assert_array_equal(joined, full.astype(np.float32))
    np.testing.assert_array_equal(tiling.cut(joined), jnp.stack(sent))


def test_layers_on_devices_of_their_own_stay_there() -> None:
    params = placed("auto", (8, 1), ["stack"])
    tx = optim.muon(0.1, layer_axes=0).bind(params)
    assert compiled(tx, params) == {}


def test_finer_states_gather_parameters_alone() -> None:
    mesh = jax.make_mesh((8, 1), ("d", "m"), axis_types=(AxisType.Auto,) * 2)
    everywhere = NamedSharding(mesh, P())
    params = {f"w{k}": jnp.ones((256, 64)) for k in range(8)}
    params = jax.device_put(params, everywhere)
    tx = optim.muon(0.1, state_sharding="d").bind(params)
    found = compiled(tx, params)
    assert set(found) == {"all-to-all", "all-gather"} and found["all-to-all"] == 2


@pytest.mark.parametrize("axes", TYPES)
def test_too_large_matrices_are_left_to_xla(axes: str) -> None:
    params = placed(axes, (4, 2), ["layer_0/kernel"])
    alone = optim.muon(0.1)
    start = {"layer_0/kernel": values(0, 0.1)["layer_0/kernel"]}
    grads = {"layer_0/kernel": values(1)["layer_0/kernel"]}
    want, _ = alone.step(grads, alone.init(start), start)
    most = 64 * 128 - 1 - list(TYPES).index(axes)  # equal warnings are given once
    tx = optim.muon(0.1, max_matrix_size=most)
    tx = tx.bind(params) if axes == "auto" else tx
    where = jax.tree.map(lambda p: p.sharding, params)
    with pytest.warns(UserWarning, match=rf"layer_0/kernel.*max_matrix_size={most}"):
        found, _ = jax.jit(tx.step)(
            jax.device_put(grads, where), tx.init(params), params
        )
    expect_near(found, want, start, 1e-5)


def test_how_near_newton_schulz_gets() -> None:
    rows = {name: (x, polar) for name, x, polar in muon_steps.matrices()}
    least, most, _, angle = muon_steps.found(*rows["normal"], "standard", 3, "float32")
    assert 0.6 < least < most < 1.3 and angle < 10
    few = muon_steps.found(*rows["1 to 0.01"], "standard", 3, "bfloat16")
    more = muon_steps.found(*rows["1 to 0.01"], "standard", 5, "bfloat16")
    assert few[0] < 0.2 and more[0] > 0.6 and more[3] < few[3] / 2
