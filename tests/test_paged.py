"""State in host memory: where it is, and that steps through it are the same steps."""

from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from octavo import optim
from octavo.optim.checkpoint.checksum import checksum
from octavo.optim.sharding import hosting
from octavo.optim.storage import memory
from octavo.optim.storage.chunks import chunk_bytes, grids_of
from octavo.optim.storage.memory import HOST
from octavo.optim.storage.tree import Leaves
from octavo.pallas_kernels import Storage

from bits import assert_same_bits
from meshes import mesh_of

# A tail along the blocked axis; chunks along two axes, of several layers; a small one.
# Fewer than 2**18 values, so that XLA's path is the same for a leaf and a chunk of it.
SHAPES = {"tail": (2003, 60), "layers": (6, 192, 128), "b": (5,)}
DTYPES = {"layers": "bfloat16"}
PAGE = 200_000


def tree(seed: int, names: Collection[str] = tuple(SHAPES)) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    return {
        name: jnp.asarray(rng.normal(size=SHAPES[name]), DTYPES.get(name, "float32"))
        for name in names
    }


def on_one_device(names: Collection[str] = tuple(SHAPES)) -> dict[str, jax.Array]:
    return jax.device_put(tree(0, names), jax.devices()[0])


def kinds(state: Any) -> Any:
    return jax.tree.map(lambda x: x.sharding.memory_kind, state)


def stepped(tx: Any, params: Any) -> tuple[Any, Any]:
    """Parameters and state after three steps, the first with `update`."""
    state = tx.init(params)
    before = kinds(state)
    step = jax.jit(lambda p, s, g: tx.step(g, s, p), donate_argnums=(0, 1))
    for seed in range(3):
        grads = jax.device_put(tree(seed, params), jax.devices()[0])
        if seed:
            params, state = step(params, state, grads)
        else:
            updates, state = jax.jit(tx.update)(grads, state, params)
            params = optax.apply_updates(params, updates)
        assert kinds(state) == before
    return params, state


def both(name: str, params: Any, **options: Any) -> list[tuple[Any, Any]]:
    """The same steps, unpaged and paged."""
    ways: list[dict[str, Any]] = [{}, {"paged": True, "page_bytes": PAGE}]
    made = (getattr(optim, name)(1e-2, **options, **way) for way in ways)
    return [stepped(tx.bind(params), params) for tx in made]


def flat(state: Any, like: Any) -> Any:
    """A paged state with the shapes of one that is not."""
    return jax.tree.map(lambda x, y: np.asarray(x).reshape(y.shape), state, like)


def test_steps_are_the_same_bit_for_bit() -> None:
    whole, paged = both("adamw", on_one_device(), weights="remainder8")
    assert_same_bits(whole, flat(paged, whole))
    memory = kinds(paged[1])
    for field in ("mu", "nu", "mu_scale", "nu_scale"):
        found = getattr(memory, field)
        assert found == {"tail": HOST, "layers": HOST, "b": "device"}
    assert memory.remainder == {"tail": "device", "layers": HOST, "b": "device"}
    params, state = paged
    weights = [f(state, params) for f in (optim.masters, jax.jit(optim.masters))]
    assert_same_bits(*weights)
    assert_same_bits(weights[0], optim.masters(whole[1], whole[0]))


@pytest.mark.parametrize(
    ("name", "leaf", "options"),
    [
        ("lamb", "layers", {"layer_axes": 0}),
        ("lars", "tail", {"grad_clip_norm": 1.0, "skip_nonfinite": True}),
    ],
)
def test_sums_over_chunks_are_those_of_leaves(
    name: str, leaf: str, options: Any
) -> None:
    whole, paged = both(name, on_one_device([leaf]), **options)
    for leaf in whole[0]:
        # Norms are added up in another order: 1e-6 of steps of 1e-2; a unit of p.
        a, b = (np.asarray(x[0][leaf], np.float32) for x in (whole, paged))
        unit = 2.0**-7 if leaf in DTYPES else 2.0**-22
        np.testing.assert_allclose(a, b, rtol=unit, atol=1e-7, err_msg=leaf)
        slot = whole[1].slots[0]
        codes = [np.asarray(getattr(x[1], slot)[leaf], float) for x in (whole, paged)]
        codes[1] = codes[1].reshape(codes[0].shape)
        largest = np.abs(codes[0]).max()
        off = np.abs(codes[0] - codes[1]) > 1e-6 * largest
        assert off.mean() < 1e-4, leaf


