"""The state: its size, its layout, its report, and Flax around it."""

import pickle
import subprocess
import sys
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from octavo import optim
from octavo.pallas_kernels import FORMATS as KERNEL_FORMATS
from octavo.pallas_kernels import SLOW, blocks_of

from cases import FORMATS, RULES

SHAPES = {"w": jax.ShapeDtypeStruct((4096, 4096), jnp.float32)}


def test_8bit_adam_takes_at_most_2_13_bytes_per_parameter() -> None:
    state = optim.adamw(1e-3).init({"w": jnp.zeros((4096, 4096))})
    total = sum(x.nbytes for x in jax.tree.leaves(state))
    assert total / 4096**2 <= 2.13


def test_layout_is_codes_of_the_parameters_shape_and_scales_of_its_rank() -> None:
    state = jax.eval_shape(optim.adam(1e-3).init, SHAPES)
    assert state._fields == ("count", "mu", "nu", "mu_scale", "nu_scale", "extra")
    assert state.mu["w"].shape == (4096, 4096)
    assert state.nu_scale["w"].shape == (128, 4096)
    assert list(state.extra["format"]) == ["mu=ratio8,nu=bits8"]


@pytest.mark.parametrize("stored", FORMATS)
@pytest.mark.parametrize("rule", RULES)
def test_a_state_is_a_named_tuple_of_its_slots(rule: str, stored: str) -> None:
    """Codes for each slot, scales for those that have blocks; it survives pickling."""
    case = RULES[rule]
    tx = case.ours(1e-3, **case.kwargs, state=stored)
    state = tx.init({"w": jnp.zeros((64, 128)), "b": jnp.zeros(8)})
    slots = tx.optimizer.rule.slots
    given = [SLOW.get(stored, stored) if slot.slow else stored for slot in slots]
    formats = [
        KERNEL_FORMATS[form](slot.signed, slot.relative_to is not None)
        for slot, form in zip(slots, given, strict=True)
    ]
    names = [slot.name for slot in slots]
    scales = [f"{n}_scale" for n, f in zip(names, formats, strict=True) if f.quantized]
    assert isinstance(state, optim.State) and isinstance(state, tuple)
    assert state._fields == ("count", *names, *scales, "extra")
    assert state.slots == tuple(names)
    assert list(state.trees) == [*names, *scales]
    for form, name in zip(formats, names, strict=True):
        codes = state.codes(name)
        assert codes.paths == ("b", "w")
        assert [x.shape for x in codes.leaves] == [(8,), (64, 128)]
        assert codes.leaves[1].dtype == form.dtype
        assert (state.scales(name) is None) == (not form.quantized)
    (tag,) = state.extra["format"]
    assert tag == ",".join(f"{n}={f.name}" for n, f in zip(names, formats, strict=True))
    again = pickle.loads(pickle.dumps(state))
    assert type(again) is type(state)
    assert jax.tree.structure(again) == jax.tree.structure(state)


@pytest.mark.parametrize(
    ("shape", "axis", "size"),
    [
        ((4096, 4096), 0, 32),
        ((50257, 768), 0, 32),  # odd: a partial last block
        ((24, 1024, 4096), 1, 32),
        ((768, 12, 64), 0, 32),
        ((12, 64, 768), 1, 4),  # small leaf: 16 blocks
        ((1000, 333), 0, 8),
        ((2**21,), 0, 32),
        ((), None, 1),
    ],
)
def test_blocks_follow_from_the_global_shape(shape: Any, axis: Any, size: int) -> None:
    blocks = blocks_of(shape)
    assert (blocks.axis, blocks.size) == (axis, size)


def test_per_leaf_options() -> None:
    params = {"embed": jnp.ones((512, 64)), "dense": jnp.ones((512, 64))}
    tx = optim.adam(
        1e-3,
        state=lambda path: "32bit" if path == "embed" else "8bit",
        block_axis=lambda path: -1 if path == "dense" else None,
    )
    state = tx.init(params)
    assert state.mu["embed"].dtype == jnp.float32
    assert state.mu_scale["dense"].shape == (512, 16)
    params, state = jax.jit(tx.step)(params, state, params)
    mixed = optim.adam(1e-3, state={"mu": "bf16", "nu": "8bit"}).init(params)
    assert mixed.mu["dense"].dtype == jnp.bfloat16
    assert mixed._fields == ("count", "mu", "nu", "nu_scale", "extra")


@pytest.mark.parametrize("state", FORMATS)
def test_memory_report_counts_every_byte(state: str) -> None:
    params = {
        f"layer_{k}": {"kernel": jnp.ones((256, 64)), "bias": jnp.ones(64)}
        for k in range(3)
    }
    tx = optax.chain(optax.trace(0.9), optim.adamw(1e-3, state=state))
    report = optim.memory_report(tx, params)
    total = sum(x.nbytes for x in jax.tree.leaves(tx.init(params)))
    assert report.bytes == total
    assert [row.pattern for row in report.rows] == ["layer_*/bias", "layer_*/kernel"]
    assert [row.count for row in report.rows] == [3, 3]
    assert report.rows[1].bytes_32bit == 3 * 256 * 64 * 8
    assert report.parameters == 3 * (256 * 64 + 64)
    text = str(report)
    assert "layer_*/kernel" in text and "bytes per parameter" in text


