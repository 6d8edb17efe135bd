"""Without a TPU or a GPU: the compilers accept every kernel, and it works in place."""

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from octavo import optim

from aot import TARGETS, backend_of, compile_for
from cases import ADAPTING, FORMATS, KINDS, OPTIMIZERS, REAL_SHAPES, RULES
from kernels import KERNEL, expect_in_place

DTYPES = {
    "f32": (jnp.float32, jnp.float32),
    "bf16": (jnp.bfloat16, jnp.bfloat16),
    "f32-bf16": (jnp.float32, jnp.bfloat16),
}


def compiled_step(target: str, tx: optim.Transformation, p: Any, g: Any) -> Any:
    """With arguments in the order of the results: XLA pairs donated arrays of equal
    type in that order, and would copy a 32-bit moment into the parameter's place."""
    state = jax.eval_shape(tx.init, p)
    return compile_for(
        target, lambda p, s, g: tx.step(g, s, p), p, state, g, donate=(0, 1)
    )


# All shapes with the default format; the largest and an odd one with all others. TPUs
# with a vector unit for bfloat16 and without, and the GPU, for those.
SOME = ("v5e", "v6e", "sm_90")
STORED = [
    (target, state, dtypes, shape)
    for target in TARGETS
    for state in FORMATS
    for dtypes in DTYPES
    for shape in REAL_SHAPES
    if (state, dtypes) == ("8bit", "f32")
    or (shape in REAL_SHAPES[:1] + REAL_SHAPES[-1:] and state == "8bit")
    or (shape == REAL_SHAPES[-1] and dtypes != "f32-bf16" and target in SOME)
]


@pytest.mark.parametrize(("target", "state", "dtypes", "shape"), STORED, ids=str)
def test_step_is_one_kernel_in_place(
    target: str, state: str, dtypes: str, shape: tuple[int, ...]
) -> None:
    p, g = (jax.ShapeDtypeStruct(shape, t) for t in DTYPES[dtypes])
    tx = optim.adamw(1e-3, state=state, backend=backend_of(target))
    compiled = compiled_step(target, tx, p, g)
    expect_in_place(compiled, smallest_leaf=math.prod(shape))
    assert len(re.findall(KERNEL[backend_of(target)], compiled.as_text())) >= 1


@pytest.mark.parametrize("target", TARGETS)
def test_weights_of_16_bits_are_rounded_in_place(target: str) -> None:
    names = ("stochastic", "remainder8", "remainder16")
    tree = {name: jax.ShapeDtypeStruct((1024, 512), jnp.bfloat16) for name in names}
    backend = backend_of(target)
    tx = optim.adamw(1e-3, weights=lambda path: path, backend=backend)
    compiled = compiled_step(target, tx, tree, tree)
    expect_in_place(compiled, smallest_leaf=1024 * 512)
    assert len(re.findall(KERNEL[backend], compiled.as_text())) >= len(names)


# Of every kind for some, one with a pass and one with two for all, and the others for
# one TPU and the GPU.
LOWERED = [
    (target, rule)
    for target in TARGETS
    for rule in OPTIMIZERS
    if rule in ("adamw", "lamb")
    or (rule in KINDS and target in SOME)
    or target in ("v6e", "sm_90")
]


@pytest.mark.parametrize(("target", "rule"), LOWERED)
def test_every_rule_lowers_and_every_leaf_has_one_kernel_for_each_pass(
    target: str, rule: str
) -> None:
    case = RULES[rule]
    tx = case.ours(1e-3, **case.kwargs, backend=backend_of(target))
    tree = {
        "embed": jax.ShapeDtypeStruct((5000, 2048), jnp.float32),
        "layers": [jax.ShapeDtypeStruct((2048, 2048), jnp.float32) for _ in range(3)],
    }
    compiled = compiled_step(target, tx, tree, tree)
    expect_in_place(compiled, smallest_leaf=2048 * 2048)
    text = compiled.as_text()
    if backend_of(target) == "tpu":
        assert len(re.findall(KERNEL["tpu"], text)) == 4 * case.kernels
    else:
        assert len(re.findall(r"octavo_step\w*", text)) >= 4
        assert bool(re.search(r"octavo_sums\w*", text)) == (case.kernels == 2)


# Tall leaves are transposed in memory, with blocks along lanes: the tile is made twice,
# and what is short there is padded to 128 lanes. Blocks of flat ones have one value.
TALL = [(4096, 100), (8192, 1)]
FLAT = [(1, 2**19), (1, 640, 512)]
NARROW = [(t, s) for t in TARGETS for s in FLAT + (TALL if t == "v5e" else [])]


@pytest.mark.parametrize(("target", "shape"), NARROW, ids=str)
def test_narrow_leaves_fit_in_memory(target: str, shape: tuple[int, ...]) -> None:
    p = jax.ShapeDtypeStruct(shape, jnp.float32)
    for rule in ("adamw", "lamb"):
        case = RULES[rule]
        tx = case.ours(1e-3, **case.kwargs, backend=backend_of(target))
        compiled = compiled_step(target, tx, p, p)
        # A kernel adds up each lane by itself: of a flat leaf, nothing.
        if shape in TALL or rule not in ADAPTING:
            expect_in_place(compiled, math.prod(shape))
