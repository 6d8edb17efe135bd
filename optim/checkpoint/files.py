"""The files of one saved step."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from ..tree import path_name
from .checksum import checksum, shown
from .description import DamagedCheckpointError, read

STATE, DESCRIPTION = "state", "octavo"  # the items of a step's folder


@dataclass(frozen=True)
class Saved:
    """One step as it was saved.

    Attributes:
      folder: of the step.
      step: its number.
      others: the other complete steps.
      tree: shape and type of each array, in the structure that Orbax gives it.
      description: or None, if it was saved without.
    """

    folder: Any
    step: int
    others: tuple[int, ...]
    tree: Any
    description: dict[str, Any] | None

    @property
    def arrays(self) -> dict[str, Any]:
        """Shape and type of each array, by its path."""
        with_paths, _ = jax.tree_util.tree_flatten_with_path(self.tree)
        return {path_name(path): leaf for path, leaf in with_paths}

    def load(self, wanted: Mapping[str, Any], verify: bool) -> dict[str, jax.Array]:
        """Some of the arrays, by their paths.

        Args:
          wanted: paths to shardings; None: one device.
          verify: whether to compare checksums.

        Raises:
          DamagedCheckpointError: if the files are not what was written.
        """
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

        def item(path: Any, leaf: Any) -> Any:
            if path_name(path) not in wanted:
                return ocp.PLACEHOLDER
            where = wanted[path_name(path)]
            where = here if where is None else where
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

        items = jax.tree_util.tree_map_with_path(item, self.tree)
        args = jax.tree.map(
            lambda x: (
                ocp.RestoreArgs()
                if x is ocp.PLACEHOLDER
                else ocp.ArrayRestoreArgs(sharding=x.sharding)
            ),
            items,
        )
        try:
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
                tree = reader.restore(
                    self.folder / STATE,
                    args=ocp.args.PyTreeRestore(item=items, restore_args=args),
                )
        except Exception as error:  # whatever the layers below make of damaged files
            raise self.damaged(f"its arrays cannot be read: {error}") from error
        with_paths, _ = jax.tree_util.tree_flatten_with_path(tree)
        named = {path_name(path): leaf for path, leaf in with_paths}
        arrays = {path: named[path] for path in wanted}
        if verify:
            self.verify(arrays)
        return arrays

    def verify(self, arrays: Mapping[str, jax.Array]) -> None:
        """Raise DamagedCheckpointError unless checksums are those that were noted."""
        noted = {} if self.description is None else self.description["arrays"]
        sums = {p: checksum(x) for p, x in arrays.items() if "checksum" in noted[p]}
        for path, numbers in jax.device_get(sums).items():
            if shown(numbers) != noted[path]["checksum"]:
                raise self.damaged(f"{path!r} is not what was written")

    def damaged(self, what: str) -> DamagedCheckpointError:
        """The error for damage to this step's files, which says what is left."""
        left = (
            f"restore step {max(self.others)}" if self.others else "there is no other"
        )
        return DamagedCheckpointError(f"{self.folder} is damaged: {what}; {left}")


def open_saved(manager: Any, step: int | None) -> Saved:
    """A complete step, the newest if None.

    Raises:
      FileNotFoundError: if the folder or the step does not exist.
      CheckpointError: if another version of Octavo wrote it.
      DamagedCheckpointError: if its files are not what was written.
    """
    if isinstance(manager, str | Path):
        root = Path(manager).absolute()
        if not root.is_dir():
            raise FileNotFoundError(
                f"{root}: there is no such folder of checkpoints; save one with "
                "optim.checkpoint.save, or start without"
            )
        options = ocp.CheckpointManagerOptions(read_only=True)
        with ocp.CheckpointManager(root, options=options) as opened:
            return open_saved(opened, step)
    manager.wait_until_finished()
    steps = sorted(manager.all_steps(read=True))
    if not steps:
        raise FileNotFoundError(
            f"{manager.directory}: there is no complete step; save one with "
            "optim.checkpoint.save, or start without"
        )
    chosen = int(steps[-1] if step is None else step)
    if chosen not in steps:
        raise FileNotFoundError(
            f"{manager.directory}: there is no step {chosen}; there are {steps}"
        )
    others = tuple(s for s in steps if s != chosen)
    return _open(_folder(manager, chosen), chosen, others)


def _folder(manager: ocp.CheckpointManager, step: int) -> Any:
    """The folder of a step, however the manager names them."""
    for folder in manager.directory.iterdir():
        if re.fullmatch(rf"(.*\D)?0*{step}", folder.name):
            return folder
    raise FileNotFoundError(f"{manager.directory}: there is no folder of step {step}")


def _open(folder: Any, step: int, others: tuple[int, ...]) -> Saved:
    saved = Saved(folder, step, others, None, None)
    described = folder / DESCRIPTION / "metadata"
    description = read(described.read_text(), described) if described.exists() else None
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            tree = reader.metadata(folder / STATE).item_metadata.tree
    except Exception as error:  # whatever the layers below make of damaged files
        raise saved.damaged(f"its metadata cannot be read: {error}") from error
    saved = Saved(folder, step, others, tree, description)
    if description is not None:
        listed = {
            path: {"shape": list(x.shape), "dtype": str(x.dtype)}
            for path, x in saved.arrays.items()
        }
        noted = {
            path: {key: x[key] for key in ("shape", "dtype")}
            for path, x in description["arrays"].items()
        }
        if listed != noted:
            raise saved.damaged("its arrays are not those of its description")
    return saved
