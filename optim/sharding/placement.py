"""On which devices arrays are: what users say, what types say, and what is made."""

import functools
from collections.abc import Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import (
    AbstractMesh,
    AxisType,
    Mesh,
    NamedSharding,
    PartitionSpec,
    SingleDeviceSharding,
)

from ..checks import is_traced
from ..storage.memory import HOST, full_on_host
from ..storage.shards import mesh_axes
from ..storage.tree import SHARDINGS, Leaves, per_leaf
from .geometry import fitting, is_explicit, of_state, padded_spec, resharded, shards


def placements(option: Any, tree: Leaves) -> list[NamedSharding | None]:
    """The sharding of each leaf; None where it is not known, or is one device.

    Args:
      option: `sharding` of the optimizer, or None: it is read off the arrays' types,
        if the axes of their mesh are explicit.
      tree: the parameters, or gradients.

    Raises:
      ValueError: where the option does not fit the tree.
    """
    if option is not None:
        found: list[Any] = full(option, tree)
    else:
        found = [_explicit(leaf) for leaf in tree.leaves]
        _check_meshes(tree, found)
    return [None if s is None or _is_one_device(s) else s for s in found]


def _is_one_device(sharding: NamedSharding) -> bool:
    """Unless types say how it is sharded: they do so on one device, too."""
    types = sharding.mesh.axis_types
    return sharding.mesh.size == 1 and AxisType.Explicit not in types


def everywhere(x: jax.Array, leaves: Sequence[Any], given: Sequence[Any]) -> jax.Array:
    """A small array on all devices of the leaves."""
    for leaf, sharding in zip(leaves, given, strict=True):
        where = _home(leaf, sharding)
        if where is not None:
            replicated = NamedSharding(where.mesh, PartitionSpec())
            if not is_traced(x):
                return jax.device_put(x, replicated)
            return constrained(x, replicated)
    return x


def committed(tree: Any) -> Any:
    """Arrays bound to their devices, as arrays in host memory always are.

    So are the results of a step with one of those: a free array beside it would make
    the second step another program than the first.
    """
    return jax.tree.map(
        lambda x: x if is_traced(x) else jax.device_put(x, x.sharding), tree
    )


def _home(leaf: Any, sharding: NamedSharding | None) -> NamedSharding | None:
    """The sharding for the state of a leaf: as given, or else as the leaf itself.

    Outside of jit with concrete devices.
    """
    concrete = isinstance(leaf, jax.Array) and not is_traced(leaf)
    own = leaf.sharding if concrete else None
    if not isinstance(own, NamedSharding):
        own = None
    if sharding is None:
        return own
    if isinstance(sharding.mesh, AbstractMesh) and concrete:
        mesh = own.mesh if own is not None else jax.sharding.get_mesh()
        return NamedSharding(mesh, sharding.spec)
    return sharding


def constrained(x: jax.Array, sharding: NamedSharding | None) -> jax.Array:
    """Within jit: an array sharded so, as far as its mesh says."""
    if sharding is None:
        return x
    mesh, spec = sharding.mesh, padded_spec(sharding, x.ndim)
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    if AxisType.Explicit not in types.values():
        return lax.with_sharding_constraint(x, sharding)
    abstract_mesh: Any = mesh.abstract_mesh
    if AxisType.Auto not in types.values():
        return resharded(x, NamedSharding(abstract_mesh, sharding.spec))
    # Of axes of both types, those that are in the types of arrays, and then the others.
    explicit, automatic = (
        NamedSharding(abstract_mesh, _over(spec, {n for n in types if types[n] == t}))
        for t in (AxisType.Explicit, AxisType.Auto)
    )
    x = jax.sharding.reshard(x, explicit)
    return lax.with_sharding_constraint(x, automatic)


def _over(spec: Sequence[Any], names: Collection[str]) -> PartitionSpec:
    """A spec with these axes of the mesh alone."""
    kept = (tuple(n for n in mesh_axes(axis) if n in names) for axis in spec)
    return PartitionSpec(*(axes or None for axes in kept))


def full(shardings: Any, tree: Leaves, option: str = "sharding") -> list[NamedSharding]:
    """The sharding of each leaf, from what an option says of it; checked."""
    if not tree.leaves:
        return []
    given = per_leaf(option, shardings, tree, SHARDINGS)
    named = zip(tree.names, tree.leaves, given, strict=True)
    found = [_checked(path, jnp.shape(leaf), s) for path, leaf, s in named]
    _check_meshes(tree, found)
    return found


def _check_meshes(tree: Leaves, found: Sequence[NamedSharding | None]) -> None:
    meshes = {s.mesh: path for path, s in zip(tree.names, found, strict=True) if s}
    if len(meshes) > 1:
        (first, a), (second, b), *_ = meshes.items()
        raise ValueError(
            f"sharding: {a!r} is on the mesh {_shown(first)}, but {b!r} on "
            f"{_shown(second)}: put all parameters on one mesh"
        )


