"""A step compiled for a topology, and what can be read off it."""

import math
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
from _llama import AXES, block_axis, layer_axes, placed
from _optimizers import OPTIMIZERS
from _topologies import devices_of, platform_of
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from octavo import optim

COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "all-to-all",
    "reduce-scatter",
    "collective-permute",
    "collective-broadcast",
    "ragged-all-to-all",
    "send",
    "recv",
)
_KERNELS = {"tpu": "tpu_custom_call", "cuda": "__gpu$xla.gpu.triton"}


@dataclass(frozen=True)
class Case:
    """What is compiled: `axes` of the mesh are `"explicit"` or `"auto"`."""

    topology: str
    optimizer: str
    layers: int
    stacked: bool
    axes: str


@dataclass
class Figures:
    """What a compiled step is like; bytes are those of one device.

    Attributes:
      parameters: in all.
      advice: of `explain`, for leaves whose blocks cross shard boundaries by default.
      slots: moments of each parameter.
      sums: numbers that are reduced for each layer that has a ratio; 0: there is none.
      kernels: in the program.
      collectives: how many of each, of those that there are.
      reduced: numbers in the all-reduces.
      state_bytes: codes and scales.
      scale_bytes: scales.
      expected_state_bytes: from shapes, block sizes and the mesh.
      other_state_bytes: counters and the like, which every device has.
      replicated: codes and scales that every device has.
      moved: results that are not sharded like the arguments whose place they take.
      parameter_bytes: as many as gradients take.
      argument_bytes: parameters, gradients and state, with padding in memory.
      temporary_bytes: beside them.
      unaliased_bytes: of results that do not overwrite an argument.
      lower_seconds: tracing and lowering.
      compile_seconds: by the device's compiler.
    """

    parameters: int
    advice: list[str]
    slots: int
    sums: int
    kernels: int
    collectives: dict[str, int]
    reduced: int
    state_bytes: int
    scale_bytes: int
    expected_state_bytes: float
    other_state_bytes: int
    replicated: list[str]
    moved: list[str]
    parameter_bytes: int
    argument_bytes: int
    temporary_bytes: int
    unaliased_bytes: int
    lower_seconds: float
    compile_seconds: float


def mesh_of(topology: str, axes: str) -> Mesh:
    """All devices, as square as it gets, more of them along `fsdp`."""
    devices = devices_of(topology)
    count = len(devices)
    tensor = max(k for k in range(1, math.isqrt(count) + 1) if count % k == 0)
    types = (AxisType.Explicit if axes == "explicit" else AxisType.Auto,) * 2
    shape = (count // tensor, tensor)
    arranged = mesh_utils.create_device_mesh(
        shape, devices, allow_split_physical_axes=True
    )
    return Mesh(arranged, AXES, axis_types=types)


def figures_of(case: Case, mesh: Mesh) -> Figures:
    """Compile a step, and look at it."""
    shapes, where = placed(case.layers, case.stacked, mesh)
    advice = crossing(shapes, where)
    tx = make_optimizer(case, advice, where)
    params = _put(shapes, where)
    state = _put(
        jax.eval_shape(tx.init, shapes), optim.state_sharding(tx, shapes, where)
    )

    begin = time.perf_counter()
    step = jax.jit(lambda p, s, g: tx.step(g, s, p), donate_argnums=(0, 1))
    platform = platform_of(case.topology)
    lowered = step.trace(params, state, params).lower(lowering_platforms=(platform,))
    middle = time.perf_counter()
    compiled = lowered.compile()
    end = time.perf_counter()

    memory, text = compiled.memory_analysis(), compiled.as_text()
    (_, given, _), _ = compiled.input_shardings
    rule = tx.optimizer.rule
    scales = [x for name, x in state.trees.items() if name not in state.slots]
    return Figures(
        parameters=sum(p.size for p in jax.tree.leaves(shapes)),
        advice=list(advice.values()),
        slots=len(rule.slots),
        sums={None: 0, "direction": 2, "gradient": 3}[rule.scaled],
        kernels=text.count(f'custom_call_target="{_KERNELS[platform]}"'),
        collectives=collectives(text),
        reduced=reduced(text),
        state_bytes=_bytes(state.trees),
        scale_bytes=_bytes(scales),
        expected_state_bytes=len(rule.slots) * expected_bytes(shapes, where, advice),
        other_state_bytes=_bytes((state.count, state.extra)),
        replicated=_paths(_is_whole, given.trees, state.trees),
        moved=_paths(_is_moved, compiled.output_shardings, (params, state)),
        parameter_bytes=_bytes(params),
        argument_bytes=memory.argument_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        unaliased_bytes=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        lower_seconds=middle - begin,
        compile_seconds=end - middle,
    )


def crossing(shapes: Any, shardings: Any) -> dict[str, str]:
    """Leaves whose blocks of 32 cross shard boundaries, and what `explain` advises."""
    tx = optim.adamw(1e-3, layer_axes=layer_axes, block_axis=block_axis)
    report = optim.explain(tx, shapes, shardings, "tpu")
    return {row.path: row.why for row in report.rows if not row.aligned}


def make_optimizer(case: Case, advice: dict[str, str], shardings: Any) -> Any:
    """With explicit axes, the types of the arrays say how they are sharded."""
    options: dict[str, Any] = {} if case.axes == "explicit" else {"sharding": shardings}
    return OPTIMIZERS[case.optimizer].ours(
        1e-3,
        layer_axes=layer_axes,
        block_axis=block_axis,
        block_size=lambda path: block_size(path, advice),
        **options,
    )


def block_size(path: str, advice: dict[str, str]) -> int:
    """The default, or the shorter block that is advised."""
    return 16 if path in advice else 32


def expected_bytes(shapes: Any, shardings: Any, advice: dict[str, str]) -> float:
    """Of one moment on a device: a byte for each value, 2 for a block's scale."""
    total = 0.0
    for (path, p), (_, where) in zip(_named(shapes), _named(shardings), strict=True):
        values = math.prod(where.shard_shape(p.shape))
        total += values * (1 + 2 / block_size(path, advice))
    return total


def collectives(text: str) -> dict[str, int]:
    """How many of each a compiled program has."""
    found = {k: len(re.findall(rf" {k}(?:-start)?\(", text)) for k in COLLECTIVES}
    return {name: count for name, count in found.items() if count}


def reduced(text: str) -> int:
    """Numbers in the all-reduces of a compiled program."""
    types = re.findall(r"= (\S+|\(.*?\)) all-reduce(?:-done)?\(", text)
    shapes = re.findall(r"\w\[([\d,]*)\]", " ".join(types))
    return sum(math.prod(int(n) for n in s.split(",") if n) for s in shapes)


def _named(tree: Any) -> Iterator[tuple[str, Any]]:
    for path, leaf in jax.tree.leaves_with_path(tree):
        yield jax.tree_util.keystr(path, simple=True, separator="/"), leaf


def _put(shapes: Any, shardings: Any) -> Any:
    def each(x: Any, sharding: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(each, shapes, shardings)


def _bytes(tree: Any) -> int:
    """Of one device."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
    )


def _is_whole(sharding: Any, array: Any) -> bool:
    return sharding.shard_shape(array.shape) == array.shape


def _is_moved(sharding: Any, array: Any) -> bool:
    return not sharding.is_equivalent_to(array.sharding, len(array.shape))


def _paths(which: Callable[[Any, Any], bool], shardings: Any, arrays: Any) -> list[str]:
    found = jax.tree.map(which, shardings, arrays)
    return [path for path, yes in _named(found) if yes]
