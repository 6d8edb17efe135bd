"""Paged steps, compiled for a GPU that is not here: what is in which memory."""

import math
import re
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest
from _topologies import devices_of
from jax._src import core
from jax._src.interpreters import mlir
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from octavo import optim
from octavo.optim.sharding.states import made

from aot import sharding as device_of

MIB = 2**20
VALUES = (65536, 8192)  # 512M


@pytest.fixture
def described(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An H200 whose arguments may be in host memory, as those of a real one.

    JAX' description of an absent GPU has no memories, so the types of arguments do not
    say where they are, and neither does what the compiler is given. Both are added.
    """
    hosted: dict[int, Any] = {}
    typed = core.pytype_aval_mappings[jax.ShapeDtypeStruct]
    lowered = mlir.lower_jaxpr_to_fun

    def with_space(x: Any) -> Any:
        space = jax.memory.Space.Host
        return typed(x).update(memory_space=space) if id(x) in hosted else typed(x)

    def with_kinds(*args: Any, **options: Any) -> Any:
        if options.get("arg_memory_kinds") is not None:
            for side, avals in (("arg", "in_avals"), ("result", "out_avals")):
                spaces = (v.memory_space for v in getattr(args[2], avals))
                kinds = [core.mem_space_to_kind(space) for space in spaces]
                options[f"{side}_memory_kinds"] = kinds
        return lowered(*args, **options)

    monkeypatch.setitem(core.pytype_aval_mappings, jax.ShapeDtypeStruct, with_space)
    monkeypatch.setattr(mlir, "lower_jaxpr_to_fun", with_kinds)
    yield hosted


_KERNEL = "__gpu$xla.gpu.triton"


def _expect_overlap(scheduled: str) -> None:
    """In every loop that has a kernel: int8 is fetched before it, and waited for after.

    The computations of a compiled program stand in the order in which they run.
    """
    bodies = [x for x in scheduled.split("\n}\n") if _KERNEL in x and "-start" in x]
    loops = [
        body.splitlines() for body in bodies if not body.lstrip().startswith("ENTRY")
    ]
    assert loops
    for lines in loops:
        (kernel,) = (k for k, line in enumerate(lines) if _KERNEL in line)
        begun = [k for k, x in enumerate(lines) if re.match(_FETCH, x)]
        done = [k for k, x in enumerate(lines) if re.match(_FETCHED, x)]
        assert len(begun) == len(done) == 2  # two moments
        assert max(begun) < kernel < min(done)


_FETCH = r" *%dynamic-slice-start\S* = \(\(s8\["
_FETCHED = r" *%dynamic-slice-done\S* = s8\["


def compiled(
    hosted: dict[int, Any],
    name: str,
    shapes: dict[str, Any],
    *,
    layer_axes: Any = None,
    init: bool = False,
) -> Any:
    """A step on one H200, with state of these leaves in host memory; or `init`."""
    device_of("sm_90")
    mesh = Mesh(np.array(devices_of("h200:1x1")), ("x",), axis_types=(AxisType.Auto,))
    where = NamedSharding(mesh, P())

    def shape_of(lengths: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(lengths, dtype, sharding=where)

    params = {k: shape_of(lengths, "float32") for k, lengths in shapes.items()}
    options = {"paged": True, "sharding": where, "backend": "triton"}
    tx = getattr(optim, name)(1e-3, **options, layer_axes=layer_axes)
    state, spaces = made(tx, params)

    def placed(x: Any, space: Any) -> Any:
        found = shape_of(x.shape, x.dtype)
        if space == jax.memory.Space.Host:
            hosted[id(found)] = found
        return found

    function: Any = lambda p, s, g: tx.step(g, s, p)  # noqa: E731
    arguments: Any = (params, jax.tree.map(placed, state, spaces), params)
    if init:  # Without an argument, this compiler puts all results on the device.
        function, arguments = (
            lambda p, x: (tx.init(p), x + 1),
            (params, shape_of((), "float32")),
        )
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        step = jax.jit(function, donate_argnums=() if init else (0, 1))
        lowered = step.trace(*arguments).lower(lowering_platforms=("cuda",))
    return lowered.compile()


def test_init_puts_the_state_there_piece_by_piece(described: dict[int, Any]) -> None:
    memory = compiled(described, "adamw", {"w": VALUES}, init=True).memory_analysis()
    codes = 2 * VALUES[0] * VALUES[1]
    assert memory.host_output_size_in_bytes == codes + codes // 16
    pieces = 2 * 8 * MIB  # of codes, and of scales
    assert memory.temp_size_in_bytes < pieces + MIB
    assert memory.host_temp_size_in_bytes < pieces + MIB


@pytest.mark.parametrize(("name", "pages"), [("adamw", 1.0), ("lamb", 1.5)])
def test_a_step_takes_a_few_chunks_beside_the_parameters(
    described: dict[int, Any], name: str, pages: float
) -> None:
    program = compiled(described, name, {"w": VALUES})
    memory, text = program.memory_analysis(), program.as_text()
    page = 64 * MIB
    assert memory.temp_size_in_bytes < pages * page
    assert memory.host_temp_size_in_bytes == 0
    codes = 2 * VALUES[0] * VALUES[1]
    assert memory.host_argument_size_in_bytes == codes + codes // 16
    assert memory.host_alias_size_in_bytes == memory.host_argument_size_in_bytes
    assert text.count(_KERNEL) == (2 if name == "adamw" else 4)
    _expect_overlap(text)


def test_leaves_take_turns(described: dict[int, Any]) -> None:
    """Two of twelve leaves are on the device, though each is but one chunk."""
    shapes = {f"w{k}": (2048, 512) for k in range(12)}
    memory = compiled(described, "adamw", shapes).memory_analysis()
    state = 12 * 2048 * 512 * 2.125
    assert memory.host_argument_size_in_bytes == state
    assert memory.host_temp_size_in_bytes == 0
    # Of each, the state before the step and after it.
    assert memory.temp_size_in_bytes < 2 * 2 / 12 * state


def test_24_stacked_layers(described: dict[int, Any]) -> None:
    widths = {"up": (2048, 8192), "down": (8192, 2048)}
    shapes: Any = {k: (24, *width) for k, width in widths.items()} | {"b": (24, 2048)}
    memory = compiled(described, "adamw", shapes, layer_axes=0).memory_analysis()
    values = sum(math.prod(shapes[k]) for k in widths)
    assert memory.host_argument_size_in_bytes == values * 2.125
    assert memory.host_temp_size_in_bytes == 0
    assert memory.temp_size_in_bytes < 4 * 64 * MIB
