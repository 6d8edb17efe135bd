"""The sums that ratios, clipping and guards rest on: numpy's, on every backend."""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from octavo import optim
from octavo.optim.adam import adam_rule
from octavo.optim.lars import momentum_rule
from octavo.pallas_kernels import (
    FORMATS,
    Blocks,
    Decay,
    Leaf,
    Program,
    Rule,
    Scalars,
    blocks_of,
)
from octavo.pallas_kernels.backends import _memory, xla

from cases import SHAPES, params_and_grads
from test_backends import BACKENDS, expect_equal_up_to_contraction

Shape: TypeAlias = tuple[int, ...]

RATE, DECAY, B1, B2, EPS = 0.01, 0.1, 0.9, 0.999, 1e-6
SUMS = ("p", "g", "x", "bad")
INTERPRETERS = ("tpu-interpreter", "triton-interpreter")
OPTIMIZERS = {"lamb": optim.lamb, "lars": optim.lars}
# What the sums depend on: which moments there are, and where weight decay joins.
RULES: dict[str, Rule] = {
    "lamb": adam_rule(B1, B2, EPS, Decay(DECAY, joins="direction")),
    "lars": replace(
        momentum_rule(0.9, decay=Decay(DECAY, joins="gradient")), scales="gradient"
    ),
}
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


def program_of(rule: str) -> Program:
    """The rule with 8-bit state."""
    slots = RULES[rule].slots
    formats = tuple(FORMATS["8bit"](slot.signed) for slot in slots)
    return Program(RULES[rule], formats, in_place=True)


def optimizer_of(rule: str, layers: Shape = (), **options: Any) -> optim.Transformation:
    """The optimizer that the rule is of."""
    return OPTIMIZERS[rule](
        RATE, weight_decay=DECAY, min_quantized_size=0, layer_axes=layers, **options
    )


@functools.cache
def after_one_step(rule: str, shape: Shape, layers: Shape = ()) -> Any:
    """Parameter, state and next gradient: moments neither zero nor exact.

    Without a ratio, whose sums are what is tested.
    """
    tx = optimizer_of(rule, layers, backend="xla", adapt_mask=False)
    p, (first, second) = params_and_grads(shape, steps=2)
    p, state = jax.jit(tx.step)(first, tx.init(p), p)
    return p, state, second


def scales_of(blocks: Blocks) -> jax.Array:
    """A factor for each layer, so that none can pass for another."""
    return jnp.arange(1.0, 1.0 + blocks.layer_count).reshape(blocks.layer_shape)


def leaf_of(p: Any, state: optim.State, g: Any = None) -> Leaf:
    """The arrays of a tree that is one leaf."""
    return Leaf(g, p, tuple(state.moments.values()), tuple(state.scales.values()))


def decoded(program: Program, blocks: Blocks, leaf: Leaf) -> list[np.ndarray]:
    """The moments, in float64."""
    axis, moments = blocks.axis, []
    assert axis is not None
    for f, codes, scale in zip(program.formats, leaf.codes, leaf.scales, strict=True):
        assert scale is not None
        each = jnp.repeat(scale.astype(jnp.float32), blocks.size, axis=axis)
        each = jax.lax.slice_in_dim(each, 0, codes.shape[axis], axis=axis)
        moments.append(np.asarray(f.decode(codes.astype(jnp.int32), each), np.float64))
    return moments


def float64_sums(
    rule: str, blocks: Blocks, leaf: Leaf, clip: float = 1.0, clip_value: float = np.inf
) -> np.ndarray:
    """Shape (sums, layers), by the formulas of LAMB and LARS."""
    raw, p = np.asarray(leaf.g, np.float64), np.asarray(leaf.p, np.float64)
    g = np.clip(clip * raw, -clip_value, clip_value)
    if rule == "lamb":
        b1, b2 = float(np.float32(B1)), float(np.float32(B2))  # as float32 holds them
        m, v = decoded(program_of(rule), blocks, leaf)
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        x = m / (1 - b1**2) / (np.sqrt(v / (1 - b2**2)) + EPS) + DECAY * p
    else:
        x = g + DECAY * p
    terms = [np.where(np.isfinite(y), y * y, 0.0) for y in (p, g, x)]
    terms.append(np.where(np.isfinite(raw), 0.0, 1.0))
    rest = tuple(k for k in range(raw.ndim) if k not in blocks.layers)
    return np.stack([t.sum(axis=rest).reshape(-1) for t in terms])


def kernel_of(name: str) -> Callable[..., jax.Array]:
    """`leaf_sums` of a row of `BACKENDS`, or of XLA."""
    if name == "xla":
        return xla.leaf_sums
    module, interpret = BACKENDS[name]
    return functools.partial(module.leaf_sums, interpret=interpret)


