"""The Triton kernel's tiles: every layout of blocks gives what XLA gives."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from octavo import optim

from cases import params_and_grads
from kernels import expect_equal_up_to_contraction, interpreted, leaf_of

# Shape, block size, block axis and layers, each for a layout of its own.
LAYOUTS: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "blocks in one thread": ((256, 160), {"block_size": 16}),
    "blocks in two threads": ((512, 160), {"block_size": 32}),
    "blocks in sixteen threads": ((4096, 40), {"block_size": 256}),
    "a partial last block in sixteen threads": ((4100, 9), {"block_size": 256}),
    "blocks of one row": ((1, 2**12), {}),
    "blocks of two rows": ((2, 2**11), {}),
    "contiguous blocks in one thread": ((64,), {"block_size": 8}),
    "contiguous blocks in eight threads": ((4096,), {"block_size": 32}),
    "long contiguous blocks": ((64, 1024), {"block_size": 256, "block_axis": -1}),
    "a partial contiguous block": ((9, 1000), {"block_size": 64, "block_axis": -1}),
    "slots with and without blocks": (
        (512, 40),
        {"state": {"mu": "bf16", "nu": "8bit"}},
    ),
    "slots with blocks in four threads": (
        (1024, 40),
        {"state": {"mu": "8bit", "nu": "32bit"}, "block_size": 64},
    ),
    "layers": ((3, 512, 40), {"layer_axes": 0}),
    "contiguous layers": ((3, 2, 512), {"layer_axes": 0, "block_axis": -1}),
}


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_equals_xla(
    layout: str, in_place: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of LAMB, which has sums and a ratio; one block does not take the last step."""
    shape, options = LAYOUTS[layout]
    p, (g, bad) = params_and_grads(shape, 2)
    bad = bad.reshape(-1).at[7].set(jnp.nan).reshape(shape)
    leaves, before = [], []
    for backend in (interpreted("triton-interpreter", monkeypatch), "xla"):
        tx = optim.lamb(0.01, backend=backend, min_quantized_size=0, **options)
        step = jax.jit(tx.step)
        q, state = step(g, tx.init(p), p)
        before.append(q)
        out, state = (step if in_place else jax.jit(tx.update))(bad, state, q)
        leaves.append(
            leaf_of(out if in_place else None, state, None if in_place else out)
        )
    got, expected = leaves
    expect_equal_up_to_contraction(got, expected)
    moved = np.asarray(got.p != before[0] if in_place else got.g != 0.0)
    assert not moved.reshape(-1)[7]
    assert moved.mean() > 0.9 if layout != "blocks of one row" else moved.any()
