"""Numbers do not depend on the mesh, whatever runs in the shards."""

import functools
import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from _compiled import collectives
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from octavo import optim
from octavo.optim.sharding.geometry import origin, starts
from octavo.pallas_kernels import blocks_of
from octavo.pallas_kernels.backends import _memory, _rows
from octavo.pallas_kernels.layout import positions, wrap
from octavo.pallas_kernels.rounding import hashed

from cases import ADAPTING, KINDS, RULES
from kernels import (
    INTERPRETERS,
    expect_equal_up_to_contraction,
    interpreted,
    leaf_of,
)
from meshes import (
    AXES,
    FEW,
    LEAVES,
    MESHES,
    given,
    layer_axes,
    mesh_of,
    named,
    on,
    shard_of,
    stored,
    values,
)

STEPS = 20


class Case(NamedTuple):
    """An optimizer, and what about it does not depend on the mesh.

    Attributes:
      make: makes it.
      options: for it.
      state: whether the moments are the same, bit for bit. They are where they depend
        on gradients alone: parameters differ by a contraction, and a ratio or a clipped
        gradient by the order in which the shards' sums are added up.
      ulps: by how many units in the last place of a leaf's largest value parameters
        may differ: 1 where compilers contract `p + rate * u`, or not, and 1 for the
        sums, or for moments that differ. (By up to 7 of its own units, in 20 steps,
        where a value is smaller.)
    """

    make: Callable[..., optim.Transformation]
    options: dict[str, Any]
    state: bool
    ulps: int


def case_of(rule: str) -> Case:
    """A row of `RULES`."""
    row = RULES[rule]
    recorded = {"record_norms": True} if rule in ADAPTING else {}
    sums = rule in ADAPTING
    ulps = 1 if row.pure and not sums else 2
    return Case(row.ours, row.kwargs | recorded, row.pure, ulps)


# What AdamW measures with these options, every optimizer does.
OPTIONS: dict[str, dict[str, Any]] = {
    "clipped": {"grad_clip_norm": 1.0, "skip_nonfinite": True},
    "percentile": {"percentile_clipping": 20},
}
CASES: dict[str, Case] = {
    **{rule: case_of(rule) for rule in KINDS},
    **{
        name: Case(optim.adamw, options, state=False, ulps=2)
        for name, options in OPTIONS.items()
    },
}


def optimizer(case: str, **options: Any) -> optim.Transformation:
    """With a format for each leaf, and unbiased rounding."""
    make, own, *_ = CASES[case]
    return make(0.01, state=stored, layer_axes=layer_axes, **own, **options)