def interpreted(name: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The backend of a row of `BACKENDS`, which then needs no such device."""
    module, interpret = BACKENDS[name]
    for function in ("leaf_sums", "leaf_step"):
        kernel = functools.partial(getattr(module, function), interpret=interpret)
        monkeypatch.setattr(module, function, kernel)
    return name.split("-")[0]


def measured(name: str, rule: str, blocks: Blocks, leaf: Leaf, **limits: float) -> Any:
    """The sums of a leaf in its second step, compiled."""
    rate = jnp.float32(RATE)
    scalars = Scalars(
        rate,
        RULES[rule].scalars(jnp.float32(2.0), rate),
        decay=jnp.float32(DECAY),
        **{limit: jnp.float32(value) for limit, value in limits.items()},
    )
    sums = functools.partial(kernel_of(name), program_of(rule), blocks, sums=SUMS)
    return jax.jit(sums)(leaf, scalars=scalars)


def expect_sums(
    name: str, rule: str, blocks: Blocks, leaf: Leaf, **limits: float
) -> None:
    """The sums of a backend are those of float64.

    A term takes some 10 roundings, each of 2**-24 at most and doubled by the square:
    2**-19.7. Their errors differ in sign, and the sum's own n roundings do, too, so
    that both average out: it is 2**-24 sqrt(n) that remains, n below 2**17. A tile too
    few or too many would be more than 1 of 100.
    """
    got = measured(name, rule, blocks, leaf, **limits)
    assert got.dtype == jnp.float32
    exact = float64_sums(rule, blocks, leaf, **limits)
    np.testing.assert_allclose(got, exact, rtol=2.0**-19.7 + 2.0**-15.5)
    np.testing.assert_array_equal(got[SUMS.index("bad")], exact[SUMS.index("bad")])


# The simulator is slow: it takes few shapes.
EVERY_BACKEND = [
    (name, shape)
    for name in ("xla", *BACKENDS)
    for shape in SHAPES
    if name != "tpu-simulator" or shape in [(1000, 9), (3, 64, 40)]
]


@pytest.mark.parametrize(("name", "shape"), EVERY_BACKEND, ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_sums_equal_float64(rule: str, name: str, shape: Shape) -> None:
    leaf = leaf_of(*after_one_step(rule, shape))
    expect_sums(name, rule, blocks_of(shape), leaf, **LIMITS["clip and clip_value"])


@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("name", ["xla", *INTERPRETERS])
def test_limits_come_before_what_is_measured(name: str, limits: str) -> None:
    leaf = leaf_of(*after_one_step("lars", (96, 40)))
    expect_sums(name, "lars", blocks_of((96, 40)), leaf, **LIMITS[limits])


@pytest.mark.parametrize("name", ["xla", *BACKENDS])
@pytest.mark.parametrize("rule", RULES)
def test_what_is_not_finite_counts_as_zero_and_is_counted(rule: str, name: str) -> None:
    """In the gradient and in the parameter: at corners, where tiles end, and inside."""
    p, state, g = after_one_step(rule, (96, 40))
    g = g.at[0, 0].set(np.nan).at[95, 39].set(np.inf).at[50, 7].set(-np.inf)
    p = p.at[95, 0].set(np.nan).at[3, 39].set(np.inf)
    leaf, blocks = leaf_of(p, state, g), blocks_of((96, 40))
    with np.errstate(invalid="ignore"):
        expect_sums(name, rule, blocks, leaf, **LIMITS["clip"])


def test_a_limit_of_values_makes_numbers_of_infinities() -> None:
    """As `optax.clip` does; they count as bad all the same."""
    p, state, g = after_one_step("lars", (96, 40))
    g = g.at[0, 0].set(np.nan).at[95, 39].set(-np.inf)
    leaf, blocks = leaf_of(p, state, g), blocks_of((96, 40))
    got = measured("xla", "lars", blocks, leaf, clip_value=2.0)
    sums = dict(zip(SUMS, got, strict=True))
    expected = np.nansum(np.clip(np.asarray(g, np.float64), -2.0, 2.0) ** 2)
    np.testing.assert_allclose(sums["g"], expected, rtol=1e-5)
    assert sums["bad"] == 2


@pytest.mark.parametrize("rule", RULES)
def test_partial_tiles_on_every_axis(
    rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Padding, which holds anything, is not in the sums."""
    monkeypatch.setattr(_memory, "_TILE_VALUES", 1 << 12)
    monkeypatch.setattr(_memory, "_TILE_LANES", 128)
    for shape, layers in (((150, 275), ()), ((275, 3, 150), (1,))):
        leaf = leaf_of(*after_one_step(rule, shape, layers))
        expect_sums("tpu-interpreter", rule, blocks_of(shape, layers=layers), leaf)


# LARS, whose kernels compile faster, everywhere.
LAYERED_RULES = [
    (rule, *leaf)
    for rule in RULES
    for leaf in LAYERED
    if rule == "lars" or leaf == ((2, 3, 64, 40), (0, 1))
]


@pytest.mark.parametrize(("rule", "shape", "layers"), LAYERED_RULES, ids=str)
def test_each_layer_has_sums_of_its_own(rule: str, shape: Shape, layers: Shape) -> None:
    blocks = blocks_of(shape, layers=layers)
    leaf = leaf_of(*after_one_step(rule, shape, layers))
    factors = scales_of(blocks)
    leaf = leaf._replace(g=factors * leaf.g, p=factors * leaf.p)
    expect_sums("xla", rule, blocks, leaf)
    for name in INTERPRETERS:
        if name.split("-")[0] in LAYERED[shape, layers]:
            expect_sums(name, rule, blocks, leaf)
        else:
            with pytest.raises(NotImplementedError, match="left to XLA"):
                measured(name, rule, blocks, leaf)


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
    kernel = interpreted(name, monkeypatch)
    p, state, g = after_one_step(rule, shape, layers)
    p = scales_of(blocks_of(shape, layers=layers)) * p
    options = {"grad_clip_value": 0.5, "adapt_mask": True}
    leaves = []
    for backend in (kernel, "xla"):
        tx = optimizer_of(rule, layers, backend=backend, **options)
        leaves.append(leaf_of(*jax.jit(tx.step)(g, state, p)))
    expect_equal_up_to_contraction(*leaves)
