"""Twenty steps with state in host memory are those without, by bits."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TWINS = Path(__file__).with_name("paged_twins.py")
STEPS = 20


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    """What the program prints, compiled without contractions."""
    env = {
        "XLA_FLAGS": "--xla_cpu_max_isa=AVX --xla_backend_optimization_level=0",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    command = [sys.executable, str(TWINS), str(STEPS)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | env, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_paged_is_unpaged(rows: list[dict[str, Any]]) -> None:
    own = [row for row in rows if not row["weights"]]
    assert len(own) == 5
    for row in own:
        assert row["moments"] == 0, row
        # LAMB's norms are added up in another order. That moves the rounding of some
        # parameters, in some of the steps, by one of their own units.
        assert row["parameters"] == 0 or (row["name"] == "lamb" and row["ulps"] <= 1)


def test_remainders_in_host_memory_are_float32_weights(
    rows: list[dict[str, Any]],
) -> None:
    own = [row for row in rows if row["weights"] == "remainder16"]
    assert {(row["state"], row["devices"]) for row in own} == {
        ("32bit", 1),
        ("8bit", 8),
    }
    assert not any(row["parameters"] or row["moments"] for row in own), own
