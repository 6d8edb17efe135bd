"""Restoring: what fits is loaded, what does not is named, or converted on request."""

from collections.abc import Collection
from os import PathLike
from typing import Any

import jax
import orbax.checkpoint as ocp

from ..integrations.flax import TrainState
from .description import CheckpointError, flat, seed_of
from .files import Saved, open_saved
from .matching import Match
from .target import Target


def restore(
    manager: ocp.CheckpointManager | str | PathLike[str],
    tx: Any,
    target: Any,
    sharding: Any = None,
    *,
    step: int | None = None,
    only: Collection[str] | None = None,
    partial: bool = False,
    convert: bool = False,
    verify: bool = True,
) -> Any:
    """Restore a train state, onto any mesh.

    Args:
      manager: Orbax' manager, or the folder of one.
      tx: the optimizer of `target`.
      target: what to restore into: a `TrainState` or the tree that was saved, of arrays
        or of `jax.ShapeDtypeStruct`; or parameters alone, to restore a `TrainState`
        without apply_fn.
      sharding: tree of NamedSharding like the parameters, or a prefix of one; an
        optimizer's moments are then sharded like its parameters, everything else is
        replicated. Default None: as the arrays of `target` are.
      step: which. Default None: the newest complete one.
      only: fields of the target to restore, such as `["params"]` or `["opt_state"]`;
        the others stay as they are in `target`.
      partial: leaves that the checkpoint does not have stay as they are in `target`
        (a new head), and those that only the checkpoint has are left out. Default
        False: either is an error.
      convert: whether to convert what is stored otherwise: moments in 32 bits or 8, in
        another format, block size or axis, or saved by optax; parameters of another
        type. Default False: that is an error, which names the first difference.
      verify: whether to compare checksums, where the checkpoint has them: one read of
        all arrays on the devices. Default True.

    Returns:
      Like `target`, restored.

    Raises:
      FileNotFoundError: if the folder or the step does not exist.
      CheckpointError: if the checkpoint does not fit.
      DamagedCheckpointError: if its files are not what was written.
    """
    saved = open_saved(manager, step)
    tree = _as_saved(saved, tx, target)
    wanted = Target.of(tx, tree, sharding, only)
    if wanted.states:
        _check_seed(saved, tx, convert)
    match = Match(saved, wanted, partial=partial, convert=convert, verify=verify)
    reads = match.reads()
    arrays = saved.load(reads, verify)
    return wanted.filled(match.fill(arrays))


def _as_saved(saved: Saved, tx: Any, target: Any) -> Any:
    """The target as a tree like the one saved: around parameters, a TrainState."""
    fields = {path.partition("/")[0] for path in saved.arrays}
    own = {path.partition("/")[0] for path in flat(target)}
    if own & fields or not {"params", "opt_state"} <= fields:
        return target
    made = jax.eval_shape(
        lambda p: TrainState.create(apply_fn=None, params=p, tx=tx), target
    )
    return made.replace(params=target)


def _check_seed(saved: Saved, tx: Any, convert: bool) -> None:
    noted = None if saved.description is None else saved.description["seed"]
    own = seed_of(tx)
    if not convert and None not in (noted, own) and noted != own:
        raise CheckpointError(
            f"{saved.folder} was saved with seed={noted}, but the optimizer has "
            f"seed={own}: its rounding would go on with other random numbers. Pass "
            f"seed={noted} to the optimizer, or convert=True to take the new one"
        )