@pytest.mark.parametrize(
    ("axes", "name", "options"),
    [("auto", "adamw", {"state_sharding": "m"}), ("explicit", "lamb", {})],
)
def test_shards_stream_their_own(axes: str, name: str, options: Any) -> None:
    mesh = mesh_of("4x2", axes)
    specs = {"up": P("d"), "down": P(None, "d"), "b": P()}
    shapes = {"up": (2048, 128), "down": (512, 512), "b": (8,)}
    shardings = {k: NamedSharding(mesh, spec) for k, spec in specs.items()}

    def values(seed: int) -> Any:
        rng = np.random.default_rng(seed)
        made = {k: rng.normal(size=s).astype("float32") for k, s in shapes.items()}
        return jax.device_put(made, shardings)

    results = []
    for way in ({}, {"paged": True, "page_bytes": 100_000}):
        tx = getattr(optim, name)(1e-2, **options, **way).bind(values(0))
        params, state = values(0), tx.init(values(0))
        said = optim.state_sharding(tx, params)
        assert kinds(state) == jax.tree.map(lambda s: s.memory_kind, said)
        with jax.set_mesh(mesh):
            made = jax.jit(tx.init, out_shardings=said)(params)
            assert kinds(made) == kinds(state)
            step = jax.jit(lambda p, s, g, tx=tx: tx.step(g, s, p))
            for seed in (1, 2):
                params, state = step(params, state, values(seed))
        assert kinds(state) == kinds(made)
        results.append((params, state))
    (p, whole), (q, paged) = results
    assert kinds(paged).mu == {"up": HOST, "down": HOST, "b": "device"}
    assert_same_bits(whole.mu, flat(paged.mu, whole.mu))
    for leaf in shapes:
        np.testing.assert_allclose(p[leaf], q[leaf], rtol=2.0**-22, atol=1e-7)


@pytest.mark.parametrize("axes", ["auto", "explicit"])
def test_shapes_restore_to_where_the_state_was(tmp_path: Any, axes: str) -> None:
    where = NamedSharding(mesh_of("8 rows", axes), P(None, "d"))
    params = jax.device_put({"w": np.ones((512, 1024), np.float32)}, where)
    tx = optim.adamw(1e-2, paged=True).bind(params)
    train = {"params": params, "opt_state": tx.init(params)}
    with ocp.CheckpointManager(tmp_path) as manager:
        optim.checkpoint.save(manager, 1, train, tx=tx)
    shapes = jax.eval_shape(lambda p: {"params": p, "opt_state": tx.init(p)}, params)
    with jax.set_mesh(where.mesh):
        found = optim.checkpoint.restore(tmp_path, tx, shapes, {"w": where})
    assert_same_bits(found, train)
    assert kinds(found) == kinds(train)
    made = found["opt_state"].mu["w"].sharding
    assert (made.spec, made.memory_kind) == (P(None, None, "d"), HOST)


def test_one_program_from_init_to_restore(tmp_path: Any) -> None:
    params = on_one_device(["tail", "layers"])
    options = {"weights": "remainder8"}
    tx = optim.paged_adamw8bit(1e-2, page_bytes=PAGE, **options).bind(params)
    step = jax.jit(lambda p, s, g: tx.step(g, s, p))
    state = tx.init(params)
    grads = jax.device_put(tree(1, params), jax.devices()[0])
    for _ in range(2):
        params, state = step(params, state, grads)
    train = {"params": params, "opt_state": state}
    with ocp.CheckpointManager(tmp_path) as manager:
        optim.checkpoint.save(manager, 1, train, tx=tx)
    target = {"params": params, "opt_state": tx.init(params)}
    found = optim.checkpoint.restore(tmp_path, tx, target)
    assert_same_bits(found, train)
    assert kinds(found) == kinds(target)
    step(found["params"], found["opt_state"], grads)
    assert step._cache_size() == 1

    # To an optimizer that is not paged, and back.
    plain = optim.adamw8bit(1e-2, **options).bind(params)
    target = {"params": params, "opt_state": plain.init(params)}
    unpaged = optim.checkpoint.restore(tmp_path, plain, target)
    assert HOST not in jax.tree.leaves(kinds(unpaged))
    assert_same_bits(unpaged["opt_state"], flat(state, target["opt_state"]))
    nu = unpaged["opt_state"].nu
    assert_same_bits(nu, flat(state.nu, nu))
    with ocp.CheckpointManager(tmp_path / "plain") as manager:
        optim.checkpoint.save(manager, 1, unpaged, tx=plain)
    target = {"params": params, "opt_state": tx.init(params)}
    paged = optim.checkpoint.restore(tmp_path / "plain", tx, target)
    assert_same_bits(paged, found)
    assert kinds(paged) == kinds(found)
    moments = optim.dequantize(state)
    back = optim.requantize(tx.init(params), moments)
    assert kinds(back) == kinds(state)
    assert jax.tree.map(jnp.shape, back) == jax.tree.map(jnp.shape, state)
    weights = optim.masters(state, params)
    assert_same_bits(weights, optim.masters(unpaged["opt_state"], params))
    _, again = optim.from_masters(state, weights)
    assert_same_bits(again.remainder, state.remainder)


def test_reports_say_what_is_on_the_host() -> None:
    params = on_one_device()
    tx = optim.adamw(1e-3, paged=lambda path: path != "layers").bind(params)
    state = tx.init(params)
    report = optim.memory_report(tx, params)
    host = sum(x.nbytes for x in jax.tree.leaves(state) if is_hosted(x))
    device = sum(x.nbytes for x in jax.tree.leaves(state) if not is_hosted(x))
    assert (report.host_bytes, report.device_bytes) == (host, device)
    assert "on the host" in str(report)
    rows = {row.path: row for row in optim.explain(tx, params).rows}
    assert rows["tail"].memory == HOST
    assert rows["layers"].memory == rows["b"].memory == "device"
    assert "fewer than 100,000 values" in rows["b"].why
    plain = optim.explain(optim.adamw(1e-3), params, platform="gpu")
    assert "memory" not in str(plain)


