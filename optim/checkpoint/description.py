"""What a checkpoint says of itself: a small JSON beside the arrays."""

import hashlib
import json
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import jax
import numpy as np

from ..stepping.transformation import Transformation
from ..storage.state import State
from ..storage.table import records_of
from ..storage.tree import path_name
from ..wrapping.transformation import Quantized
from .checksum import is_key, shown, sums_of

VERSION = 1


class CheckpointError(ValueError):
    """A checkpoint that does not fit what it is to be restored into."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint whose files are not what was written."""


def describe(step: int, tree: Any, tx: Any = None, checksums: bool = True) -> Any:
    """The description of a tree that is about to be saved.

    Its arrays are listed as Orbax stores them.

    Args:
      step: its number.
      tree: what is saved: arrays, and anywhere among them states of optimizers.
      tx: the optimizer, whose seed is noted if it is Octavo's.
      checksums: whether to read all arrays for a checksum of each.

    Raises:
      ValueError: for a leaf that is no array, and a state that was zeroed.
    """
    arrays: dict[str, dict[str, Any]] = {}
    for path, x in flat(tree).items():
        shape, dtype = form(x)
        if dtype.kind in "OSU":
            raise ValueError(
                f"{path!r} is {x!r}, not an array: save it as an item of its own, such "
                "as log=ocp.args.JsonSave({...})"
            )
        arrays[path] = {"shape": list(shape), "dtype": str(dtype)}
    if checksums:
        sums = sums_of(flat(tree))
        for path, numbers in sums.items():
            arrays[path]["checksum"] = shown(numbers)
    content = {
        "description": VERSION,
        "octavo": metadata.version("octavo"),
        "jax": jax.__version__,
        "step": int(step),
        "seed": seed_of(tx),
        "states": {path: _state(state) for path, state in states_of(tree).items()},
        "arrays": arrays,
    }
    return content | {"digest": _digest(content)}


def seed_of(tx: Any) -> int | None:
    """The seed of an Octavo optimizer."""
    if isinstance(tx, Quantized):
        return tx.wrapper.settings.seed
    return tx.optimizer.settings.seed if isinstance(tx, Transformation) else None


def _state(state: State) -> dict[str, Any]:
    return {
        "count": int(state.count),
        "slots": list(state.slots),
        "leaves": {
            path: {
                "shape": list(record.shape),
                "formats": [f.name for f in record.formats],
                "block_size": record.blocks.size,
                "block_axis": record.blocks.axis,
                "weights": record.weights,
            }
            for path, record in records_of(state).items()
        },
    }


def read(text: str) -> dict[str, Any]:
    """A description from its file.

    Raises:
      DamagedCheckpointError: if it is not what was written.
      CheckpointError: if another version of Octavo wrote it.
    """
    try:
        content = json.loads(text)
        digest = content.pop("digest")
        version = content["description"]
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise DamagedCheckpointError(f"cannot be read: {error!r}") from error
    if version != VERSION:
        raise CheckpointError(
            f"has version {version} (of Octavo {content.get('octavo')}), but this "
            f"Octavo reads version {VERSION}: restore with that one and save again, or "
            "read the arrays with Orbax"
        )
    if digest != _digest(content):
        raise DamagedCheckpointError("is not the one that was written")
    return content


def _digest(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def flat(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by their paths, `opt_state/0/mu/kernel`."""
    with_paths, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {path_name(path): leaf for path, leaf in with_paths}


def form(x: Any) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and type of a leaf, as Orbax stores it."""
    if is_key(x):
        x = jax.eval_shape(jax.random.key_data, x)
    x = x if hasattr(x, "dtype") else np.asarray(x)
    return tuple(x.shape), np.dtype(x.dtype)


def states_of(tree: Any) -> dict[str, State]:
    """The states of Octavo optimizers in a tree, by their paths.

    But for those that `jax.vmap` stacked, whose arrays are saved as they are.
    """
    with_paths, _ = jax.tree_util.tree_flatten_with_path(
        tree, is_leaf=lambda x: isinstance(x, State)
    )
    found = {path_name(path): x for path, x in with_paths if isinstance(x, State)}
    return {path: state for path, state in found.items() if not state.count.ndim}
