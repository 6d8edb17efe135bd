"""What a step on a mesh compiles to: what it communicates, and where it writes."""

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from _compiled import collectives
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from octavo import optim

from aot import TPUS
from aot import sharding as device_of
from cases import ADAPTING, KINDS, RULES
from kernels import KERNEL, expect_in_place
from meshes import AXES, given, layer_axes, mesh_of, on, values

# As few other tests have them: what is compiled is kept.
EAGER = ("columns", "layers/last", "replicated")
# Sums of a leaf of layers that are spread out, of one sharded along both axes, of one
# that is replicated, and of a small one.
NAMES = ("both", "layers/first", "replicated", "bias")


class Case(NamedTuple):
    """An optimizer with options, and how often its step reduces."""

    make: Callable[..., optim.Transformation]
    options: dict[str, Any]
    reductions: int


CASES: dict[str, Case] = {
    **{
        rule: Case(RULES[rule].ours, RULES[rule].kwargs, int(rule in ADAPTING))
        for rule in KINDS
    },
    "value": Case(optim.adamw, {"grad_clip_value": 1.0}, 0),
    "clip": Case(optim.adamw, {"grad_clip_norm": 1.0}, 1),
    "percentile": Case(optim.adamw, {"percentile_clipping": 20}, 1),
    "skip": Case(optim.adamw, {"skip_nonfinite": True}, 1),
    "unorm": Case(optim.adamw, {"max_unorm": 1.0}, 1),
    "guarded": Case(optim.lamb, {"skip_nonfinite": True, "record_norms": True}, 1),
    # LAMB's direction is no linear function of the gradient: clipping comes before.
    "two": Case(optim.lamb, {"grad_clip_norm": 1.0, "skip_nonfinite": True}, 2),
}


def compiled(tx: optim.Transformation, params: Any, state: Any) -> Any:
    """A step that may overwrite parameters and state."""
    step = jax.jit(lambda p, s, g: tx.step(g, s, p), donate_argnums=(0, 1))
    return step.lower(params, state, params).compile()


@pytest.mark.parametrize(
    ("case", "axes"),
    [(case, "auto") for case in CASES]
    + [(case, "explicit") for case in (*KINDS, "two")],
)
def test_a_step_reduces_once_if_at_all_and_moves_nothing_else(
    case: str, axes: str
) -> None:
    make, options, reductions = CASES[case]
    placed = on(mesh_of("4x2", axes), NAMES)
    tx = make(0.1, layer_axes=layer_axes, **options, **given(axes, placed))
    params = jax.device_put(values(0, NAMES), placed)
    state = compiled_init(tx, params, placed)
    program = compiled(tx, params, state)
    assert collectives(program.as_text()) == (
        {"all-reduce": reductions} if reductions else {}
    )
    expect_each_device_holds_its_shards(program, params, state)


def compiled_init(tx: Any, params: Any, placed: Any) -> Any:
    """A state on the devices that `state_sharding` names."""
    shardings = optim.state_sharding(tx, params, placed)
    return jax.jit(tx.init, out_shardings=shardings)(params)


def expect_each_device_holds_its_shards(program: Any, params: Any, state: Any) -> None:
    """And writes over all of them."""
    expect_in_place(program, smallest_leaf=0)
    leaves = jax.tree.leaves((params, state.trees))
    held = sum(x.addressable_shards[0].data.nbytes for x in leaves)
    alias = program.memory_analysis().alias_size_in_bytes
    small = sum(x.nbytes for x in jax.tree.leaves((state.count, state.extra)))
    assert held <= alias <= held + small


def test_donated_arrays_are_used_up() -> None:
    """The arrays of every device, for parameters and for the state."""
    placed = on(mesh_of("4x2", "explicit"), NAMES)
    tx = optim.lamb(0.1, layer_axes=layer_axes)
    params = jax.device_put(values(0, NAMES), placed)
    state, grads = tx.init(params), jax.device_put(values(1, NAMES), placed)
    step = jax.jit(lambda p, s, g: tx.step(g, s, p), donate_argnums=(0, 1))
    new = step(params, state, grads)
    old = (params, state.trees, state.count)
    assert all(x.is_deleted() for x in jax.tree.leaves(old))
    before = [x.unsafe_buffer_pointer() for x in addressed(new)]
    after = [x.unsafe_buffer_pointer() for x in addressed(step(*new, grads))]
    assert before == after


