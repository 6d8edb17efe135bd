"""The shardings of parameters that exist, by path: what `tx.bind` remembers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from ..storage.shards import mesh_axes
from ..storage.tree import path_name


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
    """The shardings that parameters have; None where all are on one device.

    Raises:
      ValueError: where none of them says how it is sharded.
    """
    flat, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=_says)
    found = {path_name(path): _sharding(leaf) for path, leaf in flat}
    known = [s for s in found.values() if isinstance(s, NamedSharding)]
    if known:
        everywhere = NamedSharding(known[0].mesh, PartitionSpec())
        # Beside arrays on a mesh, those on one device are new, and small.
        return Bound({p: s if s in known else everywhere for p, s in found.items()})
    if found and all(s is None for s in found.values()):
        raise ValueError(
            "bind: none of the parameters says how it is sharded. Give arrays that are "
            "on their devices; shapes with shardings, such as those of "
            "nnx.get_abstract_model; a tree of NamedSharding; or call within "
            "jax.set_mesh(mesh) where flax's metadata has names of mesh axes"
        )
    return None


def _says(x: Any) -> bool:
    from flax import nnx  # not where Octavo is imported: it takes seconds
    from flax.core import meta

    return isinstance(x, nnx.Variable | meta.AxisMetadata | PartitionSpec)


def _sharding(leaf: Any) -> Any:
    """Of a leaf or its box; None: it says nothing."""
    import flax.linen as nn
    from flax import nnx
    from flax.core import meta

    value, spec = leaf, None
    if isinstance(leaf, nnx.Variable):
        value, spec = leaf.get_raw_value(), nnx.get_partition_spec(leaf).get_raw_value()
    elif isinstance(leaf, meta.AxisMetadata):
        value = leaf.unbox(apply_constraint=False)
        spec = nn.get_partition_spec(leaf)
        if isinstance(leaf, nn.LogicallyPartitioned):
            spec = nn.logical_to_mesh(spec)
    elif isinstance(leaf, PartitionSpec):
        spec = leaf
    own = value if isinstance(value, jax.sharding.Sharding) else _of_array(value)
    if isinstance(own, NamedSharding):
        return own
    mesh = jax.sharding.get_mesh()
    names = {name for axis in spec or () for name in mesh_axes(axis)}
    if spec is None or mesh.empty or not names <= set(mesh.axis_names):
        return own
    return NamedSharding(mesh, spec)


def _of_array(x: Any) -> jax.sharding.Sharding | None:
    return getattr(x, "sharding", None) if not isinstance(x, jax.core.Tracer) else None