def trained(case: str, mesh: str, axes: str, call: str, names: tuple[str, ...]) -> Any:
    """Parameters and state after the steps."""
    placed = on(mesh_of(mesh, axes), names)
    tx = optimizer(case, **given(axes, placed))

    @jax.jit
    def step(params: Any, state: Any, grads: Any) -> Any:
        if call == "step":
            return tx.step(grads, state, params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = jax.device_put(values(0, names), placed)
    state = tx.init(params)
    assert_stored_as_given(state)
    for t in range(1, STEPS + 1):
        params, state = step(params, state, jax.device_put(values(t, names), placed))
    return jax.device_get((params, state))


def assert_stored_as_given(state: optim.State) -> None:
    """Nothing is too small for its format but the bias."""
    types = {"8bit": jnp.int8, "dynamic8": jnp.int8, "bf16": jnp.bfloat16}
    for slot in state.slots:
        types["8bit"] = jnp.int16 if slot == "m2" else jnp.int8  # m2 is slow
        for name, x in getattr(state, slot).items():
            if name not in ("bias", "count"):
                assert x.dtype == types[stored(name)]


@functools.cache
def on_one_device(case: str, names: tuple[str, ...]) -> Any:
    """What the runs on meshes are compared with."""
    return trained(case, "1", "explicit", "step", names)


# Each mesh one way; the square ones in several, and there with all leaves, too. With
# sums and without: what else differs between optimizers is elementwise.
WAYS = [
    ("4x2", "explicit", "step"),
    ("2x4", "auto", "update"),
    ("1", "auto", "update"),
    ("2 rows", "auto", "update"),
    ("4 rows", "explicit", "step"),
    ("8 rows", "explicit", "update"),
    ("8 columns", "auto", "step"),
    ("4x2", "auto", "update"),
    ("2x4", "explicit", "update"),
]
SWEEP = [
    *(
        (case, *way, FEW)
        for case in CASES
        for way in (WAYS if case in ("adamw", "lamb") else WAYS[:2])
    ),
    ("adamw", "4x2", "explicit", "step", tuple(LEAVES)),
    ("lamb", "2x4", "auto", "step", tuple(LEAVES)),
    ("lars", "4x2", "auto", "step", tuple(LEAVES)),
]


@pytest.mark.parametrize(
    ("case", "mesh", "axes", "call", "names"),
    SWEEP,
    ids=["-".join((*row, "all" if x == tuple(LEAVES) else "few")) for *row, x in SWEEP],
)
def test_training_does_not_depend_on_the_mesh(
    case: str, mesh: str, axes: str, call: str, names: tuple[str, ...]
) -> None:
    got, got_state = trained(case, mesh, axes, call, names)
    expected, expected_state = on_one_device(case, names)
    expect_same_parameters(got, expected, values(0, names), CASES[case])
    expect_same_state(got_state, expected_state, CASES[case].state)


# Of the values, how many may differ where the state does. Sums differ by 2**-22 of
# themselves, and so does what they scale: by 1e-5 of one of the 127 steps of a momentum
# or of m / sqrt(v), or the 264 of v's eighth root. In each step 1 of 100,000 values
# crosses a border, and is off for some ten steps.
RARE = 1e-4
# Of numbers in bfloat16 there are 185 to each e: moments and the scales of blocks,
# with which a block's parameters differ.
RARE_BF16 = 16 * RARE
NARROW = [name for name, leaf in LEAVES.items() if leaf.dtype == "bfloat16"]


def expect_same_parameters(
    got: Mapping[str, Any], expected: Mapping[str, Any], start: Any, case: Case
) -> None:
    """Equal up to some units in the last place of a leaf's largest value.

    But where a code or a scale differed meanwhile. Rounded to the other side, a
    momentum differs by 1 % of its block's largest, m / sqrt(v) by 6 % of a step, and by
    0.9 of that a step later; sqrt(v), for longer, by 12 % where v is 1e-5 of its
    block's largest, and by 3 % near it: in sum, by a tenth of what 20 steps can move a
    parameter. And parameters in bfloat16 are rounded to the other side, too.
    """
    apart, rare = 0, 0.0
    for name, mine in got.items():
        theirs = np.asarray(expected[name], np.float64)
        difference = np.abs(np.asarray(mine, np.float64) - theirs)
        unit = np.spacing(np.abs(theirs).max().astype(np.float32))
        limit, wide = case.ulps * unit, mine.dtype == jnp.bfloat16
        apart += (difference > limit).sum()
        if not case.state or (wide and case.ulps > 1):
            rare += RARE_BF16 * difference.size
        moved = np.abs(theirs - np.asarray(start[name], np.float64)).max()
        assert moved > 0.01 or name == "count"
        worst = max(limit, 0.12 * moved, 2**16 * unit if wide else 0.0)
        assert difference.max() <= worst, name
    assert apart <= rare


def expect_same_state(got: optim.State, expected: optim.State, bitwise: bool) -> None:
    """Equal; or codes and scales off by one, a few of them."""
    mine, theirs = named(got), named(expected)
    assert mine.keys() == theirs.keys()
    apart, further, rare = 0, 0, 0.0
    # A parameter in bfloat16, rounded to the other side, is in the norms.
    leaves = got.codes(got.slots[0]).paths
    full = [k for k, leaf in enumerate(leaves) if leaf not in NARROW]
    for path, x in mine.items():
        y = theirs[path]
        assert (x.dtype, x.shape) == (y.dtype, y.shape), path
        if path.startswith("extra/norms"):  # one row for each leaf
            np.testing.assert_allclose(x[full], y[full], rtol=1e-6, err_msg=path)
        elif bitwise or x.dtype == np.int32:
            np.testing.assert_array_equal(x, y, path)
        elif x.dtype == np.float32:
            largest = np.abs(y).max(initial=0.0)
            np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-6 * largest)
        else:
            steps = code_steps(x, y)
            # mulaw8: a step at the largest is eight of those near zero.
            near = 8 if path.startswith("trace") else 1
            apart, further = apart + (steps > 0).sum(), further + (steps > near).sum()
            rare += (RARE if x.dtype == np.int8 else RARE_BF16) * x.size
    assert apart <= rare
    # A moment that was off, and then almost cancelled by a gradient, is off by more.
    assert further <= max(1, 0.1 * apart)


