"""What both kernels share: operands in one order, outputs that overwrite inputs."""

from typing import Any

import jax
import jax.numpy as jnp

from ..step import Leaf, Program, Scalars


class Call:
    """The operands and results of one leaf's `pallas_call`.

    Operands are the scalars (one float32 vector), the key (one int32) and the leaf's
    arrays. Every result overwrites the array that it replaces: p, or for an update the
    gradient; the codes; the scales.
    """

    def __init__(
        self, program: Program, leaf: Leaf, scalars: Scalars, key: jax.Array
    ) -> None:
        if not program.reads_parameter:
            leaf = leaf._replace(p=None)
        assert leaf.g is not None
        for x in (leaf.g, leaf.p):
            if x is not None and jnp.dtype(x.dtype) not in _DTYPES:
                raise NotImplementedError(f"no kernel computes on {x.dtype}")
        if any(s is not None and s.shape == leaf.g.shape for s in leaf.scales):
            # The blocked axis has length 1. Kernels tell scales from codes by shape.
            raise NotImplementedError("blocks of one value are left to XLA")
        indices = list(range(len(jax.tree.leaves(leaf))))
        self.arrays: list[jax.Array] = jax.tree.leaves(leaf)
        self._treedef = jax.tree.structure(leaf)
        numbered = jax.tree.unflatten(self._treedef, indices)
        replaced = (
            numbered._replace(g=None) if program.in_place else numbered._replace(p=None)
        )
        self.written: list[int] = jax.tree.leaves(replaced)
        self._written_treedef = jax.tree.structure(replaced)
        numbers, self._scalars_treedef = jax.tree.flatten(scalars)
        self.operands = (jnp.stack(numbers).astype(jnp.float32), key.reshape(1))
        first = len(self.operands)
        self.aliases = {first + i: k for k, i in enumerate(self.written)}
        self.name = "octavo_step_" + "_".join(f.name for f in program.formats)

    def unpack(self, refs: Any) -> tuple[Scalars, jax.Array, list[Any], list[Any]]:
        """Scalars, key, and the references to inputs and outputs, in the kernel."""
        numbers, key, *rest = refs
        count = self._scalars_treedef.num_leaves
        scalars = self._scalars_treedef.unflatten([numbers[k] for k in range(count)])
        inputs, outputs = rest[: len(self.arrays)], rest[len(self.arrays) :]
        return scalars, key[0], inputs, outputs

    def leaf(self, arrays: list[jax.Array]) -> Leaf:
        """The arrays of `self.arrays`, or tiles of them, by name."""
        return jax.tree.unflatten(self._treedef, arrays)

    def results(self, arrays: list[jax.Array]) -> Leaf:
        """The kernel's results, by name."""
        return jax.tree.unflatten(self._written_treedef, arrays)


_DTYPES = tuple(jnp.dtype(t) for t in (jnp.float32, jnp.bfloat16, jnp.float16))
