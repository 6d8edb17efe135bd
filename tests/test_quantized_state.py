"""The state of `optim.quantized`: sharded, saved, converted as Octavo's own."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import wrapped
from _compiled import collectives

from octavo import optim
from octavo.optim import checkpoint

from bits import assert_same_bits
from meshes import AXES, given, mesh_of, on, values
from runs import fresh, random, saved, trained

contrib = optax.contrib


@pytest.fixture(autouse=True)
def promotion() -> Any:
    """optax itself relies on implicit promotion."""
    with jax.numpy_dtype_promotion("standard"):
        yield


# ------------------------------------------------------------------------------ meshes

# Blocks whole in every shard, along each axis and both; of layers; and a small leaf.
NAMES = ("rows", "both", "tuple", "layers/first", "bias")


def floats(seed: int, names: tuple[str, ...] = NAMES) -> Any:
    return {k: x.astype(np.float32) for k, x in values(seed, names).items()}


@pytest.fixture(scope="module")
def alone() -> Any:
    """Moments after two steps on one device."""
    with jax.numpy_dtype_promotion("standard"):
        return stepped(optim.quantized(optax.scale_by_adam()), floats(0), floats(1))[1]


def stepped(tx: Any, params: Any, grads: Any) -> Any:
    """The compiled step, and a state after two."""
    state = tx.init(params)
    step = jax.jit(lambda g, s, p: tx.update(g, s, p)[1])
    program = step.lower(grads, state, params).compile()
    for _ in range(2):
        state = program(grads, state, params)
    return program, state


@pytest.mark.parametrize("axes", AXES)
def test_a_mesh_changes_no_bit_and_moves_nothing(axes: str, alone: Any) -> None:
    placed = on(mesh_of("4x2", axes), NAMES)
    tx = optim.quantized(optax.scale_by_adam(), **given(axes, placed))
    params, grads = (jax.device_put(floats(k), placed) for k in (0, 1))
    program, state = stepped(tx, params, grads)
    assert collectives(program.as_text()) == {}
    assert_same_bits(jax.device_get(state), jax.device_get(alone))
    for states in (tx.init(params), state):
        for tree in states.moments["state"].trees.values():
            for leaf, sharding in placed.items():
                x = tree[leaf]
                assert x.sharding.is_equivalent_to(sharding, x.ndim), leaf


@pytest.mark.parametrize("axes", AXES)
def test_blocks_may_cross_shards(axes: str) -> None:
    """64 rows in blocks of 32 over four devices: XLA moves what it has to."""
    mesh = mesh_of("4 rows", axes)
    placed = {"x": jax.NamedSharding(mesh, jax.P("d"))}
    params = {"x": np.ones((64, 1 << 15), np.float32)}
    grads = {"x": floats(1, ("both",))["both"].reshape(64, -1).repeat(256, axis=1)}
    tx = optim.quantized(optax.trace(0.9), block_axis=0, **given(axes, placed))
    one = optim.quantized(optax.trace(0.9), block_axis=0)
    states = [
        stepped(one, params, grads)[1],
        stepped(tx, *(jax.device_put(x, placed) for x in (params, grads)))[1],
    ]
    assert_same_bits(*(jax.device_get(x) for x in states))


def test_the_sharding_of_a_state_of_any_rank() -> None:
    """Rows of a factored moment, one number for a leaf, and what is masked."""
    mesh = mesh_of("4x2", "auto")
    params = {"x": jax.ShapeDtypeStruct((256, 256), jnp.float32)}
    shardings = {"x": jax.NamedSharding(mesh, jax.P("d", "m"))}
    for tx in (
        optax.adafactor(0.1, momentum=0.9),
        optax.novograd(0.1),
        contrib.muon(0.1),
        contrib.schedule_free_adamw(0.1),
    ):
        q = optim.quantized(tx)
        found = optim.state_sharding(q, params, shardings)
        state = jax.jit(q.init, out_shardings=found).eval_shape(params)
        for x, sharding in zip(*map(jax.tree.leaves, (state, found)), strict=True):
            like = x.ndim == 2 and x.dtype != jnp.int32  # but for the table
            assert sharding.spec == (jax.P("d", "m") if like else jax.P()), x


# ------------------------------------------------------------ checkpoints, conversions


@pytest.mark.parametrize("state", ["8bit", "32bit"])
@pytest.mark.parametrize(
    "make",
    [lambda: optax.adam(0.1), lambda: contrib.muon(0.1), lambda: optax.yogi(0.1)],
    ids=["adam", "muon", "yogi"],
)
def test_optax_states_convert_and_come_back(make: Any, state: str) -> None:
    """Exactly in 32 bits; and in 8 whatever is not a moment of a quantized leaf."""
    tx, params = make(), random(0)
    _, theirs = jax.jit(tx.update)(random(1), tx.init(params), params)
    q = optim.quantized(tx, state=state)
    ours = optim.from_optax(q.init(params), theirs)
    back = optim.to_optax(ours, tx.init(params))
    if state == "32bit":
        assert_same_bits(back, theirs)
        return
    small = [jax.tree.leaves(x)[0] for x in (back, theirs)]
    assert_same_bits(*small)  # the counter
    inside = q.inner_state(ours, params)
    for a, b in zip(*map(jax.tree.leaves, (inside, back)), strict=True):
        # A root in one of the programs, a reciprocal root in the other.
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_a_checkpoint_is_restored_and_converted(tmp_path: Path) -> None:
    tx = optim.quantized(optax.adam(0.1), seed=3)
    state = trained(fresh(tx), 2)
    folder = saved(tmp_path / "8", state)
    again = checkpoint.restore(folder, tx, fresh(tx))
    assert_same_bits(again, state)
    dense = optim.quantized(optax.adam(0.1), state="32bit")
    with pytest.raises(checkpoint.CheckpointError, match="convert=True"):
        checkpoint.restore(folder, dense, fresh(dense))
    wide = checkpoint.restore(folder, dense, fresh(dense), convert=True)
    theirs = optim.dequantize(state.opt_state.moments["0"])
    assert_same_bits(wide.opt_state.moments["0"].mu, theirs["mu"])


def test_a_checkpoint_of_optax_is_converted(tmp_path: Path) -> None:
    state = trained(fresh(optax.adam(0.1)), 2)
    folder = saved(tmp_path / "32", state)
    tx = optim.quantized(optax.adam(0.1))
    restored = checkpoint.restore(folder, tx, fresh(tx), convert=True)
    expected = optim.from_optax(tx.init(state.params), state.opt_state)
    part, other = (x.moments["0"] for x in (restored.opt_state, expected))
    assert_same_bits(part.trees, other.trees)
    assert_same_bits(restored.opt_state.rest, expected.rest)


# ------------------------------------------------------------------------------ options


def test_bytes_are_those_that_the_report_says() -> None:
    """2 + 2 * 2 / 32 per parameter of Adam, and 4 of each that is kept."""
    like = {"kernel": jax.ShapeDtypeStruct((4096, 4096), jnp.float32)}
    expected = {
        2.125: optax.adam(0.1),
        1.0625: contrib.muon(0.1),
        5.0625: contrib.schedule_free_adamw(0.1),
        # m2 has 2 bytes and a scale.
        4.1875: contrib.ademamix(0.1),
    }
    for size, tx in expected.items():
        q = optim.quantized(tx)
        report = optim.memory_report(q, like)
        state = jax.eval_shape(q.init, like)
        whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
        assert report.bytes == whole
        # Counters, coefficients and the table are below a kilobyte.
        assert abs(whole / 4096**2 - size) < 1024 / 4096**2


def test_options_of_leaves_and_of_slots() -> None:
    params = {"embed": jnp.zeros((512, 64)), "head": jnp.zeros((64, 512))}
    tx = optim.quantized(
        optax.adam(0.1),
        state=lambda path: "32bit" if path == "embed" else "8bit",
        slots={"0/nu": "bf16"},
        block_size=lambda path: 16,
        block_axis={"embed": 0, "head": 1},
    )
    part = tx.init(params).moments["0"]
    types = {k: (part.mu[k].dtype, part.nu[k].dtype) for k in params}
    assert types == {"embed": ("float32", "bfloat16"), "head": ("int8", "bfloat16")}
    assert part.mu_scale["head"].shape == (64, 32)


def test_seeds_differ_and_steps_do_not_repeat() -> None:
    params, grads = random(0), random(1)

    def codes(seed: int) -> Any:
        tx = optim.quantized(optax.trace(0.0), seed=seed)
        update = jax.jit(tx.update)
        _, one = update(grads, tx.init(params))
        _, two = update(grads, one)
        return [x.moments["state"].trace["embed"] for x in (one, two)]

    (first, second), (other, _) = codes(0), codes(1)
    # Nearly every value lies between two codes.
    assert (first != second).mean() > 0.2
    assert (first != other).mean() > 0.2


def test_the_page_has_the_rows_of_the_program_and_its_bytes() -> None:
    """Of docs/quantized.md, whose distances take too long here."""
    page = (Path(__file__).parents[1] / "docs" / "quantized.md").read_text()
    table = page.partition("| what decides |")[2].partition("```console")[0]
    rows = [line.split("|")[1:4] for line in table.splitlines()[2:] if line]
    assert [row[0].replace("`", "").strip() for row in rows] == list(wrapped.CASES)
    for (_, *shown), case in zip(rows, wrapped.CASES.values(), strict=True):
        tx = case.make(optax.cosine_decay_schedule(case.rate, 1))
        both = tx, optim.quantized(tx, **case.options)
        for number, x in zip(shown, both, strict=True):
            assert abs(float(number) - wrapped.bytes_of(x)) < 0.005
