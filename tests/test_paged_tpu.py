"""Paged steps, compiled for TPUs that are not here: what is where, and when."""

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


def program_of(
    topology: str, spec: P, name: str, shapes: Any, *, init: bool = False, **more: Any
) -> Any:
    """A step with the state of these leaves in host memory; or `init`."""
    device_of("v6e")
    devices = np.array(devices_of(topology))
    mesh = Mesh(devices, ("x",), axis_types=(AxisType.Auto,))
    where = NamedSharding(mesh, spec)
    params = {
        k: jax.ShapeDtypeStruct(shape, "bfloat16", sharding=where)
        for k, shape in shapes.items()
    }
    given = {"page_bytes": MIB, "sharding": where, "backend": "tpu"}
    tx = getattr(optim, name)(1e-3, paged=True, **given, **more)
    return compiled(tx, params, topology, init)


def expect_overlap(scheduled: str, leaves: int) -> None:
    """In the loop of each step: int8 is fetched before the kernel, and done after it.

    The computations of a compiled program stand in the order in which they run.
    """
    bodies = [x.splitlines() for x in scheduled.split("\n}\n") if _KERNEL in x]
    loops = [lines for lines in bodies if any(re.match(_FETCH, x) for x in lines)]
    loops = [lines for lines in loops if not any("ENTRY" in x for x in lines[:2])]
    loops = [lines for lines in loops if any("octavo_step" in x for x in lines)]
    assert len(loops) == leaves
    for lines in loops:
        (kernel,) = (k for k, line in enumerate(lines) if _KERNEL in line)
        begun = [k for k, x in enumerate(lines) if re.match(_FETCH, x)]
        done = [k for k, x in enumerate(lines) if re.match(_FETCHED, x)]
        assert len(begun) == len(done) == 2  # two moments
        assert max(begun) < kernel < min(done)


_KERNEL = 'custom_call_target="tpu_custom_call"'
_FETCH = r" *%dynamic-slice-start\S* = \(\(s8\["
_FETCHED = r" *%dynamic-slice-done\S* = s8\["
# Layers are cut along two axes.
LAYERS = {"up": (6, 512, 1024), "one": (2048, 512)}


@pytest.mark.parametrize(
    ("name", "topology", "spec", "options"),
    [
        ("adamw", "v6e:1x1", P(), {}),
        ("lamb", "v6e:2x4", P(None, "x"), {"layer_axes": 0}),
    ],
)
def test_chunks_of_host_memory(name: str, topology: str, spec: P, options: Any) -> None:
    """Beside parameters and gradients a few chunks, and nothing twice on the host."""
    shapes = LAYERS if name == "adamw" else {"up": LAYERS["up"]}
    program = program_of(topology, spec, name, shapes, **options)
    memory, text = program.memory_analysis(), program.as_text()
    assert memory.temp_size_in_bytes < 4 * MIB
    values = sum(int(np.prod(shape)) for shape in shapes.values())
    state = 2 * values + 4 * values // 32
    assert (
        memory.host_argument_size_in_bytes
        == state // jax.tree.leaves(program.input_shardings)[0].mesh.size
    )
    assert memory.host_alias_size_in_bytes == memory.host_argument_size_in_bytes
    assert memory.host_temp_size_in_bytes == 0
    expect_overlap(text, len(shapes))


def test_init_puts_the_state_there_piece_by_piece() -> None:
    shapes = {"up": (6, 4096, 1024)}
    memory = program_of("v6e:1x1", P(), "adamw", shapes, init=True).memory_analysis()
    values = 6 * 4096 * 1024
    assert memory.host_output_size_in_bytes == 2 * values + 4 * values // 32
    pieces = 2 * 8 * MIB + 2 * 1.5 * MIB  # of codes, and scales
    assert memory.temp_size_in_bytes < pieces + MIB
