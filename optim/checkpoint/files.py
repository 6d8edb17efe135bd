"""The files of one saved step."""

import re
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from ..storage.tree import path_name
from .checksum import is_shortened, shown, sums_of
from .description import CheckpointError, DamagedCheckpointError, flat, read

STATE, DESCRIPTION = "state", "octavo"  # the items of a step's folder
_NAMES = (STATE, "default", "pytree")  # of the arrays; Orbax' own for a lone item


@dataclass(frozen=True)
class Saved:
    """One step as it was saved.

    Attributes:
      folder: of the step.
      item: folder of its arrays.
      step: its number.
      others: the other complete steps.
      tree: shape and type of each array, in the structure that Orbax gives it.
      description: or None, if it was saved without.
    """

    folder: Any
    item: Any
    step: int
    others: tuple[int, ...]
    tree: Any
    description: dict[str, Any] | None

    @cached_property
    def arrays(self) -> dict[str, Any]:
        """Shape and type of each array, by its path."""
        return flat(self.tree)

    def load(self, wanted: Mapping[str, Any], verify: bool) -> dict[str, Any]:
        """Some of the arrays, by their paths.

        Args:
          wanted: paths to shardings. Without one, and where JAX would shorten their
            type, they are arrays of numpy.
          verify: whether to compare checksums.

        Raises:
          DamagedCheckpointError: if the files are not what was written.
        """

        def item(path: Any, leaf: Any) -> Any:
            chosen = path_name(path) in wanted
            shape, dtype = leaf.shape, np.dtype(leaf.dtype)
            return jax.ShapeDtypeStruct(shape, dtype) if chosen else ocp.PLACEHOLDER

        def arg(path: Any, leaf: Any) -> ocp.RestoreArgs:
            if path_name(path) not in wanted:
                return ocp.RestoreArgs()
            where = wanted[path_name(path)]
            if where is None or is_shortened(leaf.dtype):
                return ocp.RestoreArgs(restore_type=np.ndarray)
            return ocp.ArrayRestoreArgs(sharding=where)

        args = ocp.args.PyTreeRestore(
            item=jax.tree_util.tree_map_with_path(item, self.tree),
            restore_args=jax.tree_util.tree_map_with_path(arg, self.tree),
        )
        try:
            with closing(ocp.PyTreeCheckpointHandler()) as reader:
                tree = reader.restore(self.item, args=args)
        except Exception as error:  # whatever the layers below make of damaged files
            raise self.damaged(f"its arrays cannot be read: {_brief(error)}") from error
        named = flat(tree)
        arrays = {path: named[path] for path in wanted}
        if verify:
            self.verify(arrays)
        return arrays

    def verify(self, arrays: Mapping[str, Any]) -> None:
        """Raise DamagedCheckpointError unless checksums are those that were noted."""
        noted = {} if self.description is None else self.description["arrays"]
        own = {p: x for p, x in arrays.items() if "checksum" in noted.get(p, ())}
        for path, numbers in sums_of(own).items():
            if shown(numbers) != noted[path]["checksum"]:
                raise self.damaged(f"{path!r} is not what was written")

    def damaged(self, what: str) -> DamagedCheckpointError:
        """The error for damage to this step's files, which says what is left."""
        left = (
            f"step={max(self.others)} is the newest other one"
            if self.others
            else "there is no other step"
        )
        return DamagedCheckpointError(f"{self.folder} is damaged ({left}): {what}")


def open_saved(manager: Any, step: int | None) -> Saved:
    """A complete step, the newest if None.

    Args:
      manager: Orbax' manager, or the folder of one that names steps by their numbers.
      step: its number.

    Raises:
      FileNotFoundError: if the folder or the step does not exist.
      CheckpointError: if another version of Octavo wrote it.
      DamagedCheckpointError: if its files are not what was written.
    """
    if hasattr(manager, "wait_until_finished"):
        manager.wait_until_finished()
        manager.reload()
        root = manager.directory
        folders = {step: _folder(root, step) for step in manager.all_steps()}
    else:
        root = manager if "://" in str(manager) else Path(manager).absolute()
        names = ocp.path.step.standard_name_format()
        folders = {found.step: found.path for found in names.find_all(root)}
    if not folders:
        local = isinstance(root, Path)
        raise FileNotFoundError(
            f"{root}: there is no "
            f"{'such folder' if local and not root.is_dir() else 'complete step'}; "
            "save one with optim.checkpoint.save, or start without"
        )
    chosen = max(folders) if step is None else int(step)
    if chosen not in folders:
        raise FileNotFoundError(
            f"{root}: there is no step {chosen}; there are {sorted(folders)}"
        )
    others = tuple(s for s in folders if s != chosen)
    return _open(folders[chosen], chosen, others)


def _folder(root: Any, step: int) -> Any:
    """The folder of a step, however the manager names them."""
    named = [f for f in root.iterdir() if re.fullmatch(rf"(.*\D)?0*{step}", f.name)]
    if not named:
        raise FileNotFoundError(f"{root}: there is no folder of step {step}")
    return min(named, key=lambda folder: (_item(folder) is None, len(folder.name)))


def _item(folder: Any) -> Any:
    """The folder of a step's arrays; None if it has none."""
    return next((folder / n for n in _NAMES if (folder / n).is_dir()), None)


def _open(folder: Any, step: int, others: tuple[int, ...]) -> Saved:
    item = _item(folder)
    saved = Saved(folder, item, step, others, None, None)
    description = _description(saved)
    if item is None and description is not None:
        raise saved.damaged("its arrays are gone")
    if item is None:
        found = ", ".join(sorted(x.name for x in folder.iterdir() if x.is_dir()))
        raise CheckpointError(
            f"{folder} has no item called {' or '.join(_NAMES)}, but {found}; give the "
            f"state that name: ocp.args.Composite({STATE}=...)"
        )
    try:
        with closing(ocp.PyTreeCheckpointHandler()) as reader:
            tree = reader.metadata(item).tree
    except Exception as error:  # whatever the layers below make of damaged files
        raise saved.damaged(f"its metadata cannot be read: {_brief(error)}") from error
    saved = Saved(folder, item, step, others, tree, description)
    if description is not None:
        _compare(saved, description)
    return saved


def _description(saved: Saved) -> dict[str, Any] | None:
    """What a step says of itself; None if it was saved without."""
    item = saved.folder / DESCRIPTION
    if not item.exists():
        return None
    try:
        return read((item / "metadata").read_text())
    except (OSError, UnicodeError) as error:
        what = f"its description cannot be read: {_brief(error)}"
        raise saved.damaged(what) from error
    except DamagedCheckpointError as error:
        raise saved.damaged(f"its description {error}") from error
    except CheckpointError as error:
        raise CheckpointError(f"{saved.folder}: its description {error}") from None


def _brief(error: Exception) -> str:
    """What an error says, without the half page of settings that TensorStore adds."""
    return " ".join(str(error).partition("[tensorstore_spec")[0].split())


def _compare(saved: Saved, description: dict[str, Any]) -> None:
    """Raise DamagedCheckpointError unless the arrays are those of the description."""
    listed = {p: (list(x.shape), str(x.dtype)) for p, x in saved.arrays.items()}
    noted = {p: (x["shape"], x["dtype"]) for p, x in description["arrays"].items()}
    for path in sorted(listed.keys() | noted.keys()):
        if listed.get(path) != noted.get(path):
            raise saved.damaged(f"{path!r} is not what its description says")