def test_memory_report_of_70b_parameters_computes_nothing() -> None:
    layer = jax.ShapeDtypeStruct((80, 8192, 28672), jnp.bfloat16)
    report = optim.memory_report(optim.adam8bit(1e-3), {"up": layer, "down": layer})
    assert report.parameters == 2 * 80 * 8192 * 28672
    np.testing.assert_allclose(report.bytes / report.parameters, 2.125, rtol=1e-6)


def test_names_fix_the_state() -> None:
    for name, dtype in (("adam8bit", "int8"), ("adamw32bit", "float32")):
        named = getattr(optim, name)
        assert named.__name__ == name
        state = jax.eval_shape(named(1e-3).init, SHAPES)
        assert state.nu["w"].dtype == dtype


class Model(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
        return nn.Dense(128, kernel_init=init)(nn.relu(nn.Dense(64)(x)))


def test_linen_train_state_equals_update_and_apply() -> None:
    model, x = Model(), jnp.ones((4, 32))
    params = model.init(jax.random.key(0), x)["params"]
    tx = optim.adamw(1e-2)
    state = optim.TrainState.create(apply_fn=model.apply, params=params, tx=tx)
    grads = jax.tree.map(jnp.ones_like, params)
    new = jax.jit(lambda s, g: s.apply_gradients(grads=g))(state, grads)
    updates, opt_state = jax.jit(tx.update)(grads, state.opt_state, params)
    # One unit in the last place, of the parameter or of an update of 0.01.
    chex.assert_trees_all_close(
        new.params, optax.apply_updates(params, updates), rtol=2.0**-23, atol=2.0**-30
    )
    chex.assert_trees_all_equal(new.opt_state, opt_state)
    assert new.step == 1
    specs = nn.get_partition_spec(state.opt_state)
    assert (
        specs.mu["Dense_1"]["kernel"]
        == specs.mu_scale["Dense_1"]["kernel"]
        == nn.get_partition_spec(params)["Dense_1"]["kernel"]
    )


def test_train_state_takes_any_transformation() -> None:
    params = {"w": jnp.ones(3)}
    tx = optax.chain(optax.clip(1.0), optim.adam(0.1))
    state = optim.TrainState.create(apply_fn=None, params=params, tx=tx)
    new = state.apply_gradients(grads=params)
    np.testing.assert_allclose(new.params["w"], 0.9, rtol=1e-5)


def test_nnx_optimizer() -> None:
    model = nnx.Linear(64, 128, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optim.adamw(1e-2), wrt=nnx.Param)
    structure = jax.tree.structure(nnx.state(optimizer))
    before = jnp.asarray(model.kernel[...])

    @nnx.jit
    def train(model: Any, optimizer: Any) -> None:
        grads = nnx.grad(lambda m: (m(jnp.ones((2, 64))) ** 2).mean())(model)
        optimizer.update(model, grads)

    for _ in range(2):
        train(model, optimizer)
    assert jax.tree.structure(nnx.state(optimizer)) == structure
    assert (jnp.asarray(model.kernel[...]) != before).any()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("state", FORMATS)
def test_orbax_restores_bit_for_bit(state: str, tmp_path: Any) -> None:
    tx = optim.adam(1e-2, state=state)
    params = {"w": jnp.ones((64, 128)), "b": jnp.ones(8)}
    _, opt_state = tx.step(params, tx.init(params), params)
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        manager.save(1, args=ocp.args.StandardSave(opt_state))
        manager.wait_until_finished()
        target = jax.eval_shape(tx.init, params)
        restored = manager.restore(1, args=ocp.args.StandardRestore(target))
        chex.assert_trees_all_equal(restored, opt_state)
        if state == "8bit":
            other = jax.eval_shape(optim.adam(1e-2, state="dynamic8").init, params)
            with pytest.raises(ValueError):
                manager.restore(1, args=ocp.args.StandardRestore(other))


@pytest.mark.parametrize("folder", ["optim", "pallas_kernels"])
def test_doctests(folder: str) -> None:
    """In a fresh process: their output must not depend on the tests' settings."""
    command = [sys.executable, "-m", "pytest", "--doctest-modules", "-p", "no:xdist"]
    done = subprocess.run(
        # Keras is no dependency: `tests/trainers` has that.
        [*command, "-o", "addopts=-q", "--ignore-glob=*/keras*.py", folder],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_importing_it_imports_neither_flax_nor_orbax_nor_a_kernel() -> None:
    """They are imported when they are first needed."""
    program = (
        "import sys; from octavo import optim, schedules; "
        "late = ('flax', 'orbax.checkpoint', 'rich', 'jax.experimental.pallas'); "
        "assert not [name for name in late if name in sys.modules]; "
        "optim.checkpoint.restore, optim.TrainState; "
        "assert 'flax' in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
