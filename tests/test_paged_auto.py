"""`paged="auto"`: the largest leaves, until what is left fits into `device_bytes`."""

from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from octavo import optim
from octavo.optim.storage.memory import HOST

from bits import assert_same_bits
from meshes import mesh_of

# The largest last, and one that is never paged. Rows of a block, with gradient and
# parameter, have 10,368 bytes. Fewer than 2**18 values, as in test_paged.py.
SHAPES = {"d": (40, 96), "a": (4096, 32), "b": (6144, 32), "c": (7680, 32)}
LARGEST = ("c", "b", "a")
ROWS = 10_368
PAGE = 10_500


def params_of(sharding: Any = None) -> dict[str, jax.Array]:
    made = {k: np.ones(shape, np.float32) for k, shape in SHAPES.items()}
    return jax.device_put(made, sharding or jax.devices()[0])


def hosted(state: Any) -> set[str]:
    return {k for k, x in state.mu.items() if x.sharding.memory_kind == HOST}


def hosted_by(shardings: Any) -> set[str]:
    return {k for k, where in shardings.mu.items() if where.memory_kind == HOST}


def bytes_on_a_device(params: Any, state: Any) -> int:
    """Parameters, gradients, and what of the state is there; of real arrays."""
    arrays = [*jax.tree.leaves(params)] * 2 + jax.tree.leaves(state._replace(extra=()))
    return sum(
        shard.data.nbytes
        for x in arrays
        if x.sharding.memory_kind != HOST
        for shard in x.addressable_shards[:1]
    )


@pytest.mark.parametrize("way", ["one device", "rows", "state_sharding"])
def test_the_largest_are_paged_until_the_rest_fits(way: str) -> None:
    where: Any = None
    if way != "one device":
        spec = P("d") if way == "rows" else P()
        where = NamedSharding(mesh_of("8 rows", "auto"), spec)
    params, options = params_of(where), {"page_bytes": PAGE}
    if way == "state_sharding":
        options["state_sharding"] = "d"
    needed = []
    for n in range(4):
        first = {k: k in LARGEST[:n] for k in SHAPES}
        tx = optim.adamw(1e-3, paged=first, **options).bind(params)
        chunks = 4 * ROWS if n else 0
        needed.append(bytes_on_a_device(params, tx.init(params)) + chunks)
    assert needed == sorted(needed, reverse=True)  # else this test shows nothing
    for n, least in enumerate(needed):
        # Counters are not reckoned with.
        for limit, paged in ((least + 100, n), (least - 100, n + 1)):
            if paged > 3:
                continue
            auto = {"paged": "auto", "device_bytes": limit}
            tx = optim.adamw(1e-3, **auto, **options).bind(params)
            rows = {row.path: row for row in optim.explain(tx, params).rows}
            found = {path for path, row in rows.items() if row.memory == HOST}
            assert found == set(LARGEST[:paged])
            assert all(rows[k].why.count("device_bytes=") == 1 for k in found)
            assert hosted(tx.init(params)) == found
            if where is not None:
                assert hosted_by(optim.state_sharding(tx, params)) == found


def test_too_little_for_anything_is_a_warning_with_the_numbers() -> None:
    params = params_of()
    tx = optim.adamw(1e-3, paged="auto", device_bytes=10**6, page_bytes=PAGE)
    tx = tx.bind(params)
    with pytest.warns(
        UserWarning, match=r"take 4,[\d,]* bytes .* is 1,000,000\. Shard"
    ):
        state = tx.init(params)
    assert hosted(state) == set(LARGEST)


def test_the_choice_stays_from_init_to_restore(tmp_path: Any) -> None:
    params = params_of()
    options: dict[str, Any] = {"device_bytes": 5_000_000, "page_bytes": PAGE}
    tx = optim.adamw(1e-2, paged="auto", **options).bind(params)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    report = optim.memory_report(tx, shapes)
    assert report == optim.memory_report(tx, params)
    fresh = tx.init(params)
    assert hosted(fresh) == {"c", "b"}
    step = jax.jit(lambda p, s, g: tx.step(g, s, p))
    p, state = params, fresh
    for _ in range(2):
        p, state = step(p, state, p)
    assert hosted(state) == {"c", "b"}
    assert report.host_bytes == sum(
        x.nbytes for x in jax.tree.leaves(state) if x.sharding.memory_kind == HOST
    )
    train = {"params": p, "opt_state": state}
    with ocp.CheckpointManager(tmp_path) as manager:
        optim.checkpoint.save(manager, 1, train, tx=tx)
    target = {"params": params, "opt_state": fresh}
    back = optim.checkpoint.restore(tmp_path, tx, target)
    assert_same_bits(back, train)
    step(back["params"], back["opt_state"], p)
    assert step._cache_size() == 1


def test_leaf_by_leaf() -> None:
    """What is paged in any case makes room; what never is takes it."""
    params = params_of()
    said = {"a": True, "b": "auto", "c": False, "d": "auto"}
    options = {"page_bytes": PAGE, "device_bytes": 1}
    tx = optim.adamw(1e-3, paged=said, **options).bind(params)
    with pytest.warns(UserWarning, match="although all that can be paged is"):
        assert hosted(tx.init(params)) == {"a", "b"}
    rows = {row.path: row.why for row in optim.explain(tx, params).rows}
    assert "would take" in rows["b"] and "fewer than 100,000" in rows["d"]
    enough = optim.adamw(1e-3, paged=said, **options | {"device_bytes": 10**9})
    assert hosted(enough.bind(params).init(params)) == {"a"}


def test_what_the_device_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    params = params_of()
    tx = optim.adamw(1e-3, paged="auto", page_bytes=PAGE).bind(params)
    with pytest.raises(ValueError, match=r"does not report .* Write device_bytes="):
        tx.init(params)
    reports = SimpleNamespace(memory_stats=lambda: {"bytes_limit": 5_700_000})
    monkeypatch.setattr(jax, "local_devices", lambda: [reports])
    assert hosted(tx.init(params)) == {"c"}
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match=r"2 processes .* Write device_bytes="):
        tx.init(params)


def test_wrong_values_say_what_to_write() -> None:
    with pytest.raises(ValueError, match="paged='Auto' must be True, False or 'auto'"):
        optim.adamw(1e-3, paged="Auto")
    with pytest.raises(ValueError, match=r"paged for 'a' is 'all', not True, False or"):
        optim.adamw(1e-3, paged=lambda path: "all").init(params_of())
    with pytest.raises(
        ValueError, match=r"device_bytes=1 is read with .* Write paged="
    ):
        optim.adamw(1e-3, device_bytes=1)
    with pytest.raises(ValueError, match="device_bytes=0 must be above 0"):
        optim.adamw(1e-3, paged="auto", device_bytes=0)
    wrapped = optax.inject_hyperparams(optim.adamw)
    tx = wrapped(1e-3, paged="auto", device_bytes=10**9)
    with pytest.raises(ValueError, match="static_args='device_bytes'"):
        tx.init(params_of())
    params = params_of()
    tx = optim.adam(1e-3, paged="auto", device_bytes=10**9).bind(params)
    with pytest.raises(ValueError, match=r"Call tx.update\(grads, state, params\)"):
        tx.update(params, tx.init(params))
