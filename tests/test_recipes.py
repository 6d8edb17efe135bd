"""CONTRIBUTING's recipes, followed: a format, two rules, a slot, a backend are added.

Each goes through init, step, report, conversion, checkpoint and restore, though nothing
of Octavo knows of it.
"""

import importlib
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from octavo import optim
from octavo.optim import checkpoint
from octavo.optim.storage.table import records_of
from octavo.pallas_kernels import BACKENDS, FORMATS, PLATFORMS, Slot
from octavo.pallas_kernels.backends import xla

from bits import assert_same_bits
from recipes import CASES, MADE, NAMES, NU_MAX, ROWS, WIDE, case, made
from runs import fresh, saved, shapes, step


@pytest.fixture(autouse=True)
def formats(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, make in MADE.items():
        monkeypatch.setitem(FORMATS, name, make)


def params() -> Any:
    rng = np.random.default_rng(0)
    sizes = {"embed": (96, 65), "layer": {"kernel": (64, 256), "bias": (40,)}}
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32),
        sizes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def run(tx: Any, p: Any, steps: int) -> Any:
    """After some steps with the same gradients."""
    state = fresh(tx, p)
    for t in range(steps):
        grads = jax.tree.map(lambda x, t=t: jnp.sin((t + 1.0) * x), p)
        state = step(state, grads)
    return state


@pytest.mark.parametrize("name", NAMES)
def test_it_steps_as_in_32_bits_do(name: str) -> None:
    p = params()
    got, wide = (run(tx, p, 3) for tx in (case(name), WIDE[name]))
    moved = jax.tree.map(jnp.subtract, wide.params, p)
    trees = (got.params, wide.params, moved)
    for x, y, way in zip(*map(jax.tree.leaves, trees), strict=True):
        # An error of 1/14 of the block's largest, in each of three steps, at worst.
        assert jnp.abs(x - y).mean() <= 0.15 * jnp.abs(way).mean()


@pytest.mark.parametrize("name", NAMES)
def test_update_and_step_give_the_same_state(name: str) -> None:
    p, tx = params(), case(name)
    grads = jax.tree.map(jnp.cos, p)
    _, stepped = jax.jit(tx.step)(grads, tx.init(p), p)
    _, updated = jax.jit(tx.update)(grads, tx.init(p), p)
    assert_same_bits(stepped, updated)


@pytest.mark.parametrize("name", NAMES)
def test_it_starts_at_its_initial_value(name: str) -> None:
    p, tx = params(), case(name)
    moments = optim.dequantize(tx.init(p))
    for slot in tx.optimizer.rule.slots:
        for x in jax.tree.leaves(moments[slot.name]):
            # As large as the scale, which is up to a 128th larger: the nearest code.
            np.testing.assert_allclose(x, slot.initial, rtol=1 / 128)


@pytest.mark.parametrize("name", NAMES)
def test_its_report_counts_every_byte(name: str) -> None:
    p, tx = params(), case(name)
    report = optim.memory_report(tx, p)
    assert report.bytes == sum(x.nbytes for x in jax.tree.leaves(tx.init(p)))
    shown = {row.pattern: row.formats for row in report.rows}
    expected = {
        "fp8": "fp8",
        "half bytes": "linear4/bits8",
        "half bytes by path": "linear4/linear4u",
        "half bytes, nu too": "linear4/linear4u",
        "slot nu_max": "bits8",
        "rows alone": "32bit",
        "rows": "bf16/32bit",
    }
    assert shown["layer/kernel"] == expected.get(name, shown["layer/kernel"])


def test_half_bytes_are_half_of_the_bytes() -> None:
    state = case("half bytes").init(params())
    assert state.mu["layer"]["kernel"].shape == (32, 256) or (
        state.mu["layer"]["kernel"].shape == (64, 128)
    )
    assert state.mu["embed"].shape == (48, 65)
    assert state.mu["embed"].dtype == jnp.int8


