"""Parameters of 16 bits in whole steps: on every backend and mesh, kept, refused."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from step import kernel_bytes

from octavo import optim
from octavo.pallas_kernels import WEIGHTS, remainder_dtype

from cases import RULES, params_and_grads
from kernels import INTERPRETERS, interpreted
from meshes import given, mesh_of
from training import run_step

ROUNDED = [name for name in WEIGHTS if name != "nearest"]
KEPT = [name for name, bits in WEIGHTS.items() if bits]


def values_of(state: Any, p: jax.Array) -> np.ndarray:
    """What parameters stand for."""
    wide = p.astype(jnp.float32) if state.remainders is None else None
    return np.asarray(optim.masters(state, p) if wide is None else wide)


# Of float16 there are kernels for GPUs alone.
KERNELS = [
    *((name, weights, "bfloat16") for name in INTERPRETERS for weights in ROUNDED),
    ("triton-interpreter", "remainder8", "float16"),
]


@pytest.mark.parametrize(("backend", "weights", "dtype"), KERNELS)
def test_kernels_round_as_xla_does(
    backend: str, weights: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps of LAMB, whose sums read remainders, with gradients in float32.

    A sum in another order may move a ratio, and so a step, by some units in the last
    place of float32: of steps of .02 that is 2e-8, a few in a thousand of 1/256 of a
    unit next to 1.
    """
    case = RULES["lamb"]
    p, grads = params_and_grads((80, 128), 2, jnp.float32)
    runs = []
    for name in (interpreted(backend, monkeypatch), "xla"):
        options = {"weights": weights, "backend": name, "min_quantized_size": 0}
        tx = case.ours(1e-2, **case.kwargs, **options)
        runs.append(run_step(tx, p.astype(dtype), grads))
    (a, mine), (b, theirs) = runs
    assert (np.asarray(a) != np.asarray(b)).mean() < 1e-3
    got, expected = values_of(mine, a), values_of(theirs, b)
    if weights == "remainder16":
        np.testing.assert_allclose(got, expected, rtol=2.0**-22, atol=2e-8)
    else:
        assert (got != expected).mean() < 1e-2


@pytest.mark.parametrize(
    ("weights", "axes"), [("stochastic", "explicit"), ("remainder8", "auto")]
)
def test_every_mesh_has_the_same_bits(weights: str, axes: str) -> None:
    """Of parameters, remainders and codes, by steps and by updates."""
    p, grads = params_and_grads((128, 64), 2, jnp.bfloat16)
    found = []
    for mesh, spec in (("1", ()), ("4x2", ("d", "m"))):
        where = jax.NamedSharding(mesh_of(mesh, axes), jax.P(*spec))
        tx = optim.adamw(1e-2, weights=weights, **given(axes, where))
        q = jax.device_put(p, where)
        state = tx.init(q)
        step, update = jax.jit(tx.step), jax.jit(tx.update)
        for g in jax.device_put(grads, where):
            updates, _ = update(g, state, q)
            q, state = step(g, state, q)
        if state.remainders is not None:
            assert state.remainder.sharding.is_equivalent_to(where, 2)
        found.append(jax.device_get((q, updates, state.trees)))
    jax.tree.map(np.testing.assert_array_equal, *found)


TWINS = Path(__file__).with_name("float32_twins.py")


def test_remainder16_is_training_in_float32_by_bits() -> None:
    """Of eight devices, and after a restore."""
    env = {
        "XLA_FLAGS": "--xla_cpu_max_isa=AVX",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    command = [sys.executable, str(TWINS), "8", "adamw"]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | env, timeout=300
    )
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout.splitlines()[-1])
    assert row["rule"] == "adamw" and row["steps"] == 8
    assert not any(row[x] for x in ("weights", "rounded", "moments", "ulps")), row


# ------------------------------------------------------------------ what has to stay


