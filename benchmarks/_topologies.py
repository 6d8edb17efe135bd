"""Machines that are not here, for compilers that need no device."""

import os
from typing import Any

import jax
from jax.experimental import topologies

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


def prepare() -> None:
    """Keep the compilers of absent devices from looking for them.

    Before JAX first looks for devices.
    """
    jax.config.update("jax_platforms", "cpu")
    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
    }.items():
        os.environ.setdefault(name, value)


def platform_of(topology: str) -> str:
    """What JAX calls the compiler of a topology: `"tpu"` or `"cuda"`."""
    return "cuda" if topology.startswith("h200:") else "tpu"


def devices_of(topology: str) -> list[Any]:
    """The devices of `"v6e:16x16"` (chips) or `"h200:32x8"` (hosts and their GPUs)."""
    if platform_of(topology) == "tpu":
        described = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    else:
        described = topologies.get_topology_desc(
            "h200",
            platform="cuda",
            target_config=_H200,
            topology=f"1x{topology.removeprefix('h200:')}",
        )
    return list(described.devices)
