"""Kernels whose counts are known: `python counted.py OUT FOLDER MACHINE`.

A value needs six products and six sums, so that each 1,024 values need 12 slots of a
TPU's vector units and one store, and each value 12 instructions of a GPU, however the
kernel loops. OUT is a JSON object: the kernel's name -> what was counted.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from _bundles import bundles_of
from _sass import sass_of
from _static_cases import compile_for, empty
from _topologies import prepare
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton as plgpu

ROWS, LANES, TILES, PART = 256, 128, 8, 32
_GPU_PART = 512


def work(x: jax.Array) -> jax.Array:
    for _ in range(6):
        x = x * x + 1.0
    return x


def rare(x: jax.Array) -> jax.Array:
    for _ in range(20):
        x = jnp.sqrt(x) + 1.0
    return x


def part(x: Any, out: Any, start: Any, rows: int = PART) -> None:
    """Some rows of a tile."""
    at = pl.ds(start if isinstance(start, int) else pl.multiple_of(start, rows), rows)
    out[at] = work(x[at])


def unrolled(x: Any, out: Any) -> None:
    for start in range(0, ROWS, PART):
        part(x, out, start)


def loop(rows: int, first: int = 0) -> Callable[[Any, Any], None]:
    """A loop over parts that does not start at 0, maybe."""

    def kernel(x: Any, out: Any) -> None:
        @pl.loop(first, first + ROWS // rows)
        def _(k: jax.Array) -> None:
            part(x, out, (k - first) * rows, rows)

    return kernel


def nested(x: Any, out: Any) -> None:
    @pl.loop(0, 4)
    def _(k: jax.Array) -> None:
        @pl.loop(0, 2)
        def _(j: jax.Array) -> None:
            part(x, out, k * 64 + j * 32)


def rarely_more(x: Any, out: Any) -> None:
    """The whole tile once more, in a loop of its own, if it has a large value."""
    loop(PART)(x, out)

    @pl.when(jnp.max(out[...]) > 1e30)
    def _() -> None:
        @pl.loop(0, ROWS // PART)
        def _(k: jax.Array) -> None:
            at = pl.ds(pl.multiple_of(k * PART, PART), PART)
            out[at] = rare(x[at])


def either(x: Any, out: Any) -> None:
    """Two ways for each part, of which one is taken."""

    @pl.loop(0, ROWS // PART)
    def _(k: jax.Array) -> None:
        at = pl.ds(pl.multiple_of(k * PART, PART), PART)

        def often() -> None:
            out[at] = work(x[at])

        def seldom() -> None:
            out[at] = rare(x[at])

        lax.cond(jnp.max(x[at]) > 1e30, seldom, often)


def gpu_loop(parts: int) -> Callable[[Any, Any], None]:
    """So many parts, one after another; few of them are unrolled by the compiler."""

    def kernel(x: Any, out: Any) -> None:
        @pl.loop(0, parts)
        def _(k: jax.Array) -> None:
            first = (pl.program_id(0) * parts + k) * _GPU_PART
            at = first + lax.iota(jnp.int32, _GPU_PART)
            plgpu.store(out.at[at], work(plgpu.load(x.at[at])))

    return kernel


def gpu_rarely_more(x: Any, out: Any) -> None:
    at = pl.program_id(0) * _GPU_PART + lax.iota(jnp.int32, _GPU_PART)
    y = work(plgpu.load(x.at[at]))
    plgpu.store(out.at[at], y)

    @pl.when(jnp.max(y) > 1e30)
    def _() -> None:
        plgpu.store(out.at[at], rare(y))


TPU: dict[str, Callable[[Any, Any], None]] = {
    "unrolled": unrolled,
    "loop_of_2": loop(128),
    "loop_of_8": loop(PART),
    "loop_from_2": loop(PART, first=2),
    "nested": nested,
    "rarely_more": rarely_more,
    "either": either,
}
GPU: dict[str, Callable[[Any, Any], None]] = {
    "loop_of_1": gpu_loop(1),
    "loop_of_32": gpu_loop(32),
    "loop_of_100": gpu_loop(100),
    "rarely_more": gpu_rarely_more,
}


def on_tpu(machine: str, name: str, tiles: int, folder: Path) -> dict[str, Any]:
    tile = pl.BlockSpec((ROWS, LANES), lambda i: (i, 0))
    shape = jax.ShapeDtypeStruct((tiles * ROWS, LANES), jnp.float32)
    call = pl.pallas_call(
        TPU[name], grid=(tiles,), in_specs=[tile], out_specs=tile, out_shape=shape,
        name=name,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
    )  # fmt: skip
    compile_for(machine, call, shape)
    found = bundles_of(folder, name, machine)
    return asdict(found) | {"stores": found.stores}


def on_gpu(name: str, folder: Path) -> dict[str, Any]:
    parts = int(name.rpartition("_")[2]) if name.startswith("loop") else 1
    shape = jax.ShapeDtypeStruct((TILES * parts * _GPU_PART,), jnp.float32)
    call = pl.pallas_call(
        GPU[name], grid=(TILES,), out_shape=shape, name=name,
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
    )  # fmt: skip
    compile_for("sm_90", call, shape)
    (ptx,) = (p for p in folder.glob("*.ptx") if f".entry {name}(" in p.read_text())
    return asdict(sass_of(ptx, name)) | {"values": parts * _GPU_PART}


def main(out: str, name: str, machine: str) -> None:
    prepare()
    folder, found = Path(name), {}
    for kernel in GPU if machine == "sm_90" else TPU:
        if machine == "sm_90":
            found[kernel] = on_gpu(kernel, folder)
        else:
            found[kernel] = on_tpu(machine, kernel, TILES, folder)
        empty(folder)
    if machine != "sm_90":
        found["one_tile"] = on_tpu(machine, "unrolled", 1, folder)
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
