"""What all kernels share: operands in one order, outputs that overwrite inputs."""

from typing import Any

import jax
import jax.numpy as jnp

from ..program import Leaf, Noise, Program, Scalars


class Call:
    """The operands of one leaf's `pallas_call`.

    Attributes:
      operands: small vectors: the scalars, float32; the ratio of each layer, if there
        is one; and for a step the noise: of the step and shard, and of the leaf. What
        leaves have in common stands apart from what they have not, so that XLA makes
        the former once for all of them.
      arrays: of the leaf.
      scaled: for each of them, whether it has one value for each block.
      written: for each result, which of the arrays it overwrites.
      aliases: the same as `pallas_call` wants it, counted with the operands.
    """

    def __init__(
        self, program: Program, leaf: Leaf, scalars: Scalars, noise: Noise
    ) -> None:
        self.arrays: list[jax.Array] = jax.tree.leaves(leaf)
        self._leaf = jax.tree.structure(leaf)
        values = jax.tree.map(lambda _: False, leaf)
        scales = jax.tree.map(lambda _: True, leaf.scales)
        self.scaled: list[bool] = jax.tree.leaves(values._replace(scales=scales))

        numbers, self._scalars = jax.tree.flatten(scalars._replace(ratio=None))
        self.operands = [jnp.stack(numbers).astype(jnp.float32)]
        self._has_ratio = scalars.ratio is not None
        if scalars.ratio is not None:
            self.operands.append(scalars.ratio.astype(jnp.float32))
        if not program.sums:
            self.operands.append(jnp.stack([noise.step, noise.origin]))
            self.operands.append(jnp.reshape(noise.leaf, (1,)))

        written = program.written(self.leaf(list(range(len(self.arrays)))))
        self._written = jax.tree.structure(written)
        self.written: list[int] = [] if program.sums else jax.tree.leaves(written)
        first = len(self.operands)
        self.aliases = {first + i: k for k, i in enumerate(self.written)}

    def unpack(
        self, refs: Any, layer: Any
    ) -> tuple[Scalars, Any, list[Any], list[Any]]:
        """In the kernel: the scalars of a layer, and the noise, if it is a step.

        Returns:
          Both, and references to the arrays and the outputs.
        """
        small, large = refs[: len(self.operands)], refs[len(self.operands) :]
        vector, *rest = small
        count = self._scalars.num_leaves
        scalars = self._scalars.unflatten([vector[k] for k in range(count)])
        if self._has_ratio:
            ratio, *rest = rest
            scalars = scalars._replace(ratio=ratio[layer])
        noise = None
        if rest:
            start, leaf = rest
            noise = Noise(start[0], leaf[0], start[1])
        arrays = len(self.arrays)
        return scalars, noise, list(large[:arrays]), list(large[arrays:])

    def leaf(self, arrays: list[Any]) -> Leaf:
        """The arrays of `self.arrays`, or tiles of them, by name."""
        return jax.tree.unflatten(self._leaf, arrays)

    def sorted(self, outputs: list[Any]) -> tuple[list[Any], list[Any]]:
        """Outputs that have values, and those that have scales."""
        pairs = list(zip(outputs, self.written, strict=True))
        values = [x for x, i in pairs if not self.scaled[i]]
        return values, [x for x, i in pairs if self.scaled[i]]

    def results(self, arrays: list[jax.Array]) -> Leaf:
        """The kernel's results, by name."""
        return jax.tree.unflatten(self._written, arrays)
