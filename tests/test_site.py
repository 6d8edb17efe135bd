"""The site builds without a warning, every public name is in it, and links lead on."""

import os
import re
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from urllib.parse import urlsplit

from octavo import optim, schedules
from octavo.optim import checkpoint

from pages import blocks

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
# Those of the root are pages of the site, too, but for the README.
PAGES = [*ROOT.glob("*.md"), *DOCS.glob("**/*.md")]
_LINK = re.compile(r"\]\(<?([^)<>\s]+)>?\)")


def build(source: Path, out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """What `make docs` runs."""
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", *more]
    return subprocess.run(
        [*command, "-c", DOCS, source, out], capture_output=True, text=True
    )


def test_the_site(tmp_path: Path) -> None:
    done = build(DOCS, tmp_path)
    assert done.returncode == 0, done.stderr
    known = described(tmp_path)
    for module in (optim, schedules, checkpoint):
        absent = [name for name in public(module) if name not in known]
        assert not absent, f"docs/api/ has no place for {absent}"
    dead = [f"{page.name}: {x}" for page in PAGES for x in dead_links(page, tmp_path)]
    assert not dead


def described(site: Path) -> set[str]:
    """The names of Python that the site has a place for."""
    inventory = (site / "objects.inv").read_bytes().split(b"\n", 4)[4]
    lines = zlib.decompress(inventory).decode().splitlines()
    return {line.split()[0] for line in lines if " py:" in line}


def public(module: ModuleType) -> Iterator[str]:
    """What users call, in full: what is Octavo's own, and not a module."""
    for name in dir(module):
        item = getattr(module, name)
        own = getattr(item, "__module__", "octavo").startswith("octavo")
        if own and name[0] != "_" and not isinstance(item, ModuleType | bool):
            yield f"{module.__name__}.{name}"


def dead_links(page: Path, site: Path) -> Iterator[str]:
    """Links of a page that lead nowhere, on the site or on a code host."""
    fenced = {k for b in blocks(page) for k in range(b.line, b.line + len(b.lines))}
    lines = enumerate(page.read_text().splitlines(), 1)
    text = "\n".join(line for number, line in lines if number not in fenced)
    for target in _LINK.findall(text):
        parts = urlsplit(target)
        if parts.scheme:
            if parts.scheme != "https" or not re.search(r"\w\.\w", parts.netloc):
                yield target
            continue
        file = Path(os.path.normpath(page.parent / parts.path)) if parts.path else page
        if not file.exists() or (
            parts.fragment and parts.fragment not in anchors(file, site)
        ):
            yield target


def anchors(page: Path, site: Path) -> set[str]:
    """The places of a page that links may name."""
    inside = DOCS in page.parents
    name = page.relative_to(DOCS).with_suffix("") if inside else page.stem.lower()
    html = site / f"{name}.html"
    return (
        set(re.findall(r'id="([^"]+)"', html.read_text())) if html.exists() else set()
    )


def test_what_is_dead_is_found(tmp_path: Path) -> None:
    page = tmp_path / "index.md"
    dead = ["https://nowhere", "gone.md", "index.md#gone"]
    page.write_text("# One\n\n[a](https://nowhere) [b](gone.md) [c](index.md#gone)\n")
    assert list(dead_links(page, tmp_path)) == dead
    (tmp_path / "_toc.yml").write_text("root: index\n")
    page.write_text(
        page.read_text() + "![d](gone.png)\n\n```{eval-rst}\n`octavo.x`\n```\n"
    )
    toc = f"external_toc_path={tmp_path / '_toc.yml'}"
    done = build(tmp_path, tmp_path / "site", "-D", toc)
    assert done.returncode != 0
    for warning in (
        "'gone.md'",
        "not found in doc 'index': 'gone'",
        "gone.png",
        "octavo.x",
    ):
        assert warning in done.stderr
