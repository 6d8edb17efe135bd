"""How parameters that exist say that they are sharded: `tx.bind`, and flax's boxes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from octavo.pallas_kernels import Storage

from ..checks import is_traced, warn_once
from ..storage.shards import mesh_axes
from ..storage.tree import is_boxed, leaf_name
from .geometry import fitting, shards


@dataclass(frozen=True)
class Bound:
    """A function from the path of a leaf to its sharding, for the option `sharding`."""

    shardings: Mapping[str, NamedSharding]

    def __call__(self, path: str) -> NamedSharding:
        """The sharding of a leaf.

        Raises:
          ValueError: if there was no such parameter.
        """
        if path not in self.shardings:
            raise ValueError(
                f"{path!r} was not among the parameters that this optimizer is bound "
                f"to, such as {next(iter(self.shardings))!r}: call tx.bind(params) "
                "with the tree that init and update are given"
            )
        return self.shardings[path]


def bound(params: Any) -> Bound | None:
    """The shardings that parameters have; None where each is on a device of its own.

    Raises:
      ValueError: where none of them says how it is sharded.
    """
    flat, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=_says)
    found = {leaf_name(path): _sharding(leaf) for path, leaf in flat}
    known = [s for s in found.values() if isinstance(s, NamedSharding)]
    if known:
        everywhere = NamedSharding(known[0].mesh, PartitionSpec())
        # Beside arrays on a mesh, those on one device are new, and small.
        return Bound({p: s if s in known else everywhere for p, s in found.items()})
    devices = {d for s in found.values() if s is not None for d in s.device_set}
    if len(devices) == 1:
        alone = NamedSharding(Mesh([*devices], ("device",)), PartitionSpec())
        return Bound(dict.fromkeys(found, alone))
    if found and not devices:
        raise ValueError(
            "bind: none of the parameters says how it is sharded. Give arrays that are "
            "on their devices; shapes with shardings, such as those of "
            "nnx.get_abstract_model; a tree of NamedSharding; or call within "
            "jax.set_mesh(mesh) where flax's metadata has names of mesh axes"
        )
    return None


def check_boxes(params: Any, records: Sequence[Storage]) -> None:
    """Say so before flax does, where its boxes give scales a spec that does not divide.

    Raises:
      ValueError: where nnx would raise, as soon as it has the state.
    """
    flat, _ = jax.tree_util.tree_flatten_with_path(params)
    if not any(is_boxed(path) for path, _ in flat):
        return
    from flax import nnx

    flat, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=_says)
    # Muon's two states have empty boxes where a leaf is the other's.
    boxes = [(path, box) for path, box in flat if jax.tree.leaves(box)]
    for (path, box), record in zip(boxes, records, strict=True):
        where, blocks = _by_metadata(box), record.blocks
        if where is None or not record.quantized:
            continue
        if fitting(where, blocks.scale_shape).spec == where.spec:
            continue
        parts = shards(where, len(blocks.shape))[blocks.axis or 0]
        message = (
            f"{leaf_name(path)!r} of shape {blocks.shape} has {where.spec}, and flax "
            f"gives that to its scales, too, whose shape {blocks.scale_shape} does "
            f"not divide: pass min_shards={parts} to the optimizer"
        )
        if isinstance(box, nnx.Variable):
            raise ValueError(message)
        warn_once(message + ", or take optim.state_sharding in place of flax's")


def _says(x: Any) -> bool:
    from flax import nnx  # not where Octavo is imported: it takes seconds
    from flax.core import meta

    return isinstance(x, nnx.Variable | meta.AxisMetadata | PartitionSpec)


def _sharding(leaf: Any) -> Any:
    """Of a leaf or its box; None: it says nothing."""
    values = jax.tree.leaves(leaf, is_leaf=lambda x: isinstance(x, PartitionSpec))
    value = values[0] if len(values) == 1 else None
    own = value if isinstance(value, jax.sharding.Sharding) else _of_array(value)
    return own if isinstance(own, NamedSharding) else _by_metadata(leaf) or own


def _by_metadata(box: Any) -> NamedSharding | None:
    """As flax's metadata says, or a spec, within a mesh."""
    from flax import linen as nn
    from flax import nnx
    from flax.core import meta

    spec: Any = None
    if isinstance(box, nnx.Variable):
        spec = nnx.get_partition_spec(box).get_raw_value()
    elif isinstance(box, meta.AxisMetadata):
        spec = nn.get_partition_spec(box)
        if isinstance(box, nn.LogicallyPartitioned):
            spec = nn.spmd.logical_to_mesh(spec)
    elif isinstance(box, PartitionSpec):
        spec = box
    mesh: Any = jax.sharding.get_abstract_mesh()
    if not mesh.empty and not is_traced(jnp.zeros(())):
        mesh = jax.sharding.get_mesh()  # with devices, but not within jit
    names = {name for axis in spec or () for name in mesh_axes(axis)}
    if spec is None or mesh.empty or not names <= set(mesh.axis_names):
        return None
    return NamedSharding(mesh, spec)


def _of_array(x: Any) -> jax.sharding.Sharding | None:
    return None if is_traced(x) else getattr(x, "sharding", None)
