"""Paged steps, compiled for a GPU that is not here: what is in which memory."""

import math
import re
from typing import Any

import jax
import numpy as np
import pytest
from _hosted import compiled
from _topologies import devices_of
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from octavo import optim

from aot import sharding as device_of

MIB = 2**20
VALUES = (65536, 8192)  # 512M


_KERNEL = "__gpu$xla.gpu.triton"


def _expect_overlap(scheduled: str, passes: int, moments: int = 2) -> None:
    """In the loop of each pass: int8 is fetched before it, and waited for after.

    The computations of a compiled program stand in the order in which they run.
    """
    bodies = [x for x in scheduled.split("\n}\n") if _KERNEL in x]
    loops = [body.splitlines() for body in bodies if "ENTRY" not in body]
    loops = [lines for lines in loops if any(re.match(_FETCH, x) for x in lines)]
    assert len(loops) == passes
    for lines in loops:
        (kernel,) = (k for k, line in enumerate(lines) if _KERNEL in line)
        begun = [k for k, x in enumerate(lines) if re.match(_FETCH, x)]
        done = [k for k, x in enumerate(lines) if re.match(_FETCHED, x)]
        assert len(begun) == len(done) == moments
        assert max(begun) < kernel < min(done)


_FETCH = r" *%dynamic-slice-start\S* = \(\(s8\["
_FETCHED = r" *%dynamic-slice-done\S* = s8\["


def program_of(
    name: str, shapes: dict[str, Any], *, init: bool = False, **options: Any
) -> Any:
    """A step on one H200, with the state of these leaves in host memory; or `init`."""
    device_of("sm_90")
    mesh = Mesh(np.array(devices_of("h200:1x1")), ("x",), axis_types=(AxisType.Auto,))
    where = NamedSharding(mesh, P())
    params = {
        k: jax.ShapeDtypeStruct(lengths, "float32", sharding=where)
        for k, lengths in shapes.items()
    }
    given = {"paged": True, "sharding": where, "backend": "triton"} | options
    return compiled(getattr(optim, name)(1e-3, **given), params, "h200:1x1", init)


def test_init_puts_the_state_there_piece_by_piece() -> None:
    memory = program_of("adamw", {"w": VALUES}, init=True).memory_analysis()
    codes = 2 * VALUES[0] * VALUES[1]
    assert memory.host_output_size_in_bytes == codes + codes // 16
    pieces = 2 * 8 * MIB  # of codes, and of scales
    assert memory.temp_size_in_bytes < pieces + MIB
    assert memory.host_temp_size_in_bytes < pieces + MIB


@pytest.mark.parametrize(("name", "pages"), [("adamw", 1.0), ("lamb", 1.5)])
def test_a_step_takes_a_few_chunks_beside_the_parameters(
    name: str, pages: float
) -> None:
    program = program_of(name, {"w": VALUES})
    memory, text = program.memory_analysis(), program.as_text()
    page = 64 * MIB
    assert memory.temp_size_in_bytes < pages * page
    assert memory.host_temp_size_in_bytes == 0
    codes = 2 * VALUES[0] * VALUES[1]
    assert memory.host_argument_size_in_bytes == codes + codes // 16
    assert memory.host_alias_size_in_bytes == memory.host_argument_size_in_bytes
    passes = 1 if name == "adamw" else 2
    assert text.count(_KERNEL) == 2 * passes  # the last chunk has a loop of its own
    _expect_overlap(text, passes)


def test_muon_streams_its_momentum_and_keeps_directions() -> None:
    program = program_of("muon", {"w": (2048, 2048)}, page_bytes=4 * MIB)
    memory, text = program.memory_analysis(), program.as_text()
    codes = 2048 * 2048
    assert memory.host_argument_size_in_bytes == codes + codes // 64
    assert memory.host_alias_size_in_bytes == memory.host_argument_size_in_bytes
    assert memory.host_temp_size_in_bytes == 0
    # Three arrays like the matrix, as without pages, in Newton-Schulz.
    assert memory.temp_size_in_bytes < 3 * 16 * MIB + 1.5 * 4 * MIB
    _expect_overlap(text, 1, moments=1)


def test_leaves_take_turns() -> None:
    """Two of twelve leaves are on the device, though each is but two chunks."""
    shapes = {f"w{k}": (2048, 512) for k in range(12)}
    memory = program_of("adamw", shapes).memory_analysis()
    state = 12 * 2048 * 512 * 2.125
    assert memory.host_argument_size_in_bytes == state
    assert memory.host_temp_size_in_bytes == 0
    # A chunk is half of a leaf: its gradient, parameter and state.
    chunk = 2048 * 512 * (4 + 4 + 2.125) / 2
    assert memory.temp_size_in_bytes < 2.5 * chunk


def test_24_stacked_layers() -> None:
    widths = {"up": (2048, 8192), "down": (8192, 2048)}
    shapes: Any = {k: (24, *width) for k, width in widths.items()} | {"b": (24, 2048)}
    memory = program_of("adamw", shapes, layer_axes=0).memory_analysis()
    values = sum(math.prod(shapes[k]) for k in widths)
    assert memory.host_argument_size_in_bytes == values * 2.125
    assert memory.host_temp_size_in_bytes == 0
    assert memory.temp_size_in_bytes < 1.5 * 64 * MIB
