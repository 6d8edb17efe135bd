"""The sharding of a whole state, for what places and stores it."""

from collections.abc import Sequence
from typing import Any

import jax
import optax
from jax.sharding import NamedSharding, PartitionSpec

from ..storage.memory import HOST
from ..storage.muon import is_masked
from ..storage.tree import Leaves
from .finer import with_states
from .geometry import fitting, of_state
from .placement import abstract, full


def state_sharding(
    tx: optax.GradientTransformation, params: Any, shardings: Any = None
) -> Any:
    """The sharding of an optimizer's state, for a sharding of the parameters.

    Codes are sharded like the parameter, or as the optimizer's option `state_sharding`
    says. So are scales, but for a blocked axis that has fewer blocks than parts, which
    is then replicated; and so is whatever else an optax transformation keeps for each
    parameter, where its rank allows. Counters are replicated.

    Args:
      tx: an Octavo optimizer, or any optax transformation.
      params: tree of arrays or of `jax.ShapeDtypeStruct`.
      shardings: of the parameters: tree of `NamedSharding` like them, a prefix of one,
        or a function of the leaf's path. Default None: the optimizer's own `sharding`,
        as `tx.bind(params)` sets it.

    Returns:
      The state's tree, of NamedShardings: for `jax.jit(tx.init, out_shardings=...)`,
      `jax.device_put` and Orbax.

    Raises:
      ValueError: where shardings do not fit the parameters, or there are none.

    >>> import jax
    >>> from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
    >>> from octavo import optim
    >>> tx, mesh = optim.adamw(1e-3), jax.make_mesh((1,), ("data",))
    >>> params = {"w": jax.ShapeDtypeStruct((4096, 512), "float32")}
    >>> shardings = optim.state_sharding(tx, params, NamedSharding(mesh, P("data")))
    >>> shardings.mu["w"].spec
    P('data', None)
    """
    shapes = jax.tree.map(abstract, params)
    tree = Leaves.of(shapes)
    settings = getattr(getattr(tx, "optimizer", None), "settings", None)
    if shardings is None:
        shardings = getattr(settings, "sharding", None)
    if shardings is None:
        raise ValueError(
            "state_sharding: give shardings of the parameters, or bind the optimizer "
            "to parameters that are on a mesh: tx.bind(params)"
        )
    given = full(shardings, tree)
    if not given:
        raise ValueError("params has no leaves: there is no mesh to put a state on")
    state, spaces = made(tx, shapes, given)
    everywhere = NamedSharding(given[0].mesh, PartitionSpec())
    finer = getattr(settings, "state_sharding", None)
    states = with_states(given, finer, tree).state

    def of(leaf: Any, sharding: Any, rank: int) -> Any:
        if is_masked(leaf):
            return leaf
        sharding = of_state(sharding, leaf.shape, rank)
        fits = len(sharding.spec) <= len(leaf.shape)
        return fitting(sharding, leaf.shape) if fits else everywhere

    shardings = optax.tree_map_params(
        tx,
        of,
        state,
        tree.replaced(states),
        tree.replaced([len(x.shape) for x in tree.leaves]),
        transform_non_params=lambda _: everywhere,
        is_leaf=is_masked,
    )
    return jax.tree.map(in_memory, shardings, spaces)


def made(
    tx: optax.GradientTransformation, shapes: Any, given: Sequence[NamedSharding] = ()
) -> tuple[Any, Any]:
    """The shapes of a fresh state, and in which memory each of its arrays is.

    Args:
      tx: the transformation.
      shapes: of the parameters.
      given: their shardings, as far as they are known.
    """
    if given:
        pairs = zip(jax.tree.leaves(shapes), given, strict=True)
        placed = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s) for x, s in pairs]
        shapes = jax.tree.unflatten(jax.tree.structure(shapes), placed)
    jaxpr, state = jax.make_jaxpr(tx.init, return_shape=True)(shapes)
    found = [x.memory_space for x in jaxpr.out_avals]
    return state, jax.tree.unflatten(jax.tree.structure(state), found)


def in_memory(sharding: NamedSharding, space: Any) -> NamedSharding:
    """A sharding with the kind of memory, where that is the host's."""
    host = space == jax.memory.Space.Host
    return sharding.with_memory_kind(HOST) if host else sharding
