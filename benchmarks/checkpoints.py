"""How large the parts of checkpoints are: in memory, and on disk, where Orbax
compresses them.

    python benchmarks/checkpoints.py out/8bit out/32bit

Each part of the newest step of each folder is saved once more, alone, and its files
are counted.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import orbax.checkpoint as ocp
from rich.console import Console
from rich.table import Table

from octavo.optim.checkpoint.files import open_saved


def parts(folder: Path) -> dict[str, dict[str, Any]]:
    """The arrays of the newest step: parameters, the optimizer's state, others."""
    saved = open_saved(folder, None)
    arrays = saved.load(dict.fromkeys(saved.arrays), verify=True)
    found: dict[str, dict[str, Any]] = {}
    for path, x in arrays.items():
        found.setdefault(path.partition("/")[0], {})[path.replace("/", ".")] = x
    return found


def on_disk(arrays: Mapping[str, Any]) -> int:
    """Bytes in the files of a checkpoint of these arrays alone."""
    with TemporaryDirectory() as folder, ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(Path(folder) / "alone", dict(arrays))
        checkpointer.wait_until_finished()
        return sum(f.stat().st_size for f in Path(folder).rglob("*") if f.is_file())


def main(argv: list[str]) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path, help="of checkpoint managers")
    parser.add_argument("--json", type=Path, help="where to write the figures, too")
    options = parser.parse_args(argv)
    table = Table("checkpoint", "part", "arrays", "bytes", "on disk", "disk / bytes")
    figures = {}
    for folder in options.folders:
        for part, arrays in parts(folder).items():
            size, disk = sum(x.nbytes for x in arrays.values()), on_disk(arrays)
            figures[f"{folder.name} {part}"] = {"bytes": size, "on_disk": disk}
            numbers = (f"{len(arrays)}", f"{size:,}", f"{disk:,}", f"{disk / size:.3f}")
            table.add_row(folder.name, part, *numbers)
    Console(width=100).print(table)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
