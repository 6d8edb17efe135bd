"""Steps whose state is in host memory, compiled for devices that are not here."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import jax
from _topologies import platform_of
from jax._src import core
from jax._src.interpreters import mlir

from octavo import optim

_HOST = jax.memory.Space.Host


def compiled(tx: Any, params: Any, topology: str, init: bool = False) -> Any:
    """One step in place; or `init`.

    Args:
      tx: the optimizer.
      params: tree of `jax.ShapeDtypeStruct`, with their shardings over one mesh.
      topology: of that mesh, for `_topologies.devices_of`.
      init: instead of the step.
    """
    one = jax.tree.leaves(params)[0]
    mesh = one.sharding.mesh
    step = jax.jit(lambda p, s, g: tx.step(g, s, p), donate_argnums=(0, 1))
    with described() as hosted, jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        state = _placed(tx, params, hosted)
        if init:  # without an argument that is used, all results are on the device
            x = jax.ShapeDtypeStruct((), one.dtype, sharding=one.sharding)
            traced = jax.jit(lambda p, x: (tx.init(p), x + 1)).trace(params, x)
        else:
            traced = step.trace(params, state, params)
        return traced.lower(lowering_platforms=(platform_of(topology),)).compile()


def _placed(tx: Any, params: Any, hosted: dict[int, Any]) -> Any:
    """The shapes of a fresh state, each where it will be."""
    traced, state = jax.make_jaxpr(tx.init, return_shape=True)(params)
    where = optim.state_sharding(tx, params, jax.tree.map(lambda x: x.sharding, params))
    placed = []
    rows = zip(*map(jax.tree.leaves, (state, where)), traced.out_avals, strict=True)
    for x, sharding, kept in rows:
        made = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
        placed.append(made)
        if kept.memory_space == _HOST:
            hosted[id(made)] = made
    return jax.tree.unflatten(jax.tree.structure(state), placed)


@contextmanager
def described() -> Iterator[dict[int, Any]]:
    """Arguments may be in host memory, as those of a GPU that is there.

    JAX' description of an absent GPU has no memories, so the types of arguments do not
    say where they are, and neither does what the compiler is given. Both are added, for
    the `jax.ShapeDtypeStruct`s that are put into the dictionary by their `id`.
    """
    hosted: dict[int, Any] = {}
    typed = core.pytype_aval_mappings[jax.ShapeDtypeStruct]
    lowered = mlir.lower_jaxpr_to_fun

    def with_space(x: Any) -> Any:
        return typed(x).update(memory_space=_HOST) if id(x) in hosted else typed(x)

    def with_kinds(*args: Any, **options: Any) -> Any:
        if options.get("arg_memory_kinds") is not None:
            for side, avals in (("arg", "in_avals"), ("result", "out_avals")):
                spaces = (v.memory_space for v in getattr(args[2], avals))
                kinds = [core.mem_space_to_kind(space) for space in spaces]
                options[f"{side}_memory_kinds"] = kinds
        return lowered(*args, **options)

    types = {jax.ShapeDtypeStruct: with_space}
    with (
        mock.patch.dict(core.pytype_aval_mappings, types),
        mock.patch.object(mlir, "lower_jaxpr_to_fun", with_kinds),
    ):
        yield hosted
