"""Where a leaf's step runs: a kernel where there is one for the device, else XLA.

A backend is a module with `leaf_step(program, blocks, leaf, scalars, noise)` and
`leaf_sums(program, blocks, leaf, scalars, sums)`. They raise `NotImplementedError` for
a leaf that they cannot take, which then goes to XLA.
"""

import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import jax

from ..layout import Blocks
from ..norms import Sum
from ..rounding import Noise
from ..step import Leaf, Program, Scalars
from . import tpu, triton, xla

BACKENDS: dict[str, ModuleType] = {"xla": xla, "tpu": tpu, "triton": triton}
_KERNELS = {"tpu": "tpu", "gpu": "triton", "cuda": "triton"}


def leaf_step(
    backend: str | None,
    program: Program,
    blocks: Blocks,
    leaf: Leaf,
    scalars: Scalars,
    noise: Noise,
) -> Leaf:
    """One step of one leaf, on the named backend or the best one (None)."""
    return _run("leaf_step", backend, program, blocks, leaf, scalars, noise)


def leaf_sums(
    backend: str | None,
    program: Program,
    blocks: Blocks,
    leaf: Leaf,
    scalars: Scalars,
    sums: Sequence[Sum],
) -> jax.Array:
    """Sums over each layer of one leaf, float32 (sums, layers), likewise."""
    return _run("leaf_sums", backend, program, blocks, leaf, scalars, sums)


def _run(function: str, backend: str | None, program: Program, *args: Any) -> Any:
    chosen = choose(program) if backend is None else backend
    if chosen != "xla":
        try:
            return getattr(BACKENDS[chosen], function)(program, *args)
        except NotImplementedError:
            pass
    return getattr(xla, function)(program, *args)


def choose(program: Program) -> str:
    """The backend for the device that JAX uses by default.

    XLA fuses an unquantized step just as well, so only quantized leaves take a kernel.
    So does it when there are several devices: a kernel cannot be partitioned
    automatically, and the leaf may be sharded.
    """
    kernel = _KERNELS.get(_platform(), "xla")
    if kernel == "xla" or not program.quantized:
        return "xla"
    if jax.device_count() > 1:
        _warn_once(kernel)
        return "xla"
    return kernel


def _platform() -> str:
    default = jax.config.jax_default_device  # type: ignore[attr-defined]
    if default is None:
        return jax.default_backend()
    return default if isinstance(default, str) else default.platform


_warned: set[str] = set()


def _warn_once(kernel: str) -> None:
    if kernel not in _warned:
        _warned.add(kernel)
        warnings.warn(
            f"{jax.device_count()} devices: Octavo leaves the step to XLA, which can "
            "partition it, instead of its fused kernel. Where each array lives on "
            f"one device, pass backend={kernel!r} to the optimizer.",
            stacklevel=2,
        )