# A block's largest, of a scale that is up to 2**-7 larger, may have been rounded down
# to code 126 of 127 (of mulaw8, to 58 of 59 parts), or to level 261 of 264: the next
# scale is smaller by as much.
# What is stored moves as far at most: to a nearer code, or with its own. Of bits8 this
# is y, and v moves by up to 15 times as much, where the last of the eight octaves
# begins that y has in one of its own. With ratio8, the root of that moves m, too.
# mulaw8 moves by the whole of it, and float32 rounds that.
MOVED = {
    "bits8": 15 * 3 / 261,
    "ratio8": 1 / 126 + 7.5 * 3 / 261,
    "mulaw8": 1 / 59 + 4e-7,
}


@pytest.mark.parametrize("name", NAMES)
def test_it_converts_to_32_bits_and_back(name: str) -> None:
    state = run(case(name), params(), 2).opt_state
    moments = optim.dequantize(state)
    slot = state.slots[0]
    # Not the 96 % zeros of codes that are read as integers.
    assert (jnp.abs(moments[slot]["embed"]) > 0).mean() > 0.8
    again = optim.dequantize(optim.requantize(state, moments))
    for slot in state.slots:
        k = state.slots.index(slot)
        forms = [record.formats[k].name for record in records_of(state).values()]
        trees = (again[slot], moments[slot])
        for form, x, y in zip(forms, *map(jax.tree.leaves, trees), strict=True):
            np.testing.assert_allclose(x, y, rtol=MOVED.get(form, 0.065))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NAMES)
def test_it_is_saved_restored_and_converted(name: str, tmp_path: Path) -> None:
    tx, wide = case(name), WIDE[name]
    before = run(tx, params(), 2)
    folder = saved(tmp_path / "own", before)
    assert_same_bits(checkpoint.restore(folder, tx, shapes(before)), before)
    if name in ("slot that starts at 0.1, 32 bits", "rows alone"):  # stored alike
        return
    target = fresh(wide, params())
    with pytest.raises(checkpoint.CheckpointError, match="convert=True"):
        checkpoint.restore(folder, wide, target)
    converted = checkpoint.restore(folder, wide, target, convert=True)
    moments = optim.dequantize(before.opt_state)
    for slot in before.opt_state.slots:
        assert_same_bits(getattr(converted.opt_state, slot), moments[slot])
    again = saved(tmp_path / "wide", converted)
    back = checkpoint.restore(again, tx, fresh(tx, params()), convert=True)
    requantized = optim.requantize(before.opt_state, moments)
    assert_same_bits(back.opt_state, requantized)


@pytest.mark.filterwarnings("ignore")
def test_a_new_leaf_starts_at_the_slots_initial_value(tmp_path: Path) -> None:
    tx = CASES["slot that starts at 0.1"]
    folder = saved(tmp_path, run(tx, params(), 2))
    target = fresh(tx, params() | {"head": jnp.ones((64, 96))})
    got = checkpoint.restore(folder, tx, target, partial=True)
    assert_same_bits(got.opt_state.trace["head"], target.opt_state.trace["head"])
    assert optim.dequantize(got.opt_state)["trace"]["head"].min() > 0.09


@pytest.mark.parametrize("name", ["fp8", "slot nu_max", "half bytes"])
def test_it_works_in_nnx_and_optax(name: str) -> None:
    model = nnx.Linear(64, 128, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.chain(case(name)), wrt=nnx.Param)
    grads = nnx.grad(lambda m: (m(jnp.ones((2, 64))) ** 2).mean())(model)
    optimizer.update(model, grads)
    state = case(name).init({"w": jnp.ones((64, 128))})
    slot = state.slots[-1]
    found = optax.tree.get(state, slot)
    assert_same_bits(found, getattr(state, slot))
    assert slot in [path[0].name for path, _ in jax.tree.leaves_with_path(state)]


