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


def tree(kernel: Any, bias: Any) -> Any:
    return {"a": {"kernel": kernel}, "b": bias}


def bad_shardings() -> dict[str, tuple[Any, str]]:
    """What does not fit the parameters, and what the error says."""
    mesh, other = mesh_of("4x2", "auto"), mesh_of("8 rows", "auto")
    here = NamedSharding(mesh, P("d", "m"))
    whole = NamedSharding(mesh, P())
    return {
        "missing": ({"a": {"kernel": here}}, "sharding does not fit .* at 'b'"),
        "unknown": (
            {**tree(here, whole), "c": whole},
            "sharding does not fit .* at 'c'",
        ),
        "None": (tree(here, None), "sharding at 'b' is None, not NamedShardings"),
        "number": (tree(3, whole), "sharding at 'a/kernel' is 3, not NamedShardings"),
        "mesh": (
            tree(here, NamedSharding(other, P())),
            "'a/kernel' is on the mesh {'d': 4, 'm': 2}, but 'b' on {'d': 8}: put all",
        ),
        "rank": (
            tree(here, NamedSharding(mesh, P("d", "m"))),
            r"sharding for 'b': P\('d', 'm'\) has 2 axes, but its shape \(6,\) has 1",
        ),
        "divides": (
            tree(here, NamedSharding(mesh, P("d"))),
            r"sharding for 'b': P\('d',\) partitions axis 0 .* into 4 unequal",
        ),
        "no mesh": (
            tree(P("d", "m"), P()),
            r"sharding for 'a/kernel': P\('d', 'm'\) needs a mesh, and none is set",
        ),
        "one device": (
            jax.sharding.SingleDeviceSharding(jax.devices()[0]),
            "sharding is SingleDeviceSharding.* not NamedShardings",
        ),
    }


PARAMS = tree(np.ones((64, 128), np.float32), np.ones(6, np.float32))
CALLS: dict[str, Callable[[Any], Any]] = {
    "init": lambda bad: optim.adam(0.1, sharding=bad).init(PARAMS),
    "step": lambda bad: optim.adam(0.1, sharding=bad).step(
        PARAMS, optim.adam(0.1).init(PARAMS), PARAMS
    ),
    "state_sharding": lambda bad: optim.state_sharding(optim.adam(0.1), PARAMS, bad),
    "explain": lambda bad: optim.explain(optim.adam(0.1), PARAMS, bad),
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
        CALLS[call](tree(P("d", "x"), P()))


def test_arrays_on_different_meshes() -> None:
    params = {
        name: jax.device_put(
            jnp.ones((64, 64)), NamedSharding(mesh_of(name, "explicit"), P("d"))
        )
        for name in ("4x2", "8 rows")
    }
    with pytest.raises(ValueError, match=r"'4x2' is on the mesh .* but '8 rows' on"):
        optim.adam(0.1).init(params)


def test_a_named_backend_that_refuses_a_leaf() -> None:
    """On a mesh, too, the error names it; what is not quantized goes to XLA."""
    sharding = NamedSharding(mesh_of("4x2", "auto"), P("d"))
    tx = optim.adam(0.1, sharding=sharding, backend="tpu")
    params = {"a": {"bias": jnp.ones(64), "scale": jnp.ones(8192)}}
    message = r"'a/scale': backend='tpu' does not take it: .* rank 2 or more"
    with pytest.raises(ValueError, match=message):
        tx.step(params, tx.init(params), params)
    params["a"].pop("scale")
    params, _ = tx.step(params, tx.init(params), params)
    assert params["a"]["bias"].sharding.is_equivalent_to(sharding, 1)


def test_explain_takes_no_chain() -> None:
    tx: Any = optax.chain(optim.adam(0.1))
    with pytest.raises(TypeError, match="an Octavo optimizer itself, no chain"):
        optim.explain(tx, PARAMS, NamedSharding(mesh_of("4x2", "auto"), P()))
