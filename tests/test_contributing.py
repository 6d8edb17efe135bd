"""CONTRIBUTING's map names every room, and what it imports."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
_PACKAGES = ("optim", "pallas_kernels", "schedules")
# A format or a backend is one file, and no row of the map.
_UNLISTED = ("pallas_kernels/formats/", "pallas_kernels/backends/")


def rooms() -> dict[str, list[str]]:
    """The map: `optim/storage/tree.py` or `optim/storage/` -> what it may import."""
    found: dict[str, list[str]] = {}
    folder = ""
    for line in (ROOT / "CONTRIBUTING.md").read_text().splitlines():
        if line.startswith("#"):
            folder = next(iter(re.findall(r"`([\w/]+/)`", line)), "")
        elif folder and line.startswith("| `"):
            room, _, imports = (cell.strip() for cell in line.strip("|").split("|"))
            assert folder + room.strip("`") not in found, line
            found[folder + room.strip("`")] = re.findall(r"`([\w/]+)`", imports)
    return found


def test_the_map_names_every_file_and_folder() -> None:
    there = set()
    for package in _PACKAGES:
        files = {f.relative_to(ROOT) for f in (ROOT / package).rglob("*.py")}
        folders = {f"{f.parent}/" for f in files} - {f"{package}/"}
        listed = {str(f) for f in files if f.name != "__init__.py"}
        there |= folders | {f for f in listed if not f.startswith(_UNLISTED)}
    assert set(rooms()) == there


@pytest.mark.parametrize("room", rooms())
def test_a_room_imports_what_the_map_says(room: str) -> None:
    package, folder = room.partition("/")[0] + "/", room.rpartition("/")[0] + "/"
    # A name is that of a neighbour, or of a room directly in the package.
    listed = rooms()[room]
    allowed = [start + x for x in listed for start in (folder, package)]
    allowed += [x for x in listed if x.startswith("octavo/")]
    if package == "optim/":
        allowed.append("octavo/pallas_kernels/")
    if room == folder:
        allowed.append(room)
    for file in (ROOT / room).rglob("*.py") if room == folder else [ROOT / room]:
        for imported in _imports(file):
            inside = tuple(x for x in allowed if x.endswith("/"))
            known = imported in allowed or f"{imported}/".startswith(inside)
            assert known, f"{file} imports {imported}"


def _imports(file: Path) -> Iterator[str]:
    """What a file imports of Octavo: `optim/storage/tree`, or `octavo/...`."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (
                a.name.replace(".", "/") for a in node.names if "octavo" in a.name
            )
        if not isinstance(node, ast.ImportFrom):
            continue
        names = [a.name for a in node.names]
        module = (node.module or "").replace(".", "/")
        if not node.level:
            if module == "octavo":
                yield from (f"octavo/{x}" for x in names)
            elif module.startswith("octavo/"):
                yield module
            continue
        folder = file.parents[node.level - 1]
        if module:
            yield str((folder / module).relative_to(ROOT))
        else:
            for x in names:
                known = (folder / f"{x}.py").exists() or (folder / x).is_dir()
                yield str((folder / (x if known else "__init__")).relative_to(ROOT))
