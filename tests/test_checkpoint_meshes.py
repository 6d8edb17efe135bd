"""A checkpoint goes onto any mesh, and the run goes on as it would have."""

from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from octavo import optim
from octavo.optim import checkpoint
from octavo.optim.checkpoint.__main__ import main

from bits import assert_same_bits, moments
from processes import free_port, run_together
from runs import TX, fresh, random, run, saved, trained, ulps

P = PartitionSpec


class Layout(NamedTuple):
    """Devices along one axis of a mesh, and the axis of matrices cut over them."""

    devices: int
    axis: int

    def shardings(self, kind: AxisType) -> Any:
        """Of the parameters."""
        devices = jax.devices()[: self.devices]
        mesh = jax.make_mesh((len(devices),), ("x",), (kind,), devices=devices)
        spec = P("x", None) if self.axis == 0 else P(None, "x")
        return jax.tree.map(
            lambda p: NamedSharding(mesh, spec if p.ndim == 2 else P()), random(0)
        )

    def make(self, optimizer: Any, kind: AxisType) -> tuple[Any, Any]:
        """An optimizer for this layout, and the shardings."""
        given = self.shardings(kind)
        return optimizer(1e-2, sharding=given if kind == AxisType.Auto else None), given


FSDP = Layout(8, axis=0)
LAYOUTS = {
    "FSDP on 8": FSDP,
    "FSDP on 4": Layout(4, axis=0),
    "FSDP on 2": Layout(2, axis=0),
    "1 device": Layout(1, axis=0),
    "TP on 8": Layout(8, axis=1),
}


class Meshed(NamedTuple):
    """A run as FSDP on 8 devices: its checkpoint, the state then, and 10 steps on."""

    kind: AxisType
    optimizer: Any
    folder: Path
    before: Any
    after: Any


@pytest.fixture(
    scope="module",
    params=[(AxisType.Auto, optim.lamb), (AxisType.Explicit, optim.adamw)],
    ids=["Auto", "Explicit"],
)
def meshed(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Meshed:
    """For each kind of axes."""
    kind, optimizer = request.param
    tx, given = FSDP.make(optimizer, kind)
    state = trained(fresh(tx, jax.device_put(random(0), given)), 3)
    folder = saved(tmp_path_factory.mktemp("meshed"), state)
    return Meshed(kind, optimizer, folder, state, trained(state, 10))


@pytest.mark.parametrize("name", LAYOUTS)
def test_any_mesh(name: str, meshed: Meshed) -> None:
    tx, given = LAYOUTS[name].make(meshed.optimizer, meshed.kind)
    target = jax.eval_shape(lambda: fresh(tx))
    restored = checkpoint.restore(meshed.folder, tx, target, given)
    assert_same_bits(restored.replace(tx=meshed.before.tx), meshed.before)
    for tree in (restored.params, restored.opt_state.mu):
        for x, s in zip(jax.tree.leaves(tree), jax.tree.leaves(given), strict=True):
            assert x.sharding.is_equivalent_to(s, x.ndim)

    got = trained(restored, 10)
    if LAYOUTS[name] == FSDP:
        assert_same_bits(got.replace(tx=meshed.after.tx), meshed.after)
        return
    # Another program rounds differently, and sums for norms in another order.
    pairs = zip(
        jax.tree.leaves(got.opt_state),
        jax.tree.leaves(meshed.after.opt_state),
        strict=True,
    )
    codes = [(np.asarray(x), np.asarray(y)) for x, y in pairs if x.dtype == jnp.int8]
    apart = np.concatenate([(x - y).ravel() for x, y in codes])  # modulo 256
    assert np.abs(apart).max() <= 1 and (apart != 0).mean() < 1e-4
    # LAMB's ratios, one in each of 10 steps, may each move the last bit.
    allowed = 10 if meshed.optimizer is optim.lamb else 2
    assert ulps(got.params, meshed.after.params, meshed.before.params) <= allowed


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("inside", [False, True], ids=["", "set_mesh"])
def test_counters_stay_free(kind: AxisType, inside: bool, tmp_path: Path) -> None:
    """A fresh counter lies on one device, but a step takes it to any; so a restored."""
    tx, given = FSDP.make(optim.adamw, kind)
    context = jax.set_mesh(given["embed"].mesh) if inside else nullcontext()
    with context:
        before = fresh(tx, jax.device_put(random(0), given))
        folder = saved(tmp_path, before)
        restored = checkpoint.restore(folder, tx, before)
        assert_same_bits(restored, before)
        assert_same_bits(trained(restored, 1), trained(before, 1))
        wide, _ = FSDP.make(partial(optim.adamw, state="32bit"), kind)
        target = fresh(wide, before.params)
        converted = checkpoint.restore(folder, wide, target, convert=True)
        expected = optim.dequantize(before.opt_state)
        assert_same_bits(moments(converted.opt_state), expected)
        trained(converted, 1)


def test_shapes_on_a_mesh_without_devices(tmp_path: Path) -> None:
    folder = saved(tmp_path, run())
    given = FSDP.shardings(AxisType.Explicit)
    params = jax.device_put(random(0), given)
    target = jax.eval_shape(partial(fresh, TX), params)
    with pytest.raises(ValueError, match=r"without devices, .* pass sharding="):
        checkpoint.restore(folder, TX, target)
    got = checkpoint.restore(folder, TX, target, given)
    assert_same_bits(got, run())


def test_two_processes(tmp_path: Path) -> None:
    """What they saved together is on one device what it was on four."""
    program = Path(__file__).parent / "two_processes_checkpoint.py"
    port = free_port()
    for out in run_together(program, [(rank, port, tmp_path) for rank in range(2)]):
        assert out.splitlines()[-1] == "done"
    assert main(["inspect", str(tmp_path)]) == 0
