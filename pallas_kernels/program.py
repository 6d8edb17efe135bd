"""What is computed for a leaf, and the arrays that it takes: static, and operands."""

from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from .formats import widened
from .rule import Rule
from .storage import Storage
from .weights import Stored, full

# p: the parameter's squares. g: the clipped gradient's. x: those of what the ratio
# scales. bad: the number of values of the gradient that are NaN or infinite.
Sum: TypeAlias = Literal["p", "g", "x", "bad"]


class Leaf(NamedTuple):
    """One leaf's arrays, or one tile of them.

    On the way in, `g` is the gradient; on the way out of a step it is the update (not
    `in_place`), or None and `p` is the new parameter. `scales` is None where a slot's
    format has none, and so is `remainder` where nothing is kept of what rounding p
    lost.
    """

    g: Any
    p: Any
    codes: tuple[Any, ...]
    scales: tuple[Any, ...]
    remainder: Any = None


class Scalars(NamedTuple):
    """Operands that are one number for each leaf, or each of its layers.

    What is None is not computed.

    Args:
      learning_rate: the factor of the update; 1 for rules that are `rate_first`.
      rule: the rule's own scalars.
      decay: the rule's weight decay.
      clip: factor of the gradient.
      clip_value: largest magnitude of a gradient's value, after `clip`.
      take: whether to take the step at all, 1 or 0.
      ratio: the rule's ratio: float32 vector with one value for each layer; in a
        tile, something that broadcasts.
    """

    learning_rate: jax.Array
    rule: tuple[jax.Array, ...]
    decay: Any = None
    clip: jax.Array | None = None
    clip_value: jax.Array | None = None
    take: jax.Array | None = None
    ratio: Any = None


class Noise(NamedTuple):
    """What the random numbers of one leaf in one step start from: int32 scalars.

    Args:
      step: from `rounding.step_key`; the same for all leaves.
      leaf: from `rounding.leaf_number`; a constant of the leaf.
      origin: position in the whole leaf of the first value of this shard of it,
        modulo 2**32; 0 for a whole leaf.
    """

    step: Any
    leaf: Any
    origin: Any


@dataclass(frozen=True)
class Program:
    """What is compiled for a leaf: one pass over it, which steps it or measures it.

    Hashable, and without the leaf's path: equal leaves share one program.

    Args:
      rule: the algorithm.
      storage: how the leaf's state is stored.
      in_place: write the new parameter (True), or the update to add to it (False).
      sums: write these sums over each layer instead, float32 of shape (sums, layers).
    """

    rule: Rule
    storage: Storage
    in_place: bool = True
    sums: tuple[Sum, ...] = ()

    @property
    def name(self) -> str:
        """Of the kernel."""
        if self.sums:
            return "octavo_sums_" + "_".join(self.sums)
        names = [f.name for f in self.storage.formats]
        if self.storage.weights not in (None, "nearest"):
            names.append(self.storage.weights)
        return "_".join(("octavo_step", *names))

    @property
    def reads_state(self) -> bool:
        """Whether codes and scales are operands."""
        return not self.sums or ("x" in self.sums and self.rule.scales == "direction")

    @property
    def reads_parameter(self) -> bool:
        """Whether p is an operand."""
        joins = self.rule.decay
        if not self.sums:
            return self.in_place or joins is not None or self.storage.rounds
        with_decay = joins == "gradient" or (joins == "direction" and self.reads_state)
        return "p" in self.sums or ("x" in self.sums and with_decay)

    def read(self, leaf: Leaf) -> Leaf:
        """The leaf with only the arrays that are operands."""
        if not self.reads_parameter:
            leaf = leaf._replace(p=None, remainder=None)
        return leaf if self.reads_state else leaf._replace(codes=(), scales=())

    def written(self, leaf: Leaf) -> Leaf:
        """Of a leaf that was read, what a step overwrites."""
        return leaf._replace(g=None) if self.in_place else leaf._replace(p=None)

    def shard(self, parts: tuple[int, ...]) -> "Program":
        """The program of one shard."""
        return replace(self, storage=self.storage.shard(parts))


def wide(program: Program, leaf: Leaf, scalars: Scalars) -> Leaf:
    """A leaf in the types that are computed in; p is the value that it stands for."""
    dtype = scalars.learning_rate.dtype
    p = None if leaf.p is None else leaf.p.astype(dtype)
    storage, remainder = program.storage, leaf.remainder
    if remainder is not None:
        assert p is not None and storage.weights is not None
        remainder = remainder.astype(jnp.int32)
        p = full(Stored(p, remainder), storage.dtype, storage.weights)
    return Leaf(
        leaf.g.astype(dtype),
        p,
        tuple(widened(c, dtype) for c in leaf.codes),
        tuple(None if s is None else s.astype(jnp.float32) for s in leaf.scales),
        remainder,
    )
