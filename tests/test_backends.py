"""The kernels compute what XLA computes: in both interpreters, on every format."""

import functools
import warnings
from types import ModuleType
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from octavo import optim
from octavo.optim.adam import adam_rule
from octavo.pallas_kernels import FORMATS as KERNEL_FORMATS
from octavo.pallas_kernels import (
    Decay,
    Leaf,
    Noise,
    Program,
    Scalars,
    backends,
    blocks_of,
    key,
)
from octavo.pallas_kernels.backends import tpu, triton, xla

from cases import FORMATS, SHAPES, params_and_grads

RULE = adam_rule(0.9, 0.999, 1e-8, Decay(0.1, joins="update"))
BACKENDS: dict[str, tuple[ModuleType, Any]] = {
    "tpu-interpreter": (tpu, True),
    "tpu-simulator": (tpu, pltpu.InterpretParams()),
    "triton-interpreter": (triton, True),
}


def run(backend: Any, program: Program, blocks: Any, p: Any, grads: list[Any]) -> Leaf:
    """A few steps from zero state."""
    leaf = Leaf(
        None,
        p,
        tuple(jnp.zeros(p.shape, f.dtype) for f in program.formats),
        tuple(
            jnp.zeros(blocks.scale_shape, jnp.bfloat16) if f.quantized else None
            for f in program.formats
        ),
    )

    @jax.jit
    def step(leaf: Leaf, t: jax.Array) -> Leaf:
        rate, t32 = jnp.float32(0.01), t.astype(jnp.float32)
        scalars = Scalars(rate, RULE.scalars(t32, rate), decay=jnp.float32(0.1))
        noise = Noise(key(0, t, "leaf"), jnp.int32(0))
        return backend(program, blocks, leaf, scalars, noise)

    for t, g in enumerate(grads, 1):
        leaf = step(leaf._replace(g=g), jnp.int32(t))
    return leaf


# The simulator is slow: it takes the default format, in place.
CASES = [
    (name, state, in_place)
    for name in BACKENDS
    for state in FORMATS
    for in_place in (True, False)
    if name != "tpu-simulator" or (state == "8bit" and in_place)
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("name", "state", "in_place"), CASES)
def test_kernel_equals_xla(
    name: str, state: str, shape: tuple[int, ...], in_place: bool
) -> None:
    module, interpret = BACKENDS[name]
    formats = tuple(KERNEL_FORMATS[state](s.signed) for s in RULE.slots)
    program = Program(RULE, formats, in_place)
    blocks = blocks_of(shape)
    p, grads = params_and_grads(shape, steps=3 if in_place else 1)
    kernel = functools.partial(module.leaf_step, interpret=interpret)
    got = run(kernel, program, blocks, p, grads)
    expected = run(xla.leaf_step, program, blocks, p, grads)
    expect_equal_up_to_contraction(got, expected)


def expect_equal_up_to_contraction(got: Leaf, expected: Leaf) -> None:
    """Equal, but for multiply-adds that one compiler contracts and the other does not.

    That moves a moment by one unit in the last place, and so, where it lies at the
    border between two codes, moves a code: by one, in fewer than 1 of 1,000 values
    (float32 borders are 2**-17 of a code wide; three steps, several operations).
    """
    chex.assert_trees_all_equal_shapes_and_dtypes(got, expected)
    for mine, theirs in zip(got.codes, expected.codes, strict=True):
        if jnp.issubdtype(mine.dtype, jnp.integer):
            difference = np.abs(mine.astype(jnp.int32) - theirs.astype(jnp.int32))
            wrapped = np.minimum(difference, 256 - difference)
            assert wrapped.max() <= 1
            assert (wrapped > 0).mean() < 1e-3
    for mine, theirs in zip(got.scales, expected.scales, strict=True):
        if mine is not None:
            np.testing.assert_allclose(
                mine.astype(jnp.float32), theirs.astype(jnp.float32), rtol=2.0**-7
            )
    mine, theirs = (x.g if x.p is None else x.p for x in (got, expected))
    # Updates are at most about 3 learning rates; a code is 6 % of one.
    np.testing.assert_allclose(mine, theirs, rtol=1e-6, atol=1e-7)


def test_partial_tiles_and_several_grid_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    from octavo.pallas_kernels.backends import _memory

    monkeypatch.setattr(_memory, "_TILE_VALUES", 1 << 12)
    monkeypatch.setattr(_memory, "_TILE_LANES", 128)
    formats = tuple(KERNEL_FORMATS["8bit"](s.signed) for s in RULE.slots)
    program = Program(RULE, formats, in_place=True)
    for shape in [(1000, 333), (531, 300), (5, 531, 140), (640, 5, 40)]:
        blocks = blocks_of(shape)
        p, grads = params_and_grads(shape, steps=2)
        kernel = functools.partial(tpu.leaf_step, interpret=True)
        got = run(kernel, program, blocks, p, grads)
        expected = run(xla.leaf_step, program, blocks, p, grads)
        expect_equal_up_to_contraction(got, expected)


@pytest.mark.parametrize(
    ("platform", "devices", "state", "expected"),
    [
        ("cpu", 1, "8bit", "xla"),
        ("tpu", 1, "8bit", "tpu"),
        ("gpu", 1, "8bit", "triton"),
        ("gpu", 1, "32bit", "xla"),  # XLA fuses an unquantized step just as well
        ("gpu", 8, "8bit", "xla"),  # a kernel cannot be partitioned automatically
    ],
)
def test_the_best_backend(
    platform: str,
    devices: int,
    state: str,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    monkeypatch.setattr(backends, "_warned", set())
    formats = tuple(KERNEL_FORMATS[state](s.signed) for s in RULE.slots)
    program = Program(RULE, formats, in_place=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        chosen = [backends.choose(program, local=False) for _ in range(2)]
    assert chosen == [expected] * 2
    assert backends.choose(program, local=True) == (
        {"gpu": "triton"}.get(platform, platform) if state == "8bit" else "xla"
    ).replace("cpu", "xla")
    told = [str(w.message) for w in caught]
    if devices > 1:
        assert len(told) == 1 and "Pass sharding=" in told[0]
    else:
        assert not told


def test_leaves_that_no_kernel_takes_go_to_xla() -> None:
    """1-D on TPU, odd blocks on GPU, blocks along an axis of length 1 on both."""
    for backend, shape, size in (
        ("tpu", (8192,), 32),
        ("triton", (240, 64), 24),
        ("tpu", (1, 8192), 32),
        ("triton", (1, 8192), 32),
    ):
        tx = optim.adam(0.1, backend=backend, min_quantized_size=0, block_size=size)
        p, (g,) = params_and_grads(shape)
        p, state = tx.step(g, tx.init(p), p)
        assert state.moments["mu"].dtype == jnp.int8
