"""The sums that ratios, clipping and guards rest on: numpy's, on every backend."""

import functools
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from octavo import optim
from octavo.pallas_kernels import (
    Blocks,
    Leaf,
    Noise,
    Scalars,
    Storage,
    blocks_of,
    run,
)
from octavo.pallas_kernels.backends import _memory

from cases import ADAPTING, KINDS, RULES, SHAPES, params_and_grads
from kernels import (
    BACKENDS,
    INTERPRETERS,
    expect_equal_up_to_contraction,
    interpreted,
    leaf_of,
    program_of,
)

Shape: TypeAlias = tuple[int, ...]

RATE = 0.01
SUMS = ("p", "g", "x", "bad")
# One with a ratio whose kernels compile fast.
FASTEST = min(ADAPTING, key=lambda rule: len(RULES[rule].slots))
# Limits that some of the gradients of `params_and_grads` exceed, and some do not.
LIMITS: dict[str, dict[str, float]] = {
    "none": {},
    "clip": {"clip": 0.37},
    "clip and clip_value": {"clip": 0.37, "clip_value": 0.5},
}
# (shape, layers) -> the kernels that take it; the others leave it to XLA.
LAYERED: dict[tuple[Shape, Shape], set[str]] = {
    ((3, 64, 40), (0,)): {"tpu", "triton"},
    ((2, 3, 64, 40), (0, 1)): {"tpu", "triton"},
    ((2, 3, 64, 40), (1,)): {"tpu", "triton"},
    ((40, 3, 64), (0,)): {"triton"},  # on sublanes of TPUs
    ((96, 3, 128), (1,)): {"tpu"},  # within the rows of Triton's tiles
    ((4, 512), (0,)): {"triton"},
    ((64, 40, 3), (2,)): {"tpu"},
    ((64, 40), (1,)): set(),
}


def optimizer_of(rule: str, layers: Shape = (), **options: Any) -> optim.Transformation:
    """The optimizer, with 8-bit state."""
    case = RULES[rule]
    return case.ours(
        RATE, **case.kwargs, min_quantized_size=0, layer_axes=layers, **options
    )


@functools.cache
def after_one_step(rule: str, shape: Shape, layers: Shape = ()) -> Any:
    """Parameter, state and next gradient: moments neither zero nor exact.

    Without a ratio, whose sums are what is tested.
    """
    unadapted = {"adapt_mask": False} if rule in ADAPTING else {}
    tx = optimizer_of(rule, layers, backend="xla", **unadapted)
    p, (first, second) = params_and_grads(shape, steps=2)
    p, state = jax.jit(tx.step)(first, tx.init(p), p)
    return p, state, second


def scales_of(blocks: Blocks) -> jax.Array:
    """A factor for each layer, so that none can pass for another."""
    return jnp.arange(1.0, 1.0 + blocks.layer_count).reshape(blocks.layer_shape)


def scalars_of(tx: optim.Transformation, **limits: float) -> Scalars:
    """The operands of the second step."""
    rule, rate = tx.optimizer.rule, jnp.float32(RATE)
    decay = None if rule.decay is None else jnp.float32(tx.optimizer.weight_decay)
    own = rule.scalars(jnp.float32(2.0), rate, tx.optimizer.hyperparameters)
    given = {limit: jnp.float32(value) for limit, value in limits.items()}
    return Scalars(rate, own, decay=decay, **given)


def decoded(storage: Storage, leaf: Leaf) -> list[jax.Array]:
    """The moments of a leaf; first those that others are relative to."""
    found: dict[int, jax.Array] = {}
    order = sorted(enumerate(storage.slots), key=lambda x: x[1].reference is not None)
    for k, slot in order:
        other = None if slot.reference is None else found[slot.reference]
        found[k] = storage.decode(k, leaf.codes[k], leaf.scales[k], other)
    return [found[k] for k in range(len(found))]


