"""The passes over matrices: before they are made orthogonal, and after."""

from collections.abc import Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp

from octavo.pallas_kernels import Leaf

from ..sgd import DESCENT
from ..sharding.hosting import Paging
from ..stepping.operands import Step


def joined(one: Step, other: Step) -> Step:
    """The leaves of both, so that one pass runs all."""
    return one._replace(
        work=[*one.work, *other.work],
        leaves=[*one.leaves, *other.leaves],
        scalars=[*one.scalars, *other.scalars],
        ids=[*one.ids, *other.ids],
    )


def directions(step: Step) -> Step:
    """The pass that advances momentum, and writes where it points to."""
    work, leaves, scalars = [], [], []
    for w, leaf, s in zip(step.work, step.leaves, step.scalars, strict=True):
        program = replace(
            w.program,
            rule=replace(w.program.rule, decay=None),
            storage=replace(w.program.storage, weights=None),
            in_place=False,
        )
        work.append(w._replace(program=program, home=None, dtypes=w.dtypes[:1]))
        leaves.append(leaf._replace(p=None, remainder=None))
        scalars.append(s._replace(learning_rate=jnp.float32(-1.0), decay=None))
    return step._replace(work=work, leaves=leaves, scalars=scalars)


def writing(step: Step, directions: Sequence[jax.Array]) -> Step:
    """The pass that writes parameters: gradient descent along the directions."""
    work, leaves, scalars = [], [], []
    rows = zip(step.work, step.leaves, step.scalars, directions, strict=True)
    for w, leaf, s, direction in rows:
        program = replace(
            w.program,
            rule=replace(DESCENT, decay=w.program.rule.decay),
            storage=replace(w.program.storage, slots=()),
        )
        if not program.in_place:  # updates are of the gradient's type
            direction = direction.astype(w.dtypes[0])
        dtypes = (direction.dtype, *w.dtypes[1:])
        paging = w.paging if program.storage.has_remainder else Paging(None)
        given = {"program": program, "dtypes": dtypes, "paging": paging}
        work.append(w._replace(backend=None, **given))
        leaves.append(Leaf(direction, leaf.p, (), (), leaf.remainder))
        scalars.append(s._replace(rule=(), clip=None, clip_value=None))
    return step._replace(work=work, leaves=leaves, scalars=scalars)
