"""Compile for devices that are not here. Skips, with the reason, where it cannot."""

import functools
import importlib.util
from typing import Any

import jax
import pytest
from _topologies import devices_of
from jax.sharding import AxisType, Mesh, SingleDeviceSharding

TPUS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
TARGETS = [*TPUS, "sm_90"]


@functools.cache
def sharding(target: str) -> SingleDeviceSharding:
    """A device of the target, to put on abstract arguments."""
    if target in TPUS:
        if importlib.util.find_spec("libtpu") is None:
            pytest.skip("libtpu is not installed (extra 'aot', Linux x86-64 only)")
    elif not (
        importlib.util.find_spec("jax_plugins")
        and importlib.util.find_spec("jax_plugins.xla_cuda13")
    ):
        pytest.skip("no CUDA plugin (extra 'aot', Linux x86-64 only)")
    return SingleDeviceSharding(devices_of(TPUS.get(target, "h200:1x1"))[0])


def backend_of(target: str) -> str:
    """The name of Octavo's backend for the target."""
    return "tpu" if target in TPUS else "triton"


def compile_for(target: str, function: Any, *args: Any, donate: Any = ()) -> Any:
    """The compiled program of a function of abstract arguments."""
    return lower_for(target, function, *args, donate=donate).compile()


def lower_for(target: str, function: Any, *args: Any, donate: Any = ()) -> Any:
    """What the compiler of the target is given."""
    device = sharding(target)
    placed = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), args
    )
    platform = "tpu" if target in TPUS else "cuda"
    # From JAX 0.12 on, the abstract mesh is where Triton's lowering looks for its GPU.
    (one,) = device.device_set
    mesh = Mesh([one], ("x",), axis_types=(AxisType.Auto,))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        traced = jax.jit(function, donate_argnums=donate).trace(*placed)
        return traced.lower(lowering_platforms=(platform,))
