"""Muon with its state in host memory: where it is, and that its steps are the same."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from octavo import optim
from octavo.optim.storage.memory import HOST

from bits import assert_same_bits
from meshes import mesh_of

# Fewer than 2**18 values, so that XLA's path is the same for a leaf and a chunk of it.
SHAPES = {"stack": (6, 192, 96), "w": (1536, 128), "embed": (2048, 64), "b": (5,)}
DTYPES = {"stack": "bfloat16"}
PAGED: dict[str, Any] = {"paged": True, "page_bytes": 200_000}
LAYERS = {"stack": 0, "w": None, "embed": None, "b": None}


def values(seed: int) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    return {
        k: jnp.asarray(rng.normal(size=s), DTYPES.get(k, "float32"))
        for k, s in SHAPES.items()
    }


def kinds(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.sharding.memory_kind, tree)


def hosted(state: Any) -> set[str]:
    """The leaves whose momentum is in host memory, of both parts."""
    both = (kinds(part.mu) for part in state)
    return {k for tree in both for k, kind in tree.items() if kind == HOST}


def flat(paged: Any, like: Any) -> Any:
    """Arrays in host memory, where rows are in groups, in the shapes of others."""
    return jax.tree.map(lambda x, y: np.asarray(x).reshape(y.shape), paged, like)


def stepped(tx: Any, params: Any, seeds: Iterable[int] = (1, 2, 3)) -> Any:
    """Parameters and state; the first step is an `update`."""
    state = tx.init(params)
    before = kinds(state)
    where = jax.tree.map(lambda p: p.sharding, params)
    params = jax.tree.map(jnp.copy, params)
    step = jax.jit(lambda p, s, g: tx.step(g, s, p), donate_argnums=(0, 1))
    for seed in seeds:
        grads = jax.device_put(values(seed), where)
        if seed == 1:
            updates, state = jax.jit(tx.update)(grads, state, params)
            params = optax.apply_updates(params, updates)
        else:
            params, state = step(params, state, grads)
        assert kinds(state) == before
    return params, state


def test_steps_are_the_same_bit_for_bit() -> None:
    params = jax.device_put(values(0), jax.devices()[0])
    options = {"layer_axes": LAYERS, "weights": "remainder8", "weight_decay": 0.1}
    whole, paged = (
        stepped(optim.muon(1e-2, **options, **way).bind(params), params)
        for way in ({}, PAGED)
    )
    assert hosted(whole[1]) == set()
    assert hosted(paged[1]) == {"stack", "w", "embed"}
    muon, adam = paged[1]
    # The second pass streams what rounding lost; of float32 there is nothing.
    assert kinds(muon.remainder)["stack"] == kinds(muon.mu_scale)["w"] == HOST
    assert kinds(adam.nu)["embed"] == HOST and kinds(adam.nu)["b"] == "device"
    assert_same_bits(whole, flat(paged, whole))


@pytest.mark.parametrize(
    ("axes", "options"), [("auto", {"state_sharding": "m"}), ("explicit", {})]
)
def test_shards_stream_their_own(axes: str, options: Any) -> None:
    mesh = mesh_of("4x2", axes)
    specs = {"stack": P(None, "d"), "w": P("d"), "embed": P("d"), "b": P()}
    where = {k: NamedSharding(mesh, spec) for k, spec in specs.items()}
    params = jax.device_put(values(0), where)
    options = options | {"layer_axes": LAYERS, "min_shards": 8}
    found = []
    for way in ({}, PAGED):
        tx = optim.muon(1e-2, **options, **way).bind(params)
        with jax.set_mesh(mesh):
            found.append(stepped(tx, params, (2, 3)))
        said = optim.state_sharding(tx, params)
        assert kinds(found[-1][1]) == jax.tree.map(lambda s: s.memory_kind, said)
    assert hosted(found[1][1]) == {"stack", "w", "embed"}
    whole, paged = found[0], flat(found[1], found[0])
    stacks = (tree[0].pop("stack") for tree in (whole, paged))
    expect_equal_up_to_contraction(*stacks, params["stack"])
    assert_same_bits(whole, paged)


def expect_equal_up_to_contraction(x: Any, y: Any, start: Any) -> None:
    """Of bfloat16: few values differ, by little of the largest move.

    XLA of JAX 0.12 contracts products and sums otherwise in one of the two programs:
    398 of 110,592 values differ, and none with --xla_cpu_max_isa=AVX. A last bit of
    float32 becomes one of a product in bfloat16, 2**-8 of it, and the products after it
    make that larger; the parameter itself is rounded to a unit of its own.
    """
    x, y, start = (np.asarray(z).astype(np.float32) for z in (x, y, start))
    unit = 2.0**-7 * np.maximum(np.abs(x), np.abs(y))
    assert np.all(np.abs(x - y) <= unit + 2.0**-6 * np.max(np.abs(x - start)))
    assert np.mean(x != y) < 0.01


def test_auto_goes_by_the_leaves_of_both_parts() -> None:
    """AdamW's leaf has two moments, the most bytes; then come the matrices."""
    params = jax.device_put(values(0), jax.devices()[0])
    options: dict[str, Any] = {"layer_axes": LAYERS, "block_size": 32}
    bytes_ = optim.memory_report(optim.muon(1e-2, **options), params).bytes
    bytes_ += 2 * sum(x.nbytes for x in params.values())
    # Chunks of 40 KB take up to four times as much on the device.
    limits = {1000: set(), -50_000: {"embed"}, -200_000: {"embed", "w"}}
    for more, wanted in limits.items():
        auto = {"paged": "auto", "device_bytes": bytes_ + more, "page_bytes": 40_000}
        tx = optim.muon(1e-2, **options, **auto).bind(params)
        rows = optim.explain(tx, params).rows
        assert {row.path for row in rows if row.memory == HOST} == wanted
        assert all("device_bytes=" in row.why for row in rows if row.path in wanted)
        state = tx.init(params)
        assert hosted(state) == wanted
    _, state = jax.jit(tx.step)(params, state, params)
    assert hosted(state) == wanted
