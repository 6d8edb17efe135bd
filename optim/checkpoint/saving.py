"""Saving with a description."""

from typing import Any

import orbax.checkpoint as ocp

from .description import describe
from .files import DESCRIPTION, STATE


def save(
    manager: ocp.CheckpointManager,
    step: int,
    train_state: Any,
    *,
    tx: Any = None,
    checksums: bool = True,
    metrics: Any = None,
    force: bool = False,
    **items: Any,
) -> bool:
    """Save a train state, and beside it a description of what it holds.

    Asynchronous if the manager is: it returns once the arrays are copied from the
    devices. `manager.wait_until_finished()` waits for the files; a process that ends
    before leaves the last complete step as the newest.

    Args:
      manager: Orbax' manager, of any options.
      step: the step's number.
      train_state: a `TrainState`, or any tree of arrays with optimizers' states in it.
      tx: the optimizer, whose seed is noted. Default None: `train_state.tx`, if it has
        one.
      checksums: whether to note a checksum of each array: one more read of all of them,
        on the devices. Default True.
      metrics: of a manager that keeps the best steps.
      force: whether to save a step that the manager's options would skip, such as the
        last one. Default False.
      **items: more Orbax items, such as `log=ocp.args.JsonSave({...})`.

    Returns:
      Whether the manager saved; its options may skip a step.

    Raises:
      ValueError: for items called "state" or "octavo".
    """
    taken = {STATE, DESCRIPTION} & set(items)
    if taken:
        raise ValueError(f"the item {taken.pop()!r} is this function's own")
    if not (force or manager.should_save(step)):
        return False
    tx = getattr(train_state, "tx", None) if tx is None else tx
    described = describe(step, train_state, tx, checksums)
    args = {
        STATE: ocp.args.StandardSave(train_state),
        DESCRIPTION: ocp.args.JsonSave(described),
        **items,
    }
    composite = ocp.args.Composite(**args)
    return manager.save(step, args=composite, metrics=metrics, force=force)
