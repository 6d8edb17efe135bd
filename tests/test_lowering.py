"""Without a TPU or a GPU: the compilers accept every kernel, and it works in place."""

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from octavo import optim

from aot import TARGETS, backend_of, compile_for
from cases import FORMATS, REAL_SHAPES, RULES

DTYPES = {
    "f32": (jnp.float32, jnp.float32),
    "bf16": (jnp.bfloat16, jnp.bfloat16),
    "f32-bf16": (jnp.float32, jnp.bfloat16),
}
KERNEL = {"tpu": r'custom_call_target="tpu_custom_call"', "triton": "triton"}


def compiled_step(target: str, tx: optim.Transformation, p: Any, g: Any) -> Any:
    """With arguments in the order of the results: XLA pairs donated arrays of equal
    type in that order, and would copy a 32-bit moment into the parameter's place."""
    state = jax.eval_shape(tx.init, p)
    return compile_for(
        target, lambda p, s, g: tx.step(g, s, p), p, state, g, donate=(0, 1)
    )


# Mixed types once, with the default format.
STORED = [(s, d) for s in FORMATS for d in DTYPES if d != "f32-bf16" or s == "8bit"]


@pytest.mark.parametrize("shape", REAL_SHAPES, ids=str)
@pytest.mark.parametrize(("state", "dtypes"), STORED)
@pytest.mark.parametrize("target", TARGETS)
def test_step_is_one_kernel_in_place(
    target: str, state: str, dtypes: str, shape: tuple[int, ...]
) -> None:
    p, g = (jax.ShapeDtypeStruct(shape, t) for t in DTYPES[dtypes])
    tx = optim.adamw(1e-3, state=state, backend=backend_of(target))
    compiled = compiled_step(target, tx, p, g)
    expect_in_place(compiled, smallest_leaf=math.prod(shape))
    assert len(re.findall(KERNEL[backend_of(target)], compiled.as_text())) >= 1


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("target", TARGETS)
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


@pytest.mark.parametrize("shape", [(4096, 100), (4096, 1000)], ids=str)
@pytest.mark.parametrize("target", ["v5e", "v5p"])
def test_blocks_along_lanes_fit_in_memory(target: str, shape: tuple[int, ...]) -> None:
    """Tall leaves lie transposed, with blocks along lanes: the tile is made twice."""
    p = jax.ShapeDtypeStruct(shape, jnp.float32)
    for make in (optim.adamw, optim.lamb):
        expect_in_place(
            compiled_step(target, make(1e-3, backend="tpu"), p, p), math.prod(shape)
        )


def expect_in_place(compiled: Any, smallest_leaf: int) -> None:
    """Every output overwrites its input; nothing of a leaf's size is allocated.

    The compilers keep some scratch whatever the program: up to 256 KiB.
    """
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes > 0
    assert memory.output_size_in_bytes - memory.alias_size_in_bytes <= 1024
    assert memory.temp_size_in_bytes < max(smallest_leaf, 2**18)
    outputs = compiled.out_info
    aliased = re.search(r"input_output_alias=\{(.*?)\}, ?entry", compiled.as_text())
    assert aliased is not None
    assert aliased.group(1).count("alias)") == len(jax.tree.leaves(outputs))
