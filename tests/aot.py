"""Compile for devices that are not here. Skips, with the reason, where it cannot."""

import functools
import importlib.util
from typing import Any

import jax
import pytest
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

TPUS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
TARGETS = [*TPUS, "sm_90"]

# What XLA has to know of an H200 (compute capability 9.0) to compile for it.
_H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132
  fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: 4800000000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 150000000000
  shared_memory_per_block_optin: 232448 cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536 }
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H200"
"""


@functools.cache
def sharding(target: str) -> SingleDeviceSharding:
    """A device of the target, to put on abstract arguments."""
    if target in TPUS:
        if importlib.util.find_spec("libtpu") is None:
            pytest.skip("libtpu is not installed (extra 'aot', Linux x86-64 only)")
        topology = topologies.get_topology_desc(
            platform="tpu", topology_name=TPUS[target]
        )
    else:
        if importlib.util.find_spec("jax_plugins.xla_cuda13") is None:
            pytest.skip("no CUDA plugin (extra 'aot', Linux x86-64 only)")
        topology = topologies.get_topology_desc(
            "h200", platform="cuda", target_config=_H200, topology="1x1x1"
        )
    return SingleDeviceSharding(topology.devices[0])


def backend_of(target: str) -> str:
    """The name of Octavo's backend for the target."""
    return "tpu" if target in TPUS else "triton"


def compile_for(target: str, function: Any, *args: Any, donate: Any = ()) -> Any:
    """The compiled program of a function of abstract arguments."""
    device = sharding(target)
    placed = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), args
    )
    platform = "tpu" if target in TPUS else "cuda"
    traced = jax.jit(function, donate_argnums=donate).trace(*placed)
    return traced.lower(lowering_platforms=(platform,)).compile()