def is_hosted(x: jax.Array) -> bool:
    return x.sharding.memory_kind == HOST


def test_without_host_memory_state_stays_on_the_device(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    """A run that comes from a machine with it, and goes back there."""
    params = on_one_device(["tail"])
    tx = optim.adamw(1e-3, paged=True).bind(params)
    first = {"params": params, "opt_state": tx.init(params)}
    with ocp.CheckpointManager(tmp_path / "there") as manager:
        optim.checkpoint.save(manager, 1, first, tx=tx)

    def has_none(sharding: Any) -> bool:
        return False

    with monkeypatch.context() as here:
        here.setattr(hosting, "has_host_memory", has_none)
        with pytest.warns(UserWarning, match="JAX has no memory of the host"):
            target = {"params": params, "opt_state": tx.init(params)}
        found = optim.checkpoint.restore(
            tmp_path / "there", tx, target
        )  # warns no more
        assert set(jax.tree.leaves(kinds(found))) == {"device"}
        assert_same_bits(found, first)
        params, state = tx.step(tree(1, params), found["opt_state"], params)
        assert set(jax.tree.leaves(kinds(state))) == {"device"}
        train = {"params": params, "opt_state": state}
        with ocp.CheckpointManager(tmp_path / "here") as manager:
            optim.checkpoint.save(manager, 1, train, tx=tx)
    back = optim.checkpoint.restore(tmp_path / "here", tx, first)
    assert_same_bits(back, train)
    assert kinds(back) == kinds(first)


def test_what_cannot_be_paged_says_so() -> None:
    params = on_one_device()
    with pytest.raises(
        ValueError, match=r"page_bytes=1000 for 'layers': .* Write page_"
    ):
        optim.adamw(1e-3, paged=True, page_bytes=1000).bind(params).init(params)
    with pytest.raises(ValueError, match="Write weights='remainder16', paged=True"):
        optim.adamw(1e-3, weights="paged32")
    with pytest.raises(ValueError, match="paged=1 must be True, False or 'auto'"):
        optim.adamw(1e-3, paged=1)
    tx = optim.adamw(1e-3, paged=True)
    with pytest.warns(UserWarning, match=r"paged: 8 devices, .* tx.bind\(params\)"):
        state = tx.init(params)  # it may be on any of them
    assert HOST not in jax.tree.leaves(kinds(state))
    rows = {row.path: row for row in optim.explain(tx, params, platform="tpu").rows}
    assert (rows["layers"].memory, rows["tail"].memory) == (HOST, "device")
    assert "rows in groups of 64" in rows["tail"].why


@pytest.mark.parametrize("page", [5_000, 40_000, 300_000, 10**7])
@pytest.mark.parametrize(
    "shape", [(1024, 7), (1000, 33), (4, 96, 20), (3, 5, 64, 11), (5000,)], ids=str
)
def test_chunks_are_parts_of_a_leaf(shape: tuple[int, ...], page: int) -> None:
    tx = optim.adamw(1e-3, min_quantized_size=1)
    leaf = jax.ShapeDtypeStruct(shape, "float32")
    (storage,) = tx.optimizer.records(Leaves.of({"w": leaf}))
    assert isinstance(storage, Storage)
    dtypes, blocks = ("float32", "float32"), storage.blocks
    seen = np.zeros(shape, int)
    for grid in grids_of(storage, dtypes, page):
        assert chunk_bytes(storage, dtypes, grid.shape) <= page
        for k in range(grid.chunks):
            at = grid.at(k)
            assert at[blocks.axis or 0] % blocks.size == 0
            index = tuple(slice(i, i + n) for i, n in zip(at, grid.shape, strict=True))
            assert seen[index].shape == grid.shape
            seen[index] += 1
    assert (seen == 1).all()


@pytest.mark.parametrize(
    ("axes", "dtype"),
    [("one device", "int8"), ("auto", "bfloat16"), ("explicit", "int8")],
)
def test_checksums_in_pieces_are_those_of_the_whole(
    axes: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "_PIECE", 3_000)
    where: Any = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    if axes != "one device":
        where = NamedSharding(mesh_of("4x2", axes), P(None, "d", None))
    # Along every axis, the last pieces overlap.
    values = np.random.default_rng(0).normal(size=(5, 56, 33)) * 50
    wrong = values.copy()
    wrong[-1, -1, -1] += 1.0
    there = where.with_memory_kind(HOST)
    sums = [
        np.asarray(checksum(jax.device_put(jnp.asarray(x).astype(dtype), place)))
        for x, place in ((values, where), (values, there), (wrong, there))
    ]
    np.testing.assert_array_equal(sums[0], sums[1])
    assert (sums[0] != sums[2]).all()
