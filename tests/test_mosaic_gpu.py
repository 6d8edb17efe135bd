"""The kernel on Pallas' Mosaic GPU backend: what XLA computes, without a GPU.

In the interpreter for Mosaic GPU. Nothing here makes machine code: a GPU's first run
does that.
"""

import math
import re
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from octavo import optim
from octavo.pallas_kernels import BACKENDS, PLATFORMS
from octavo.pallas_kernels.backends import mosaic_gpu, xla
from octavo.pallas_kernels.layout import blocks_of
from octavo.pallas_kernels.program import Noise
from octavo.pallas_kernels.rounding import Draw

import kernels
from aot import compile_for
from cases import params_and_grads
from kernels import (
    expect_equal_up_to_contraction,
    expect_in_place,
    interpreted,
    leaf_of,
    program_of,
)


@pytest.fixture(name="simulated")
def _simulated(monkeypatch: pytest.MonkeyPatch) -> str:
    """A backend that needs no GPU. JAX 0.10 has no public name for its interpreter."""
    params = pytest.importorskip("jax._src.pallas.mosaic_gpu.interpret.params")
    row = mosaic_gpu, params.InterpretGPUParams()
    monkeypatch.setitem(kernels.BACKENDS, "mosaic-gpu-simulator", row)
    return interpreted("mosaic-gpu-simulator", monkeypatch)


