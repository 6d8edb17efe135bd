"""On which devices a leaf lies, and how its blocks lie in its shards."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from octavo.pallas_kernels import Blocks, blocks_of

from .checks import is_traced
from .tree import Kind, Leaves, spread

_SHARDING = Kind(
    lambda x: isinstance(x, NamedSharding | PartitionSpec),
    "NamedShardings (or PartitionSpecs, within jax.set_mesh)",
)


def placements(option: Any, tree: Leaves) -> list[NamedSharding | None]:
    """The sharding of each leaf; None where it is not known, or is one device.

    Args:
      option: `sharding` of the optimizer, or None: the arrays' types tell, if the axes
        of their mesh are explicit.
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
    """Unless types tell: they do so on one device, too."""
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
            return _constrained(x, replicated)
    return x


def _home(leaf: Any, sharding: NamedSharding | None) -> NamedSharding | None:
    """Where the state of a leaf is to lie: as given, or else as the leaf itself.

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


def _constrained(x: jax.Array, sharding: NamedSharding) -> jax.Array:
    """Within jit: an array cut so, as far as its mesh can be told."""
    types = set(sharding.mesh.axis_types)
    if types == {AxisType.Explicit}:
        abstract = NamedSharding(sharding.mesh.abstract_mesh, sharding.spec)
        return jax.sharding.reshard(x, abstract)
    if AxisType.Explicit in types:  # XLA decides, and what jit is told of its results
        return x
    return lax.with_sharding_constraint(x, sharding)


def full(shardings: Any, tree: Leaves) -> list[NamedSharding]:
    """The sharding of each leaf, from a tree of them or a prefix of it; checked."""
    if not tree.leaves:
        return []
    given = spread("sharding", shardings, tree, _SHARDING)
    named = zip(tree.paths, tree.leaves, given, strict=True)
    found = [_checked(path, jnp.shape(leaf), s) for path, leaf, s in named]
    _check_meshes(tree, found)
    return found


def _check_meshes(tree: Leaves, found: Sequence[NamedSharding | None]) -> None:
    meshes = {s.mesh: path for path, s in zip(tree.paths, found, strict=True) if s}
    if len(meshes) > 1:
        (first, a), (second, b), *_ = meshes.items()
        raise ValueError(
            f"sharding: {a!r} is on the mesh {_shown(first)}, but {b!r} on "
            f"{_shown(second)}: put all parameters on one mesh"
        )


def zeros(
    shape: tuple[int, ...], dtype: Any, leaf: Any, sharding: NamedSharding | None
) -> jax.Array:
    """Zeros that lie as a parameter does, as far as their shape divides.

    Never on one device first. Without a sharding, a concrete array tells its own.
    """
    where = _home(leaf, sharding)
    if where is None:
        return jnp.zeros(shape, dtype)
    fitted = fitting(where, shape)
    if isinstance(leaf, jax.Array) and not is_traced(leaf):
        return jnp.zeros(shape, dtype, device=fitted)
    return _constrained(jnp.zeros(shape, dtype), fitted)


def fitting(sharding: NamedSharding, shape: tuple[int, ...]) -> NamedSharding:
    """The sharding, less the axes that it would cut into unequal parts."""
    parts = shards(sharding, len(shape))
    spec = padded_spec(sharding, len(shape))
    kept = (
        s if n % k == 0 else None for s, n, k in zip(spec, shape, parts, strict=True)
    )
    return NamedSharding(sharding.mesh, PartitionSpec(*kept))


def _explicit(leaf: Any) -> NamedSharding | None:
    """The sharding in an array's type, if all axes of its mesh are explicit."""
    if not isinstance(leaf, jax.Array):
        return None
    sharding = jax.typeof(leaf).sharding
    if not isinstance(sharding, NamedSharding) or sharding.mesh.empty:
        return None
    explicit = all(t == AxisType.Explicit for t in sharding.mesh.axis_types)
    return sharding if explicit else None


def _checked(path: str, shape: tuple[int, ...], given: Any) -> NamedSharding:
    """A sharding that fits a leaf."""
    mesh = given.mesh if isinstance(given, NamedSharding) else _mesh_for(path, given)
    spec = given.spec if isinstance(given, NamedSharding) else given
    sizes = dict(zip(mesh.axis_names, mesh.axis_sizes, strict=True))
    unknown = [name for axis in spec for name in _names(axis) if name not in sizes]
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
                f"sharding for {path!r}: {spec} cuts axis {k} of its shape {shape} "
                f"into {n} unequal parts"
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


