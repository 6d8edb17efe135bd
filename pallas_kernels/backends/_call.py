"""What all kernels share: operands in one order, outputs that overwrite inputs."""

from typing import Any

import jax
import jax.numpy as jnp

from ..rounding import Noise
from ..step import Leaf, Program, Scalars


class Call:
    """The operands of one leaf's `pallas_call`.

    They are the scalars (one float32 vector, which ends with the ratio of each layer),
    the noise if there is any (two int32), and the leaf's arrays.
    """

    def __init__(
        self, leaf: Leaf, scalars: Scalars, noise: Noise | None = None
    ) -> None:
        assert leaf.g is not None
        for x in (leaf.g, leaf.p):
            if x is not None and jnp.dtype(x.dtype) not in _DTYPES:
                raise NotImplementedError(f"no kernel computes on {x.dtype}")
        if any(s is not None and s.shape == leaf.g.shape for s in leaf.scales):
            # The blocked axis has length 1. Kernels tell scales from codes by shape.
            raise NotImplementedError("blocks of one value are left to XLA")
        self.arrays: list[jax.Array] = jax.tree.leaves(leaf)
        self._treedef = jax.tree.structure(leaf)
        self._has_ratio = scalars.ratio is not None
        ratio = [] if scalars.ratio is None else [scalars.ratio.astype(jnp.float32)]
        numbers, self._scalars_treedef = jax.tree.flatten(scalars._replace(ratio=None))
        vector = jnp.concatenate([jnp.stack(numbers).astype(jnp.float32), *ratio])
        self.operands = [vector] if noise is None else [vector, jnp.stack(noise)]

    def unpack(self, refs: Any, layer: Any) -> tuple[Scalars, list[Any], list[Any]]:
        """In the kernel: the scalars of a layer, and what `operands` do not hold.

        Returns:
          Scalars, references to the arrays, and the noise's, if any, and the outputs'.
        """
        vector, *rest = refs
        count = self._scalars_treedef.num_leaves
        scalars = self._scalars_treedef.unflatten([vector[k] for k in range(count)])
        if self._has_ratio:
            scalars = scalars._replace(ratio=vector[count + layer])
        others = len(self.operands) - 1
        arrays = rest[others : others + len(self.arrays)]
        return scalars, arrays, rest[:others] + rest[others + len(self.arrays) :]

    def leaf(self, arrays: list[jax.Array]) -> Leaf:
        """The arrays of `self.arrays`, or tiles of them, by name."""
        return jax.tree.unflatten(self._treedef, arrays)


class StepCall(Call):
    """A `Call` whose results overwrite arrays: p, or for an update g; codes; scales."""

    def __init__(
        self, program: Program, leaf: Leaf, scalars: Scalars, noise: Noise
    ) -> None:
        if not program.reads_parameter:
            leaf = leaf._replace(p=None)
        super().__init__(leaf, scalars, noise)
        numbered = self.leaf(list(range(len(self.arrays))))  # type: ignore[arg-type]
        replaced = (
            numbered._replace(g=None) if program.in_place else numbered._replace(p=None)
        )
        self.written: list[int] = jax.tree.leaves(replaced)
        self._written_treedef = jax.tree.structure(replaced)
        first = len(self.operands)
        self.aliases = {first + i: k for k, i in enumerate(self.written)}
        self.name = "octavo_step_" + "_".join(f.name for f in program.formats)

    def results(self, arrays: list[jax.Array]) -> Leaf:
        """The kernel's results, by name."""
        return jax.tree.unflatten(self._written_treedef, arrays)


_DTYPES = tuple(jnp.dtype(t) for t in (jnp.float32, jnp.bfloat16, jnp.float16))
