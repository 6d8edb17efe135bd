"""Kernels without their devices: in interpreters, and as the compilers make them."""

import itertools
import re
import sys
from types import ModuleType
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from octavo import optim
from octavo.optim.storage.plan import plan
from octavo.optim.storage.tree import Leaves
from octavo.pallas_kernels import BACKENDS as KERNEL_BACKENDS
from octavo.pallas_kernels import Leaf, Program
from octavo.pallas_kernels.backends import tpu, triton

# Name -> the backend's module, and how it is interpreted.
BACKENDS: dict[str, tuple[ModuleType, Any]] = {
    "tpu-interpreter": (tpu, True),
    "tpu-simulator": (tpu, pltpu.InterpretParams()),
    "triton-interpreter": (triton, True),
}
# The simulator is slow.
INTERPRETERS = tuple(name for name in BACKENDS if name.endswith("interpreter"))
# What a kernel is in a compiled program.
KERNEL = {"tpu": r'custom_call_target="tpu_custom_call"', "triton": "triton"}
_numbers = itertools.count()


def interpreted(name: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A backend of its own that is a row of `BACKENDS`, and needs no such device.

    Never the same one twice: what is compiled for a backend is compiled once, and the
    next test may change the size of its tiles.

    Returns:
      What to give as `backend`; `"xla"`, which needs no interpreter, as it is.
    """
    if name not in BACKENDS:
        return name
    real, interpret = BACKENDS[name]

    def run(*args: Any) -> Any:
        return real.run(*args, interpret=interpret)

    backend = f"{name}-{next(_numbers)}"
    module = ModuleType(f"kernels.{backend}")
    module.refuses, module.run = real.refuses, run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(KERNEL_BACKENDS, backend, module.__name__)
    return backend


def program_of(
    tx: optim.Transformation, p: Any, in_place: bool = True, sums: Any = ()
) -> Program:
    """What an optimizer compiles for a tree that is one leaf."""
    tree = Leaves.of(p)
    records = plan(tx.optimizer.settings, tx.optimizer.rule.slots, tree)
    where = tx.optimizer.places(tree)
    (work,) = tx.optimizer.work(tree, p, records, where, [(p.dtype,)], in_place)
    program = work.program
    return Program(program.rule, program.storage, in_place, sums)


def leaf_of(p: Any, state: optim.State, g: Any = None, path: str = "") -> Leaf:
    """The arrays of one leaf: of the whole tree, if it is one leaf.

    Args:
      p: parameters, or the updates to them.
      state: the state.
      g: gradients.
      path: of the leaf.
    """

    def at(tree: Any) -> Any:
        leaves = None if tree is None else Leaves.of(tree)
        return None if leaves is None else dict(zip(*leaves[:2], strict=True))[path]

    slots = state.slots
    return Leaf(
        at(g),
        at(p),
        tuple(at(getattr(state, slot)) for slot in slots),
        tuple(at(getattr(state, f"{slot}_scale", None)) for slot in slots),
    )


def expect_codes_near(mine: Any, theirs: Any) -> None:
    """One code apart, where they are, in fewer than 1 of 1,000 values."""
    if jnp.issubdtype(mine.dtype, jnp.integer):
        difference = np.abs(mine.astype(jnp.int32) - theirs.astype(jnp.int32))
        codes = 2 ** (8 * mine.dtype.itemsize)
        wrapped = np.minimum(difference, codes - difference)
        assert wrapped.max() <= 1
        assert (wrapped > 0).mean() < 1e-3


def expect_equal_up_to_contraction(got: Leaf, expected: Leaf) -> None:
    """Equal, but for multiply-adds that one compiler contracts and the other does not.

    That moves a moment by one unit in the last place, and so, where it is at the
    border between two codes, moves a code: by one, in fewer than 1 of 1,000 values
    (float32 borders are 2**-17 of a code wide; three steps, several operations).
    """
    chex.assert_trees_all_equal_shapes_and_dtypes(got, expected)
    for mine, theirs in zip(got.codes, expected.codes, strict=True):
        expect_codes_near(mine, theirs)
    for mine, theirs in zip(got.scales, expected.scales, strict=True):
        if mine is not None:
            np.testing.assert_allclose(
                mine.astype(jnp.float32), theirs.astype(jnp.float32), rtol=2.0**-7
            )
    mine, theirs = (x.g if x.p is None else x.p for x in (got, expected))
    # Updates are at most about 3 learning rates; a code is 6 % of one.
    np.testing.assert_allclose(mine, theirs, rtol=1e-6, atol=1e-7)


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