def float64_sums(
    tx: optim.Transformation,
    leaf: Leaf,
    clip: float = 1.0,
    clip_value: float = np.inf,
) -> np.ndarray:
    """Shape (sums, layers), by numpy, and by the rule in float64.

    `test_rules` holds that against the papers' formulas.
    """
    storage, rule = program_of(tx, leaf.p).storage, tx.optimizer.rule
    scalars = scalars_of(tx)
    raw, p = np.asarray(leaf.g, np.float64), np.asarray(leaf.p, np.float64)
    g = np.clip(clip * raw, -clip_value, clip_value)
    decay = 0.0 if scalars.decay is None else float(scalars.decay)
    x = g + decay * p if rule.decay == "gradient" else g
    if rule.scales == "direction":
        moments = decoded(storage, leaf)
        with jax.enable_x64(True):
            wide = jax.tree.map(
                lambda y: jnp.asarray(np.asarray(y, np.float64)),
                (x, tuple(moments), scalars.rule),
            )
            x = np.asarray(rule.direction(*wide)[0])
        x = x + decay * p if rule.decay == "direction" else x
    terms = [np.where(np.isfinite(y), y * y, 0.0) for y in (p, g, x)]
    terms.append(np.where(np.isfinite(raw), 0.0, 1.0))
    layers = storage.blocks.layers
    rest = tuple(k for k in range(raw.ndim) if k not in layers)
    return np.stack([t.sum(axis=rest).reshape(-1) for t in terms])


def measured(
    backend: str, tx: optim.Transformation, leaf: Leaf, **limits: float
) -> jax.Array:
    """The sums of a leaf in its second step, compiled."""
    program = program_of(tx, leaf.p, sums=SUMS)
    zero = jnp.int32(0)
    noise = Noise(zero, zero, zero)
    return run(backend, program, leaf, scalars_of(tx, **limits), noise)


def expect_sums(
    backend: str, tx: optim.Transformation, leaf: Leaf, **limits: float
) -> None:
    """The sums of a backend are those of float64.

    A term takes some 10 roundings, each of 2**-24 at most and doubled by the square:
    2**-19.7. Their errors differ in sign, and the sum's own n roundings do, too, so
    that both average out: it is 2**-24 sqrt(n) that remains, n below 2**17. A tile too
    few or too many would be more than 1 of 100.
    """
    got = measured(backend, tx, leaf, **limits)
    assert got.dtype == jnp.float32
    exact = float64_sums(tx, leaf, **limits)
    np.testing.assert_allclose(got, exact, rtol=2.0**-19.7 + 2.0**-15.5)
    np.testing.assert_array_equal(got[SUMS.index("bad")], exact[SUMS.index("bad")])


# The simulator is slow: it takes few shapes. Optimizers without a ratio, whose sums are
# only recorded, take one.
EVERY_BACKEND = [
    (rule, name, shape)
    for rule in KINDS
    for name in ("xla", *BACKENDS)
    for shape in (SHAPES if rule in ADAPTING else [(1000, 9)])
    if name != "tpu-simulator" or shape in [(1000, 9), (3, 64, 40)]
]


@pytest.mark.parametrize(("rule", "name", "shape"), EVERY_BACKEND, ids=str)
def test_sums_equal_float64(
    rule: str, name: str, shape: Shape, monkeypatch: pytest.MonkeyPatch
) -> None:
    p, state, g = after_one_step(rule, shape)
    limits = LIMITS["clip and clip_value"]
    backend = interpreted(name, monkeypatch)
    expect_sums(backend, optimizer_of(rule), leaf_of(p, state, g), **limits)