@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("rule", KINDS)
def test_an_eager_step_is_compiled_once(
    rule: str, axes: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Outside of jit, too: the second step compiles nothing."""
    placed = on(mesh_of("4x2", axes), EAGER)
    case = RULES[rule]
    tx = case.ours(0.1, layer_axes=layer_axes, **case.kwargs, **given(axes, placed))
    params = jax.device_put(values(0, EAGER), placed)
    grads, state = params, tx.init(params)
    compilations = []
    for _ in range(2):
        caplog.clear()
        with jax.log_compiles():
            params, state = tx.step(grads, state, params)
        messages = [r.getMessage() for r in caplog.records]
        compilations.append([m for m in messages if m.startswith("Compiling")])
    first, second = compilations
    passes = [m for m in first if "_in_shards" in m]
    assert len(passes) == case.kernels
    assert not second


def addressed(tree: Any) -> list[Any]:
    """The array of each device of each leaf with several values."""
    leaves = [x for x in jax.tree.leaves(tree) if x.size > 1]
    return [shard.data for x in leaves for shard in x.addressable_shards]


def test_xla_alone_partitions_adamw_without_moving_anything() -> None:
    """Automatic axes, and no sharding given: the step is XLA's."""
    placed = on(mesh_of("4x2", "auto"), NAMES)
    tx = optim.adamw(0.1, layer_axes=layer_axes)
    params = jax.device_put(values(0, NAMES), placed)
    program = compiled(tx, params, compiled_init(tx, params, placed))
    assert collectives(program.as_text()) == {}
    parameters, _ = program.output_shardings
    for name, sharding in placed.items():
        rank = params[name].ndim
        assert parameters[name].is_equivalent_to(sharding, rank)


# For chips: the leaves of a small model, the last without a kernel.
MODEL: dict[str, tuple[tuple[int, ...], P]] = {
    "up": ((1024, 2048), P("d", "m")),
    "down": ((2048, 1024), P("m", "d")),
    "layers/out": ((4, 512, 512), P("d", None, "m")),
    "embed": ((4096, 512), P(("d", "m"))),
    "scale": ((1024,), P("d")),
}


@pytest.mark.parametrize(
    ("case", "axes"),
    [("adamw", "explicit"), ("lamb", "explicit"), ("lamb", "auto"), ("two", "auto")],
)
def test_kernels_on_four_chips(case: str, axes: str) -> None:
    device_of("v6e")  # skips where there is no compiler
    topology = topologies.get_topology_desc(platform="tpu", topology_name=TPUS["v6e"])
    devices = np.array(topology.devices).reshape(2, 2)
    mesh = Mesh(devices, ("d", "m"), axis_types=(AXES[axes],) * 2)
    placed = {name: NamedSharding(mesh, spec) for name, (_, spec) in MODEL.items()}
    make, options, reductions = CASES[case]
    tx = make(
        0.1, layer_axes=layer_axes, backend="tpu", **options, **given(axes, placed)
    )
    params = {
        name: jax.ShapeDtypeStruct(shape, "float32", sharding=placed[name])
        for name, (shape, _) in MODEL.items()
    }
    shardings = optim.state_sharding(tx, params, placed)
    state = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        jax.eval_shape(tx.init, params),
        shardings,
    )
    step = jax.jit(lambda p, s, g: tx.step(g, s, p), donate_argnums=(0, 1))
    lowered = step.trace(params, state, params).lower(lowering_platforms=("tpu",))
    program = lowered.compile()
    assert collectives(program.as_text()) == (
        {"all-reduce": reductions} if reductions else {}
    )
    kernels = len(re.findall(KERNEL["tpu"], program.as_text()))
    passes = 1 + reductions
    assert kernels == passes * (len(MODEL) - 1)
    # The compiler keeps up to 256 KiB for each kernel; the smallest shard has 2 MiB.
    expect_in_place(program, smallest_leaf=kernels * 2**18)
    values = sum(math.prod(shape) for shape, _ in MODEL.values())
    held = (4 + 4 + 2 * (1 + 2 / 16)) * values / 4
    assert program.memory_analysis().argument_size_in_bytes < 1.01 * held