def _names(axis: Any) -> tuple[str, ...]:
    """The mesh axes over which one axis of an array is cut."""
    return () if axis is None else axis if isinstance(axis, tuple) else (axis,)


def _shown(mesh: Any) -> str:
    return str(dict(zip(mesh.axis_names, mesh.axis_sizes, strict=True)))


def padded_spec(sharding: NamedSharding, rank: int) -> tuple[Any, ...]:
    """The sharding's spec with an entry for each axis of the array."""
    return (*sharding.spec, *(None,) * (rank - len(sharding.spec)))


def shards(sharding: NamedSharding, rank: int) -> tuple[int, ...]:
    """Into how many parts each axis is cut."""
    sizes = dict(zip(sharding.mesh.axis_names, sharding.mesh.axis_sizes, strict=True))
    spec = padded_spec(sharding, rank)
    return tuple(math.prod(sizes[name] for name in _names(axis)) for axis in spec)


def shard(blocks: Blocks, sharding: NamedSharding) -> Blocks:
    """The blocks of one shard of a leaf."""
    parts = shards(sharding, len(blocks.shape))
    shape = tuple(n // k for n, k in zip(blocks.shape, parts, strict=True))
    return replace(blocks, shape=shape, whole=blocks.shape)


def aligned(blocks: Blocks, sharding: NamedSharding) -> bool:
    """Whether every block lies in one shard."""
    if blocks.axis is None:
        return True
    whole = blocks.shape[blocks.axis]
    length = shard(blocks, sharding).shape[blocks.axis]
    return length == whole or length % blocks.size == 0


def origin(blocks: Blocks, sharding: NamedSharding) -> jax.Array:
    """Within shard_map: position in the whole leaf of the first value of this shard.

    Modulo 2**32.
    """
    start = jnp.int32(0)
    for first, stride in zip(starts(blocks, sharding), blocks.strides, strict=True):
        start = start + first * ((stride + 2**31) % 2**32 - 2**31)
    return start


def starts(blocks: Blocks, sharding: NamedSharding) -> list[jax.Array]:
    """Within shard_map: index in the whole leaf, along each axis, of this shard.

    Args:
      blocks: of the shard.
      sharding: of the whole leaf.
    """
    spec = padded_spec(sharding, len(blocks.shape))
    return [
        _index(axis) * jnp.int32(length)
        for axis, length in zip(spec, blocks.shape, strict=True)
    ]


def _index(axis: Any) -> jax.Array:
    names = _names(axis)
    return lax.axis_index(names) if names else jnp.int32(0)


def owned(sharding: NamedSharding) -> jax.Array:
    """Within shard_map: whether this device is the first of those with its shard."""
    cut = {name for axis in sharding.spec for name in _names(axis)}
    first = jnp.bool_(True)
    for name in sharding.mesh.axis_names:
        if name not in cut:
            first = first & (lax.axis_index(name) == 0)
    return first


def advice(path: str, blocks: Blocks, sharding: NamedSharding) -> str:
    """What to do about a leaf whose blocks straddle shards."""
    assert blocks.axis is not None
    length = shard(blocks, sharding).shape[blocks.axis]
    fits = []
    for size in (16, 8):
        other = blocks_of(blocks.shape, size, blocks.axis, blocks.layers)
        if aligned(other, sharding):
            fits.append(f"block_size={size}")
            break
    for axis in range(len(blocks.shape)):
        # Whatever block_size is given: it is not known here.
        sizes = (blocks_of(blocks.shape, 2**n, axis) for n in range(3, 9))
        fit = all(aligned(other, sharding) for other in sizes)
        if axis not in (blocks.axis, *blocks.layers) and fit:
            fits.append(f"block_axis={axis}")
            break
    fitting = " or ".join(fits) if fits else "state='32bit', or another sharding,"
    return (
        f"{path!r} of shape {blocks.shape} with {sharding.spec}: blocks of "
        f"{blocks.size} along axis {blocks.axis} straddle its shards of {length}; "
        f"{fitting} fits"
    )