@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("name", ["xla", *INTERPRETERS])
def test_limits_come_before_what_is_measured(
    name: str, limits: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    p, state, g = after_one_step(FASTEST, (96, 40))
    backend = interpreted(name, monkeypatch)
    leaf = leaf_of(p, state, g)
    expect_sums(backend, optimizer_of(FASTEST), leaf, **LIMITS[limits])


@pytest.mark.parametrize("name", ["xla", *BACKENDS])
@pytest.mark.parametrize("rule", ADAPTING)
def test_what_is_not_finite_counts_as_zero_and_is_counted(
    rule: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the gradient and in the parameter: at corners, where tiles end, and inside."""
    p, state, g = after_one_step(rule, (96, 40))
    g = g.at[0, 0].set(np.nan).at[95, 39].set(np.inf).at[50, 7].set(-np.inf)
    p = p.at[95, 0].set(np.nan).at[3, 39].set(np.inf)
    backend = interpreted(name, monkeypatch)
    with np.errstate(invalid="ignore"):
        leaf = leaf_of(p, state, g)
        expect_sums(backend, optimizer_of(rule), leaf, **LIMITS["clip"])


def test_a_limit_of_values_makes_numbers_of_infinities() -> None:
    """As `optax.clip` does; they count as bad all the same."""
    p, state, g = after_one_step(FASTEST, (96, 40))
    g = g.at[0, 0].set(np.nan).at[95, 39].set(-np.inf)
    leaf = leaf_of(p, state, g)
    got = measured("xla", optimizer_of(FASTEST), leaf, clip_value=2.0)
    sums = dict(zip(SUMS, got, strict=True))
    expected = np.nansum(np.clip(np.asarray(g, np.float64), -2.0, 2.0) ** 2)
    np.testing.assert_allclose(sums["g"], expected, rtol=1e-5)
    assert sums["bad"] == 2


@pytest.mark.parametrize("rule", ADAPTING)
def test_partial_tiles_on_every_axis(
    rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Padding, which holds anything, is not in the sums."""
    monkeypatch.setattr(_memory, "_TILE_VALUES", 1 << 12)
    monkeypatch.setattr(_memory, "_TILE_LANES", 128)
    backend = interpreted("tpu-interpreter", monkeypatch)
    for shape, layers in (((150, 275), ()), ((275, 3, 150), (1,))):
        p, state, g = after_one_step(rule, shape, layers)
        expect_sums(backend, optimizer_of(rule, layers), leaf_of(p, state, g))


# One rule with all of them.
LAYERED_RULES = [
    (rule, *leaf)
    for rule in ADAPTING
    for leaf in LAYERED
    if rule == FASTEST or leaf == ((2, 3, 64, 40), (0, 1))
]


@pytest.mark.parametrize(("rule", "shape", "layers"), LAYERED_RULES, ids=str)
def test_each_layer_has_sums_of_its_own(
    rule: str, shape: Shape, layers: Shape, monkeypatch: pytest.MonkeyPatch
) -> None:
    tx = optimizer_of(rule, layers)
    p, state, g = after_one_step(rule, shape, layers)
    factors = scales_of(blocks_of(shape, layers=layers))
    leaf = leaf_of(factors * p, state, factors * g)
    expect_sums("xla", tx, leaf)
    for name in INTERPRETERS:
        if name.split("-")[0] in LAYERED[shape, layers]:
            expect_sums(interpreted(name, monkeypatch), tx, leaf)
        else:
            why = BACKENDS[name][0].refuses(program_of(tx, leaf.p, sums=SUMS))
            assert why is not None and "left to XLA" in why


STEPS = [
    (rule, name, shape, layers)
    for rule, shape, layers in LAYERED_RULES
    for name in INTERPRETERS
    if name.split("-")[0] in LAYERED[shape, layers]
]


@pytest.mark.parametrize(("rule", "name", "shape", "layers"), STEPS, ids=str)
def test_a_step_of_layers_equals_that_of_xla(
    rule: str, name: str, shape: Shape, layers: Shape, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a limit, and a ratio for each layer."""
    p, state, g = after_one_step(rule, shape, layers)
    p = scales_of(blocks_of(shape, layers=layers)) * p
    options = {"grad_clip_value": 0.5, "adapt_mask": True}
    leaves = []
    for backend in (interpreted(name, monkeypatch), "xla"):
        tx = optimizer_of(rule, layers, backend=backend, **options)
        leaves.append(leaf_of(*jax.jit(tx.step)(g, state, p)))
    expect_equal_up_to_contraction(*leaves)