def code_steps(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """How many codes, or numbers in bfloat16, are between."""
    wide = np.int8 if x.dtype == np.int8 else np.int16
    distance = np.abs(x.view(wide).astype(np.int32) - y.view(wide).astype(np.int32))
    return np.minimum(distance, 2 ** (8 * x.itemsize) - distance)


POSITIONS = [
    (name, mesh)
    for name in ("both", "swapped", "tuple", "layers/first", "layers/last", "vector")
    for mesh in ("4x2", "8 rows", "8 columns")
]


@pytest.mark.parametrize(("name", "mesh"), POSITIONS)
def test_random_bits_of_the_shards_are_those_of_the_whole(name: str, mesh: str) -> None:
    blocks = blocks_of(LEAVES[name].shape)
    sharding = on(mesh_of(mesh, "explicit"))[name]
    part = shard_of(blocks, sharding)
    key = jnp.int32(12345)

    def local() -> jax.Array:
        start = origin(part, sharding)
        return hashed(key, positions(part.shape, part.strides, start))

    got = jax.jit(
        jax.shard_map(
            local,
            mesh=sharding.mesh,
            in_specs=(),
            out_specs=sharding.spec,
            check_vma=False,
        )
    )()
    expected = hashed(key, positions(blocks.shape, blocks.strides, 0))
    np.testing.assert_array_equal(got, expected)
    assert len(np.unique(expected)) == expected.size  # no two positions alike


@pytest.mark.parametrize("spec", [P("d", "m"), P(("m", "d")), P(None, ("d", "m"))])
def test_positions_wrap_around_in_leaves_of_2_to_the_34_values(spec: P) -> None:
    sharding = NamedSharding(mesh_of("4x2", "explicit"), spec)
    part = shard_of(blocks_of((2**18, 2**16)), sharding)

    def local() -> jax.Array:
        first = [origin(part, sharding), *starts(part, sharding)]
        return jnp.stack(first).reshape(1, 1, 3)

    everywhere = jax.shard_map(
        local, mesh=sharding.mesh, in_specs=(), out_specs=P("d", "m"), check_vma=False
    )
    found = np.asarray(jax.jit(everywhere)()).reshape(8, 3)
    for position, row, column in found.tolist():
        assert position == wrap(row * 2**16 + column)
    assert len({(row, column) for _, row, column in found.tolist()}) == 8


# Of rank 2 and up, in formats that take a kernel.
WITH_KERNELS = ("rows", "columns", "both", "layers/first", "replicated")


def stepped(case: str, backend: str, mesh: str) -> Any:
    """Parameters and state; checks that every leaf has its kernels.

    After three steps, or one where moments see parameters: a last bit of those may be
    another code of theirs, and that is another parameter next time.
    """
    placed = on(mesh_of(mesh, "explicit"), WITH_KERNELS)
    tx = optimizer(case, backend=backend)
    params = jax.device_put(values(0, WITH_KERNELS), placed)
    step, state = jax.jit(tx.step), tx.init(params)
    grads = [jax.device_put(values(t, WITH_KERNELS), placed) for t in (1, 2, 3)]
    kernels = 0 if backend == "xla" else RULES[case].kernels * len(WITH_KERNELS)
    traced = str(step.trace(grads[0], state, params).jaxpr)
    assert traced.count("pallas_call[") == kernels
    for g in grads if RULES[case].pure else grads[:1]:
        params, state = step(g, state, params)
    return jax.device_get((params, state))


@functools.cache
def stepped_by_xla(case: str) -> Any:
    """On one device."""
    return stepped(case, "xla", "1")


@pytest.mark.parametrize("case", KINDS)
@pytest.mark.parametrize("name", INTERPRETERS)
def test_kernels_in_shards_equal_xla_on_one_device(
    case: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In several tiles a shard: the positions are those of the whole leaf."""
    monkeypatch.setattr(_memory, "_TILE_VALUES", 1 << 10)
    monkeypatch.setattr(_rows, "_THREADS", 32)
    backend = interpreted(name, monkeypatch)
    trees = stepped(case, backend, "4x2"), stepped_by_xla(case)
    for path in WITH_KERNELS:
        expect_equal_up_to_contraction(*(leaf_of(*tree, path=path) for tree in trees))


# 18 rows a device, in blocks of 4; 12 columns, of layers.
CROSSING: dict[str, tuple[tuple[int, ...], P]] = {
    "odd": ((72, 64), P("d")),
    "layers/odd": ((3, 72, 64), P(None, "d", "m")),
    "even": ((128, 64), P("d", "m")),
}


@pytest.mark.parametrize("axes", AXES)
def test_blocks_that_cross_shards_cost_a_warning_and_no_number(
    axes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("octavo.optim.checks._given", set())
    rng = np.random.default_rng(0)
    shapes = {name: shape for name, (shape, _) in CROSSING.items()}
    trees = [
        {
            name: rng.normal(size=shape).astype(np.float32)
            for name, shape in shapes.items()
        }
        for _ in range(4)
    ]
    results = {}
    for mesh in ("1", "4x2"):
        whole = mesh_of(mesh, axes)
        specs = {k: P() if mesh == "1" else spec for k, (_, spec) in CROSSING.items()}
        placed = {name: NamedSharding(whole, spec) for name, spec in specs.items()}
        make, options, *_ = CASES["lamb"]
        tx = make(0.01, layer_axes=layer_axes, **options, **given(axes, placed))
        params, *grads = (jax.device_put(tree, placed) for tree in trees)
        state = tx.init(params)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step = jax.jit(tx.step).lower(grads[0], state, params).compile()
            jax.eval_shape(tx.update, grads[0], state, params)
        for g in grads:
            params, state = step(g, state, params)
        messages = [str(w.message) for w in caught]
        if mesh == "1":
            assert not messages
        else:
            (message,) = messages
            assert re.search(
                r"'odd' of shape \(72, 64\) with P\('d',( None)?\)", message
            )
            crossing = "blocks of 4 along axis 0 cross the boundaries of its shards of"
            assert f"{crossing} 18" in message
            assert message.count("block_axis=1 fits") == 1
            assert message.count("block_axis=2 fits") == 1
            assert "'even'" not in message
            assert "all-gather" in collectives(step.as_text())
            for name, sharding in placed.items():
                assert params[name].sharding.is_equivalent_to(
                    sharding, params[name].ndim
                )
        results[mesh] = jax.device_get((params, state))
    (got, got_state), (expected, expected_state) = results["4x2"], results["1"]
    expect_same_parameters(got, expected, trees[0], CASES["lamb"])
    expect_same_state(got_state, expected_state, bitwise=True)


def test_every_mesh_has_its_devices() -> None:
    for name, shape in MESHES.items():
        assert mesh_of(name, "auto").size == np.prod(list(shape.values()))