def filled(
    like: jax.ShapeDtypeStruct,
    value: Any,
    leaf: Any,
    sharding: NamedSharding | None,
    on_host: bool = False,
) -> jax.Array:
    """An array of one value, sharded like a parameter as far as its shape divides.

    Never on one device first. Without a sharding, that of a concrete array is taken.
    """
    where = _home(leaf, sharding)
    if on_host:
        return _filled_on_host(like, value, leaf, where)
    if where is None:
        return jnp.full(like.shape, value, like.dtype)
    fitted = fitting(where, like.shape)
    if isinstance(leaf, jax.Array) and not is_traced(leaf):
        return jnp.full(like.shape, value, like.dtype, device=fitted)
    return constrained(jnp.full(like.shape, value, like.dtype), fitted)


def _filled_on_host(
    like: jax.ShapeDtypeStruct, value: Any, leaf: Any, where: NamedSharding | None
) -> jax.Array:
    """Such an array in host memory; outside of jit, without passing a device."""
    fitted: Any = None
    if where is not None:
        fitted = fitting(of_state(where, like.shape, jnp.ndim(leaf)), like.shape)
    if is_traced(leaf) or not isinstance(leaf, jax.Array | np.ndarray):
        if fitted is None:
            return full_on_host(like, value)
        own = jax.ShapeDtypeStruct(fitted.shard_shape(like.shape), like.dtype)
        each = functools.partial(full_on_host, own, value)
        options = {"in_specs": (), "out_specs": fitted.spec, "check_vma": False}
        return jax.shard_map(each, mesh=fitted.mesh, **options)()
    if fitted is None:
        (device,) = leaf.devices() if isinstance(leaf, jax.Array) else jax.devices()[:1]
        there = SingleDeviceSharding(device, memory_kind=HOST)
        return jax.device_put(np.full(like.shape, value, like.dtype), there)

    def shard(index: Any) -> np.ndarray[Any, Any]:
        lengths = (
            len(range(*s.indices(n))) for s, n in zip(index, like.shape, strict=True)
        )
        return np.full((*lengths,), value, like.dtype)

    there = fitted.with_memory_kind(HOST)
    return jax.make_array_from_callback(like.shape, there, shard)


def _explicit(leaf: Any) -> NamedSharding | None:
    """The sharding in an array's type, if all axes of its mesh are explicit."""
    if not isinstance(leaf, jax.Array):
        return None
    sharding = jax.typeof(leaf).sharding
    if not isinstance(sharding, NamedSharding) or sharding.mesh.empty:
        return None
    return sharding if is_explicit(sharding) else None


def _checked(path: str, shape: tuple[int, ...], given: Any) -> NamedSharding:
    """A sharding that fits a leaf."""
    mesh = given.mesh if isinstance(given, NamedSharding) else _mesh_for(path, given)
    spec = given.spec if isinstance(given, NamedSharding) else given
    sizes = dict(zip(mesh.axis_names, mesh.axis_sizes, strict=True))
    unknown = [name for axis in spec for name in mesh_axes(axis) if name not in sizes]
    if unknown:
        raise ValueError(
            f"sharding for {path!r}: {spec} names the axis {unknown[0]!r}, but the "
            f"mesh has {', '.join(map(repr, sizes))}"
        )
    if len(spec) > len(shape):
        raise ValueError(
            f"sharding for {path!r}: {spec} has {len(spec)} axes, but its shape "
            f"{shape} has {len(shape)}"
        )
    sharding = NamedSharding(mesh, spec)
    for k, n in enumerate(shards(sharding, len(shape))):
        if shape[k] % n:
            raise ValueError(
                f"sharding for {path!r}: {spec} partitions axis {k} of its shape "
                f"{shape} into {n} unequal parts"
            )
    return sharding


def _mesh_for(path: str, spec: PartitionSpec) -> Any:
    """The mesh of the context, for a spec that comes without one."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        raise ValueError(
            f"sharding for {path!r}: {spec} needs a mesh, and none is set: give a "
            "NamedSharding, or call within jax.set_mesh(mesh)"
        )
    return mesh


def _shown(mesh: Any) -> str:
    return str(dict(zip(mesh.axis_names, mesh.axis_sizes, strict=True)))


def abstract(x: Any) -> jax.ShapeDtypeStruct:
    """Shape and type of a leaf."""
    return jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x))


def platform_of(sharding: NamedSharding | None) -> str:
    """Of the mesh's devices, which may be absent ones, or else JAX' default one."""
    if sharding is not None:
        mesh = sharding.mesh
        if isinstance(mesh, Mesh):
            return mesh.devices.flat[0].platform
        platform = getattr(mesh.abstract_device, "platform", None)
        if platform is not None:
            return platform
    default = jax.config.jax_default_device  # type: ignore[attr-defined]
    if default is None:
        return jax.default_backend()
    return default if isinstance(default, str) else default.platform
