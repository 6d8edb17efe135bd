"""Compile steps for absent machines and count their kernels, for `static.py`.

`python _static_cases.py OUT FOLDER CASE...`, where a case is `machine:rule:dtype`. The
compilers write to FOLDER, which they read once: hence a process of its own, with the
environment that `static.measure` gives it.
"""

import json
import math
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
from _bundles import bundles_of
from _machines import MACHINES, allowed
from _sass import sass_of
from _topologies import devices_of, platform_of, prepare
from jax.extend.core import jaxprs_in_params
from jax.sharding import AxisType, Mesh, SingleDeviceSharding

from octavo import optim

SHAPE = (4096, 4096)
_MOST_STORED = {"tpu": 4096, "gpu": 16}  # bytes of one store: a register, a vector
# Weights of 16 bits are "stochastic", where the name does not say otherwise.
# "adamw-clipped" has a pass that adds up the squares of the gradients.
RULES: dict[str, Callable[..., optim.Transformation]] = {
    "adamw": optim.adamw,
    "adamw-dynamic8": partial(optim.adamw, state="dynamic8"),
    "adamw-clipped": partial(optim.adamw, grad_clip_norm=1.0),
    "lamb": optim.lamb,
    "lars": optim.lars,
    "sgd": partial(optim.sgd, momentum=0.9),
    "adamw-nearest": partial(optim.adamw, weights="nearest"),
    "adamw-remainder8": partial(optim.adamw, weights="remainder8"),
    "adamw-remainder16": partial(optim.adamw, weights="remainder16"),
}


def rows_of(case: str, folder: Path) -> Iterator[dict[str, Any]]:
    """A row for each kernel of a step on one leaf; the folder is emptied."""
    machine, rule, dtype = case.split(":")
    traced, compiled = _compiled(machine, rule, dtype)
    count = partial(_of_tpu, machine) if machine != "sm_90" else _of_gpu
    for eqn in _kernels(traced.jaxpr.jaxpr):
        name = eqn.params["name"]
        read, written = _bytes(eqn.invars), _bytes(eqn.outvars)
        counted = count(folder, name, eqn.params["grid_mapping"].grid)
        if counted["stored"] < written:
            raise ValueError(f"{case}: a way through {name} does not store all results")
        yield {
            "machine": machine,
            "rule": rule,
            "dtype": dtype,
            "part": name.split("_")[1],
            "bytes": read + written,
            "memory": allowed(machine, read + written),
            **counted,
            "temporaries": compiled.memory_analysis().temp_size_in_bytes,
        }
    empty(folder)


def empty(folder: Path) -> None:
    """What is dumped of one step is tens of megabytes."""
    shutil.rmtree(folder)
    folder.mkdir()


def compile_for(machine: str, function: Callable[..., Any], *args: Any) -> Any:
    """A function of abstract arguments, the first two donated: traced, and compiled."""
    topology = MACHINES[machine].topology
    (device, *_) = devices_of(topology)
    where = SingleDeviceSharding(device)
    mesh = Mesh([device], ("x",), axis_types=(AxisType.Auto,))
    placed = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), args
    )
    donated = tuple(range(min(2, len(args) - 1)))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        traced = jax.jit(function, donate_argnums=donated).trace(*placed)
        lowered = traced.lower(lowering_platforms=(platform_of(topology),))
    return traced, lowered.compile()


def _compiled(machine: str, rule: str, dtype: str) -> Any:
    """Parameters first: XLA pairs donated arrays in order."""
    backend = "triton" if machine == "sm_90" else "tpu"
    tx = RULES[rule](1e-3, backend=backend)
    leaf = jax.ShapeDtypeStruct(SHAPE, dtype)
    state = jax.eval_shape(tx.init, leaf)
    return compile_for(machine, lambda p, s, g: tx.step(g, s, p), leaf, state, leaf)


def _kernels(jaxpr: Any) -> Iterator[Any]:
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "pallas_call":
            yield eqn
        else:
            for inner in jaxprs_in_params(eqn.params):
                yield from _kernels(inner)


def _bytes(variables: Sequence[Any]) -> float:
    """For each value of the leaf."""
    total = sum(v.aval.size * v.aval.dtype.itemsize for v in variables)
    return total / math.prod(SHAPE)


def _of_tpu(
    machine: str, folder: Path, name: str, grid: tuple[int, ...]
) -> dict[str, Any]:
    """Counts for 1,024 values; `stored` is the most bytes that its stores can be."""
    found = bundles_of(folder, name, machine)
    registers, shares = found.values / 1024, found.shares
    busiest = max(shares, key=lambda unit: shares[unit])
    return {
        "count": found.count / registers,
        "aside": found.aside / registers,
        "spills": found.spills / registers,
        "stored": found.stores * _MOST_STORED["tpu"] / found.values,
        "busiest": f"{busiest} {shares[busiest]:.0%}",
        "shares": shares,
    }


def _of_gpu(folder: Path, name: str, grid: tuple[int, ...]) -> dict[str, Any]:
    """Counts for a value; registers and bytes spilled are those of a thread."""
    entry = re.compile(rf"\.entry {name}\(")
    (ptx,) = (file for file in folder.glob("*.ptx") if entry.search(file.read_text()))
    found = sass_of(ptx, name)
    share = found.threads * math.prod(grid) / math.prod(SHAPE)
    return {
        "count": found.count * share,
        "aside": found.aside * share,
        "spills": found.spills,
        "stored": found.stores * share * _MOST_STORED["gpu"],
        "registers": found.registers,
        "barriers": found.barriers,
    }


def main(out: str, folder: str, *cases: str) -> None:
    """Count all cases, and write the rows."""
    prepare()
    rows = [row for case in cases for row in rows_of(case, Path(folder))]
    Path(out).write_text(json.dumps(rows))


if __name__ == "__main__":
    main(*sys.argv[1:])
