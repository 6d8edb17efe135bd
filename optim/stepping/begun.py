"""A step that is checked and not yet run, and what it leaves behind."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from octavo.pallas_kernels import Storage

from ..storage.state import State, StateLeaves
from ..storage.tree import Leaves
from .operands import Operands, Step


class Begun(NamedTuple):
    """A step that is checked and not yet run.

    Attributes:
      step: what there is to do.
      state: before it.
      old: the same, flat.
      out: the tree of what it returns: parameters, or gradients.
      in_place: whether it returns parameters.
    """

    step: Step
    state: State
    old: StateLeaves
    out: Leaves
    in_place: bool

    def end(self, stepped: Sequence[Any], passed: Operands) -> tuple[Any, State]:
        """The parameters or updates, and the state, from the leaves after the step."""
        results = [
            leaf._replace(g=_zeros_like(leaf.g)) if result is None else result
            for leaf, result in zip(self.step.leaves, stepped, strict=True)
        ]
        if self.in_place:
            written = [r.p for r in results]
        else:
            pairs = zip(results, self.step.work, strict=True)
            written = [_update(r.g, work.program.storage) for r, work in pairs]
        trees = self.old.replaced(self.state, results)
        return self.out.replaced(written), _replaced(self.state, trees, passed)


def _update(g: Any, record: Storage) -> Any:
    """In the type of the parameter where it is what that changes by."""
    return g.astype(record.dtype) if record.rounds else g


def _zeros_like(g: Any) -> Any:
    return g if g.dtype == jax.dtypes.float0 else jnp.zeros_like(g)


def _replaced(state: State, trees: dict[str, Any], passed: Operands) -> State:
    """The state after a step."""
    count, extra = jnp.asarray(optax.safe_increment(state.count)), passed.extra
    if passed.take is not None:
        taken = passed.take > 0.0
        count, extra = jax.tree.map(
            lambda new, old: jnp.where(taken, new, old),
            (count, extra),
            (state.count, state.extra),
        )
        skipped = optax.safe_increment(state.extra["skipped"])
        extra["skipped"] = jnp.where(taken, state.extra["skipped"], skipped)
    return state._replace(count=count, extra=extra, **trees)
