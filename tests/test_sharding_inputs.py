"""Shardings that do not fit are named by the path of the leaf."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from octavo import optim

from meshes import mesh_of


def cut(kernel: Any, bias: Any) -> Any:
    return {"a": {"kernel": kernel}, "b": bias}


def bad_shardings() -> dict[str, tuple[Any, str]]:
    """What does not fit the parameters, and what the error says."""
    mesh, other = mesh_of("4x2", "auto"), mesh_of("8 rows", "auto")
    here = NamedSharding(mesh, P("d", "m"))
    whole = NamedSharding(mesh, P())
    return {
        "missing": ({"a": {"kernel": here}}, "sharding does not fit .* at 'b'"),
        "unknown": (
            {**cut(here, whole), "c": whole},
            "sharding does not fit .* at 'c'",
        ),
        "None": (cut(here, None), "sharding at 'b' is None, not NamedShardings"),
        "number": (cut(3, whole), "sharding at 'a/kernel' is 3, not NamedShardings"),
        "mesh": (
            cut(here, NamedSharding(other, P())),
            "'a/kernel' is on the mesh {'d': 4, 'm': 2}, but 'b' on {'d': 8}: put all",
        ),
        "rank": (
            cut(here, NamedSharding(mesh, P("d", "m"))),
            r"sharding for 'b': P\('d', 'm'\) has 2 axes, but its shape \(6,\) has 1",
        ),
        "divides": (
            cut(here, NamedSharding(mesh, P("d"))),
            r"sharding for 'b': P\('d',\) cuts axis 0 of .* \(6,\) into 4 unequal",
        ),
        "no mesh": (
            cut(P("d", "m"), P()),
            r"sharding for 'a/kernel': P\('d', 'm'\) needs a mesh, and none is set",
        ),
        "one device": (
            jax.sharding.SingleDeviceSharding(jax.devices()[0]),
            "sharding is SingleDeviceSharding.* not NamedShardings",
        ),
    }


PARAMS = cut(np.ones((64, 128), np.float32), np.ones(6, np.float32))
CALLS: dict[str, Callable[[Any], Any]] = {
    "init": lambda bad: optim.adam(0.1, sharding=bad).init(PARAMS),
    "step": lambda bad: optim.adam(0.1, sharding=bad).step(
        PARAMS, optim.adam(0.1).init(PARAMS), PARAMS
    ),
    "state_sharding": lambda bad: optim.state_sharding(optim.adam(0.1), PARAMS, bad),
    "check_sharding": lambda bad: optim.check_sharding(optim.adam(0.1), PARAMS, bad),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("bad", bad_shardings())
def test_shardings_that_do_not_fit(bad: str, call: str) -> None:
    shardings, message = bad_shardings()[bad]
    with pytest.raises(ValueError, match=message):
        CALLS[call](shardings)


@pytest.mark.parametrize("call", CALLS)
def test_unknown_axes_within_a_mesh(call: str) -> None:
    message = r"sharding for 'a/kernel': P\('d', 'x'\) names the axis 'x', but the mesh"
    with (
        jax.set_mesh(mesh_of("4x2", "auto")),
        pytest.raises(ValueError, match=f"{message} has 'd', 'm'"),
    ):
        CALLS[call](cut(P("d", "x"), P()))


def test_arrays_on_different_meshes() -> None:
    params = {
        name: jax.device_put(
            jnp.ones((64, 64)), NamedSharding(mesh_of(name, "explicit"), P("d"))
        )
        for name in ("4x2", "8 rows")
    }
    with pytest.raises(ValueError, match=r"'4x2' is on the mesh .* but '8 rows' on"):
        optim.adam(0.1).init(params)


def test_check_sharding_takes_no_chain() -> None:
    tx: Any = optax.chain(optim.adam(0.1))
    with pytest.raises(TypeError, match="an Octavo optimizer itself, not a chain"):
        optim.check_sharding(tx, PARAMS, NamedSharding(mesh_of("4x2", "auto"), P()))
