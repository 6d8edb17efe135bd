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
    backend: str,
    program: Program,
    blocks: Blocks,
    leaf: Leaf,
    scalars: Scalars,
    noise: Noise,
) -> Leaf:
    """One step of one leaf, on the named backend."""
    return _run("leaf_step", backend, program, blocks, leaf, scalars, noise)


def leaf_sums(
    backend: str,
    program: Program,
    blocks: Blocks,
    leaf: Leaf,
    scalars: Scalars,
    sums: Sequence[Sum],
) -> jax.Array:
    """Sums over each layer of one leaf, float32 (sums, layers), likewise."""
    return _run("leaf_sums", backend, program, blocks, leaf, scalars, sums)


def _run(function: str, backend: str, program: Program, *args: Any) -> Any:
    try:
        return getattr(BACKENDS[backend], function)(program, *args)
    except NotImplementedError:
        return getattr(xla, function)(program, *args)


def choose(program: Program, local: bool, platform: str | None = None) -> str:
    """The backend for a leaf.

    XLA fuses an unquantized step just as well, so only quantized leaves take a kernel.

    Args:
      program: what to compute.
      local: whether the leaf's arrays surely lie on one device. If not, and there are
        several, XLA takes it: a kernel cannot be partitioned automatically.
      platform: of the device; None: the one that JAX uses by default.
    """
    kernel = _KERNELS.get(platform or _platform(), "xla")
    if kernel == "xla" or not program.quantized:
        return "xla"
    if not local and jax.device_count() > 1:
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
            f"{jax.device_count()} devices, and it is not known how parameters lie on "
            "them: Octavo leaves the step to XLA, which can partition it, instead of "
            "its fused kernel. Pass sharding=jax.tree.map(lambda p: p.sharding, params)"
            " to the optimizer, or use a mesh with explicit axes. Where each array "
            f"lives on one device, pass backend={kernel!r}.",
            stacklevel=2,
        )