# Shape and options, for a way in which rows of blocks follow each other each.
LAYOUTS: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "blocks of 8": ((128, 256), {}),
    "blocks of 16": ((256, 128), {}),
    "blocks of 32": ((512, 128), {}),  # 16 blocks, the fewest
    "axes outside and inside": ((2, 1, 128, 2, 64), {}),
    "a slot without blocks": ((128, 128), {"state": {"mu": "bf16", "nu": "8bit"}}),
    "codes of 16 bits": ((128, 128), {"state": {"mu": "16bit", "nu": "8bit"}}),
    "bfloat16": ((128, 128), {"dtype": jnp.bfloat16}),
    "an update": ((128, 128), {"update": True}),
    "remainders": ((128, 128), {"dtype": jnp.bfloat16, "weights": "remainder8"}),
    "float16": ((128, 128), {"dtype": jnp.float16, "weights": "remainder16"}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_equals_xla(layout: str, simulated: str) -> None:
    """Where one block does not take the last step."""
    shape, options = LAYOUTS[layout]
    dtype, update = options.get("dtype", jnp.float32), options.get("update", False)
    options = {k: x for k, x in options.items() if k in ("state", "weights")}
    p, (g, bad) = params_and_grads(shape, 2, dtype)
    bad = bad.reshape(-1).at[7].set(jnp.nan).reshape(shape)
    leaves, remainders = [], []
    for backend in (simulated, "xla"):
        tx = optim.adamw(0.01, backend=backend, min_quantized_size=0, **options)
        step = jax.jit(tx.step)
        q, state = step(g, tx.init(p), p)
        out, state = (jax.jit(tx.update) if update else step)(bad, state, q)
        leaves.append(leaf_of(None if update else out, state, out if update else None))
        remainders.append(getattr(state, "remainder", jnp.zeros(())))
    got, expected = leaves
    expect_equal_up_to_contraction(got, expected)
    assert np.mean(np.asarray(remainders[0] != remainders[1])) < 1e-2
    moved = np.asarray(got.g != 0.0 if update else got.p != q)
    assert not moved.reshape(-1)[7]
    assert moved.mean() > (0.9 if dtype == jnp.float32 else 0.5)


@pytest.mark.parametrize("parts", [(2, 1, 1, 1), (1, 2, 2, 1), (1, 4, 4, 1)], ids=str)
def test_random_bits_of_shards_are_those_of_xla(parts: tuple[int, ...]) -> None:
    blocks = blocks_of((4, 512, 16, 128))
    shape = tuple(n // k for n, k in zip(blocks.shape, parts, strict=True))
    shard = replace(blocks, shape=shape, whole=blocks.shape)
    noise = Noise(jnp.int32(3), jnp.int32(5), jnp.int32(2**31 - 7))
    of_xla = xla.random_of_blocks(noise, shard)
    rows, inner = math.prod(shape[:1]) * shard.count, math.prod(shape[2:])
    for draw in (Draw(0), Draw(1), Draw(None, 8)):
        expected = of_xla(draw).reshape(rows, shard.size, inner)
        for down in (0, 1, rows - 1):
            across = inner - 128 + jnp.arange(128)
            bits = mosaic_gpu._hashes(shard, noise, jnp.int32(down), across)
            for k in range(shard.size):
                found = mosaic_gpu._random(bits[k % len(bits)], k // len(bits))(draw)
                np.testing.assert_array_equal(found, expected[down, k, -128:])


# Shape, types of the parameter and the gradient, and options.
COMPILED: dict[str, tuple[tuple[int, ...], Any, Any, dict[str, Any]]] = {
    "f32": ((4096, 4096), jnp.float32, jnp.float32, {}),
    "f32-bf16": ((24, 1024, 4096), jnp.float32, jnp.bfloat16, {}),
    "f16": ((768, 12, 64), jnp.float16, jnp.float16, {}),
    "bf16": (
        (4096, 4096),
        jnp.bfloat16,
        jnp.bfloat16,
        {"grad_clip_value": 1.0},
    ),
    "mixed state": (
        (4096, 4096),
        jnp.float32,
        jnp.float32,
        {"state": {"mu": "16bit", "nu": "bf16"}, "block_size": 16},
    ),
}


@pytest.mark.parametrize("case", COMPILED)
def test_step_is_one_kernel_in_place(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(BACKENDS, "mosaic_gpu", mosaic_gpu.__name__)
    shape, *dtypes, options = COMPILED[case]
    p, g = (jax.ShapeDtypeStruct(shape, dtype) for dtype in dtypes)
    tx = optim.adamw(1e-3, backend="mosaic_gpu", **options)
    state = jax.eval_shape(tx.init, p)
    compiled = compile_for(
        "sm_90", lambda p, s, g: tx.step(g, s, p), p, state, g, donate=(0, 1)
    )
    expect_in_place(compiled, math.prod(shape))
    call = r'custom_call_target="mosaic_gpu_v2"'
    assert len(re.findall(call, compiled.as_text())) == 1


REFUSED: list[tuple[tuple[int, ...], dict[str, Any], str]] = [
    ((64, 128), {}, "whole blocks of 8, 16 or 32 values"),
    ((4096, 128), {"block_size": 64}, "whole blocks of 8, 16 or 32 values"),
    ((1002, 1024), {"block_size": 32}, "whole blocks of 8, 16 or 32 values"),
    ((4096, 100), {}, "rows of a multiple of 128 values"),
    ((4096,), {}, "rows of a multiple of 128 values"),
    ((4096, 128), {"state": "32bit"}, "leaves with blocks"),
    ((4096, 128), {"state": "dynamic8"}, "formats of 32bit"),
    ((4, 4096, 128), {"layer_axes": 0}, "no layers"),
    ((2**15, 2**16), {}, "counts in 32 bits"),
]


@pytest.mark.parametrize(("shape", "options", "why"), REFUSED)
def test_what_it_refuses(
    shape: tuple[int, ...], options: dict[str, Any], why: str
) -> None:
    tx = optim.adamw(1e-3, min_quantized_size=0, **options)
    refusal = mosaic_gpu.refuses(
        program_of(tx, jax.ShapeDtypeStruct(shape, jnp.float32))
    )
    assert refusal is not None and why in refusal


def test_it_refuses_sums_and_rows_sharded_apart() -> None:
    p = jax.ShapeDtypeStruct((4096, 16, 128), jnp.float32)
    program = program_of(optim.adamw(1e-3), p)
    assert mosaic_gpu.refuses(program) is None
    assert mosaic_gpu.refuses(program.shard((2, 2, 1))) is None
    for other, why in (
        (program.shard((1, 1, 2)), "contiguous in the whole leaf"),
        (replace(program, sums=("g",)), "no sums"),
    ):
        assert why in str(mosaic_gpu.refuses(other))


def test_it_is_not_chosen_by_itself() -> None:
    """Until a device has run it."""
    assert not any("mosaic_gpu" in names for names in PLATFORMS.values())
