"""Where a leaf's step runs: a kernel where there is one for the device, else XLA.

A kernel's backend is a module with `refuses(program)`: why it cannot take a leaf, from
what is static alone, or None; and `run(program, leaf, scalars, noise, *, interpret)`,
which does what the program says. XLA's refuses nothing. One that does not take all of
`_DTYPES` says which in a `DTYPES` of its own.
"""

import functools
import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ..program import Leaf, Noise, Program, Scalars
from ._together import groups_of, singles, together

# Name -> module, imported when it is first needed.
BACKENDS: dict[str, str] = {
    "xla": "octavo.pallas_kernels.backends.xla",
    "tpu": "octavo.pallas_kernels.backends.tpu",
    "triton": "octavo.pallas_kernels.backends.triton",
    # No device has run it yet: only where it is named.
    "mosaic_gpu": "octavo.pallas_kernels.backends.mosaic_gpu",
}
# What JAX calls a platform -> its kernels, best first. What all refuse is XLA's.
PLATFORMS: dict[str, tuple[str, ...]] = {
    "tpu": ("tpu",),
    "gpu": ("triton",),
    "cuda": ("triton",),
}


class Choice(NamedTuple):
    """The backend of a leaf, and why it is no kernel (where it is one, "")."""

    backend: str
    why: str


def choose(
    program: Program, dtypes: Sequence[Any], platform: str, named: str | None = None
) -> Choice:
    """The backend for a leaf, or a shard of it.

    Args:
      program: what to compute.
      dtypes: of the gradient and the parameter.
      platform: of the device.
      named: the backend that the user wants; None: the best that takes the leaf.

    Raises:
      ValueError: if the one named refuses a quantized leaf. (Others are not worth a
        kernel anyway.)
    """
    if named is not None:
        why = _refusal(named, program, dtypes)
        if why is None:
            return Choice(named, "")
        if program.storage.quantized:
            raise ValueError(f"backend={named!r} does not take it: {why}")
        return Choice("xla", why)
    if not program.storage.quantized:  # XLA fuses such a step just as well
        return Choice("xla", "not quantized")
    refusals = []
    for name in PLATFORMS.get(platform, ()):
        why = _refusal(name, program, dtypes)
        if why is None:
            return Choice(name, "")
        refusals.append(f"{name}: {why}")
    return Choice("xla", "; ".join(refusals) or f"no kernel for {platform}")


def _refusal(name: str, program: Program, dtypes: Sequence[Any]) -> str | None:
    if name == "xla":
        return None
    storage = program.storage
    module = _module(name)
    taken = getattr(module, "DTYPES", _DTYPES)
    if not all(jnp.dtype(dtype) in taken for dtype in dtypes):
        return f"its kernel does not take {', '.join(str(d) for d in dtypes)}"
    if storage.packed:
        return "several codes in one byte are left to XLA"
    if not storage.elementwise:
        return "slots of another shape than the parameter's are left to XLA"
    return module.refuses(program)


_DTYPES = tuple(jnp.dtype(t) for t in (jnp.float32, jnp.bfloat16, jnp.float16))


def _module(name: str) -> ModuleType:
    return importlib.import_module(BACKENDS[name])


@functools.partial(jax.jit, static_argnums=(0, 1))
def run(
    backend: str, program: Program, leaf: Leaf, scalars: Scalars, noise: Noise
) -> Any:
    """One pass over one leaf, on the named backend.

    Equal leaves share what is traced, lowered and (outside of jit) compiled, because
    the static arguments say nothing of where the leaf is in its tree.

    Returns:
      The leaf after a step, or sums of shape (sums, layers).
    """
    return _module(backend).run(program, program.read(leaf), scalars, noise)


def run_all(
    programs: Sequence[tuple[str, Program]],
    leaves: Sequence[Leaf],
    scalars: Sequence[Scalars],
    noise: Sequence[Noise],
    *,
    together: bool,
) -> list[Any]:
    """One pass over several leaves, each on its backend.

    Args:
      programs: the backend and the program of each leaf.
      leaves: their arrays.
      scalars: their operands.
      noise: what their random numbers start from.
      together: whether equal, small leaves may be stacked: all are on one device.
    """
    found: list[Any] = [None] * len(leaves)
    groups = groups_of(programs, leaves, scalars) if together else singles(leaves)
    for group in groups:
        own = [[x[k] for k in group] for x in (leaves, scalars, noise)]
        if len(group) == 1:
            results = [run(*programs[group[0]], *(x[0] for x in own))]
        else:
            results = run_together(*programs[group[0]], *own)
        for k, result in zip(group, results, strict=True):
            found[k] = result
    return found


@functools.partial(jax.jit, static_argnums=(0, 1))
def run_together(
    backend: str,
    program: Program,
    leaves: Sequence[Leaf],
    scalars: Sequence[Scalars],
    noise: Sequence[Noise],
) -> list[Any]:
    """The same pass over several equal leaves, compiled once for all of them."""
    step = functools.partial(_module(backend).run, program)
    return together(step, [program.read(leaf) for leaf in leaves], scalars, noise)