def test_kernels_take_fp8_and_leave_packed_codes_to_xla() -> None:
    shape = jax.ShapeDtypeStruct((4096, 512), jnp.float32)
    fp8 = optim.explain(case("fp8"), shape, platform="tpu").rows[0]
    assert fp8.backend == "tpu"
    for name in ("half bytes", "rows"):
        row = optim.explain(case(name), shape, platform="tpu").rows[0]
        assert row.backend == "xla" and row.why
    tx = optim.adamw(1e-2, state="linear4", backend="tpu")
    with pytest.raises(ValueError, match="several codes in one byte"):
        optim.explain(tx, shape)


def test_names_that_no_slot_can_have() -> None:
    for name in ("count", "extra", "mu_scale", "not a name"):
        with pytest.raises(ValueError, match="cannot be called"):
            replace(NU_MAX, slots=(Slot(name, signed=True),))


def test_moments_beside_rows_cannot_be_quantized() -> None:
    with pytest.raises(ValueError, match=r"'layer/kernel'.*beside rows.*state='32bit'"):
        made(ROWS).init(params() | {"embed": jnp.ones(3)})


# ------------------------------------------------------------------------ backends


def _refuses(program: Any) -> str | None:
    """Leaves with an odd number of columns: every other one of the test's."""
    return "odd leaves are not for it" if program.storage.shape[-1] % 2 else None


@pytest.fixture
def second_gpu_backend(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Before Triton in the list of GPUs; it notes what it steps."""
    stepped: list[Any] = []

    def run(program: Any, *args: Any, **options: Any) -> Any:
        stepped.append(program.storage.shape)
        return xla.run(program, *args)

    module = types.ModuleType("fake_gpu_backend")
    module.refuses, module.run = _refuses, run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fake_gpu_backend", module)
    monkeypatch.setitem(BACKENDS, "fake", "fake_gpu_backend")
    monkeypatch.setitem(PLATFORMS, "gpu", ("fake", "triton"))
    return stepped


def test_a_second_gpu_backend_falls_back_to_the_first(
    second_gpu_backend: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tree = {
        "even": jnp.ones((96, 64)),
        "odd": jnp.ones((96, 65)),
        "odd, 24": jnp.ones((96, 67)),
    }
    tx = optim.adamw(
        1e-2, block_size=lambda path: 24 if "24" in path else 32, min_quantized_size=0
    )
    rows = {row.path: row for row in optim.explain(tx, tree, platform="gpu").rows}
    assert [rows[k].backend for k in tree] == ["fake", "triton", "xla"]
    assert rows["odd, 24"].why.startswith("fake: odd leaves are not for it; triton: ")

    # Triton runs in JAX' interpreter here.
    triton = importlib.import_module(BACKENDS["triton"])
    kernel = triton.run
    interpreted = lambda *args: kernel(*args, interpret=True)  # noqa: E731
    monkeypatch.setattr(triton, "run", interpreted)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    before = fresh(tx, tree)
    after = step(before, tree)
    assert second_gpu_backend == [(96, 64)]
    monkeypatch.undo()
    folder = saved(tmp_path, after)
    assert_same_bits(checkpoint.restore(folder, tx, shapes(after)), after)
    expected = step(fresh(replaced_backend(tx), tree), tree)
    trees = (after.params, expected.params)
    for x, y in zip(*map(jax.tree.leaves, trees), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6)


def replaced_backend(tx: optim.Transformation) -> optim.Transformation:
    """The same optimizer on XLA."""
    settings = replace(tx.optimizer.settings, backend="xla")
    return optim.Transformation(replace(tx.optimizer, settings=settings))


def test_one_that_is_named_and_refuses_is_an_error(
    second_gpu_backend: list[Any],
) -> None:
    tx = optim.adamw(1e-2, backend="fake")
    with pytest.raises(ValueError, match=r"'odd': backend='fake' .*odd leaves are not"):
        optim.explain(tx, {"odd": jnp.ones((96, 65))})