@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_block_that_is_not_finite_is_kept_with_its_remainder(weights: str) -> None:
    p, (g, bad) = params_and_grads((64, 64), 2, jnp.bfloat16)
    bad = bad.at[5, 7].set(jnp.nan)
    tx = optim.adamw(1e-2, weights=weights, min_quantized_size=0, block_size=32)
    before, state = run_step(tx, p, [g])
    block = slice(4 * (5 // 4), 4 * (5 // 4) + 4), 7  # a small leaf's have 4 values
    after, new = jax.jit(tx.step)(bad, state, before)
    np.testing.assert_array_equal(after[block], before[block])
    assert (np.asarray(after) != np.asarray(before)).mean() > 0.2
    if state.remainders is not None:
        np.testing.assert_array_equal(new.remainder[block], state.remainder[block])
    skipping = optim.adamw(1e-2, weights=weights, skip_nonfinite=True)
    state = skipping.init(p)
    after, new = jax.jit(skipping.step)(bad, state, p)
    np.testing.assert_array_equal(after, p)
    jax.tree.map(np.testing.assert_array_equal, new.trees, state.trees)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_weights_stay_in_the_range_of_their_type(weights: str, dtype: Any) -> None:
    """The largest, the smallest, zeros of both signs, and what is no number."""
    kind = jnp.finfo(dtype)
    tiny = float(kind.smallest_subnormal)
    extreme = [kind.max, -kind.max, tiny, -tiny, 0.0, -0.0, np.inf, -np.inf, np.nan]
    p = jnp.tile(jnp.asarray(extreme, dtype)[:, None], (1, 8))
    for rate in (0.0, 1e-3, 1e3):
        tx = optim.sgd(rate, weights=weights)
        for sign in (1.0, -1.0):
            g = jnp.full(p.shape, sign * 30, dtype)
            q, _ = jax.jit(tx.step)(g, tx.init(p), p)
            if weights == "nearest" and dtype == jnp.bfloat16:
                continue  # as optax does it
            after = np.asarray(q, np.float32)
            assert np.isfinite(after[:6]).all()
            same = np.asarray(q).view(np.uint16) == np.asarray(p).view(np.uint16)
            assert same[6:].all()
            if rate == 0.0:
                assert same.all()


def test_updates_of_float16_do_not_overflow() -> None:
    p = jnp.full((8, 8), 65504.0, jnp.float16)
    g = jnp.full((8, 8), -1000.0, jnp.float16)
    for weights in WEIGHTS:
        tx = optim.sgd(1.0, weights=weights)
        updates, _ = tx.update(g, tx.init(p), p)
        assert np.isfinite(np.asarray(optax.apply_updates(p, updates))).all()


# ------------------------------------------------------------- masters and reports


def mixed() -> Any:
    """A model whose norms are in float32."""
    return {
        "kernel": jnp.full((64, 128), 0.3, jnp.bfloat16),
        "half": jnp.full((64, 128), 0.3, jnp.float16),
        "norm": jnp.ones(64),
        "steps": jnp.zeros((), jnp.int32),
    }


@pytest.mark.parametrize("weights", KEPT)
def test_masters_come_from_parameters_and_remainders(weights: Any) -> None:
    """In a chain and inside of jit; and both come from them."""
    params = mixed()
    tx = optax.chain(optim.adam(1e-4, weights=weights))
    grads = jax.tree.map(jnp.ones_like, params)
    state = tx.init(params)
    for _ in range(3):
        params, state = optim.step(tx, grads, state, params)
    found = jax.jit(optim.masters)(state, params)
    # Units are 2**-9 and 2**-12; each of three steps may be off by a 256th of them.
    for name, unit in (("kernel", 2.0**-9), ("half", 2.0**-12)):
        start = float(mixed()[name][0, 0])
        np.testing.assert_allclose(found[name], start - 3e-4, atol=3 * unit / 256)
    np.testing.assert_array_equal(found["norm"], params["norm"])
    assert found["steps"].dtype == jnp.int32
    again, own = optim.from_masters(state[0], found)
    jax.tree.map(np.testing.assert_array_equal, again, params)
    jax.tree.map(np.testing.assert_array_equal, own.trees, state[0].trees)


def test_norms_and_decay_take_the_full_value() -> None:
    """Which differ from those of the rounded one by far more than float32's unit."""
    rng = np.random.default_rng(0)
    exact = np.float32(1 + rng.random((64, 128)) / 300)  # all of them are rounded to 1
    short = jnp.asarray(exact, jnp.bfloat16)
    tx = optim.lamb(0.1, weights="remainder16", weight_decay=0.5, record_norms=True)
    params, state = optim.from_masters(tx.init(short), jnp.asarray(exact))
    g = jnp.zeros_like(params)  # then LAMB's direction is the decay alone
    params, state = jax.jit(tx.step)(g, state, params)
    norm = np.linalg.norm(exact.astype(np.float64))
    rounded = np.linalg.norm(np.asarray(short, np.float64))
    assert abs(rounded / norm - 1) > 1e-3
    recorded = optim.last_norms(state)[""]
    assert recorded.parameter == pytest.approx(norm, rel=1e-6)
    assert recorded.direction == pytest.approx(norm / 2, rel=1e-6)
    # Its ratio is 2, and so the step a tenth of the weight.
    after = np.asarray(optim.masters(state, params))
    np.testing.assert_allclose(after, 0.9 * exact.astype(np.float64), rtol=1e-6)


def test_remainders_are_reported() -> None:
    shapes = {"a": jax.ShapeDtypeStruct((1024, 1024), "bfloat16")}
    for weights, expected in (("stochastic", 0), ("remainder8", 1), ("remainder16", 2)):
        tx = optim.adamw(1e-3, weights=weights)
        report = optim.memory_report(tx, shapes)
        assert report.rows[0].bytes == (2.125 + expected) * 2**20
        assert (weights in report.rows[0].formats) == (expected > 0)
        (row,) = optim.explain(tx, shapes, platform="gpu").rows
        assert row.weights == weights and row.weights in str(
            optim.explain(tx, shapes, platform="gpu")
        )
    wide = {"a": jax.ShapeDtypeStruct((1024, 1024), "float32")}
    assert optim.explain(optim.adamw(1e-3), wide).rows[0].weights == ""


@pytest.mark.parametrize(
    ("weights", "expected"),
    [("stochastic", 10.25), ("remainder8", 12.25), ("remainder16", 14.25)],
)
def test_a_step_moves_so_many_bytes(weights: str, expected: float) -> None:
    p = jax.ShapeDtypeStruct((4096, 1024), jnp.bfloat16)
    tx = optim.adamw(1e-3, weights=weights, backend="triton")
    moved = kernel_bytes(tx, p, p) / (4096 * 1024)
    assert moved == pytest.approx(expected, abs=1e-3)


def test_a_choice_for_each_leaf() -> None:
    params = mixed()
    chosen = {"kernel": "remainder16", "half": "remainder8"}
    tx = optim.adamw(1e-3, weights=chosen.get)
    state = tx.init(params)
    for path, name in chosen.items():
        assert state.remainder[path].dtype == remainder_dtype(name)  # type: ignore
        assert state.remainder[path].shape == params[path].shape
    assert state.remainder["norm"].shape == state.mu_scale["norm"].shape
    assert "weights=by_path" in next(iter(state.extra["format"]))
    params, state = tx.step(jax.tree.map(jnp.ones_like, params), state, params)
    assert not np.asarray(state.remainder["norm"]).any()
    assert np.asarray(state.remainder["kernel"]).any()


def test_a_trainer_that_only_knows_updates_moves_bf16_weights() -> None:
    """Flax' nnx.Optimizer; a step of 1e-4 is a hundredth of a unit."""
    model = nnx.Linear(64, 64, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    before = np.asarray(model.kernel[...], np.float32)
    tx = optim.adam(1e-4, weights="remainder8")
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    grads = jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param))
    for _ in range(30):
        optimizer.update(model, grads)
    moved = np.asarray(model.kernel[...], np.float32) - before
    assert moved.mean() == pytest.approx(-3e-3, rel=0.2)


# -------------------------------------------------------------------------- bad input


def test_what_is_refused_says_why() -> None:
    wide = {"a": jnp.ones((8, 8)), "b": jnp.ones(8, jnp.bfloat16)}
    with pytest.raises(ValueError, match="unknown weights 'bf16'; known are 'nearest'"):
        optim.adam(0.1, weights="bf16")
    with pytest.raises(ValueError, match=r"'remainder8' for 'a': float32 .* bfloat16"):
        optim.adam(0.1, weights="remainder8").init({"a": wide["a"]})
    with pytest.raises(ValueError, match="'remainder8' for 'a': float32"):
        optim.adam(0.1, weights=lambda path: "remainder8").init(wide)
    with pytest.raises(ValueError, match="unknown weights 'fp8' for 'a'"):
        optim.adam(0.1, weights={"a": "fp8", "b": None}).init(wide)
    optim.adam(0.1, weights="remainder8").init(wide)  # of b alone
    short = jnp.ones((64, 64), jnp.bfloat16)
    kept = optim.adam(0.1, weights="remainder8")
    for other in (optim.adam(0.1), optim.adam(0.1, weights="remainder16")):
        with pytest.raises(ValueError, match=r"made by another optimizer|remainder of"):
            kept.step(short, other.init(short), short)
    for tx in (kept, optim.adam(0.1, weights="stochastic")):
        with pytest.raises(ValueError, match="an update depends on what it is added"):
            tx.update(short, tx.init(short))
    tx = optim.adam(0.1)  # without parameters, as in optax
    updates, _ = tx.update(short, tx.init(short))
    np.testing.assert_allclose(updates.astype(jnp.float32), -0.1, rtol=2.0**-8)
    with pytest.raises(ValueError, match="no remainders in this state"):
        optim.masters(tx.init(short), short)
    with pytest.raises(ValueError, match="no remainders in this state"):
        optim.from_masters(tx.init(short), short.astype(jnp.float32))
    with pytest.raises(ValueError, match="remainder of 'a', which is not among"):
        optim.masters(kept.init({"a": short}), {"b": short})
