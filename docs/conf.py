"""How Sphinx makes the site of these pages: `make docs`."""

import inspect
import re
from importlib.metadata import version as version_of
from typing import Any

from sphinx.application import Sphinx

from octavo.optim import Options

project = "Octavo"
author = "the authors of Octavo"
version = release = version_of("octavo")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_external_toc",
    "sphinx-mathjax-offline",
]
exclude_patterns = ["_build"]

# Pages are plain Markdown, as code hosts show it: the table of contents is _toc.yml.
external_toc_path = "_toc.yml"
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_fence_as_directive = ["math"]
myst_heading_anchors = 4
highlight_language = "text"

# `name` in docstrings is code, and a link where the name is on the site. Names of
# Octavo in full have to be there.
default_role = "py:obj"
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(?!octavo\.).*")]
autodoc_typehints = "none"
python_maximum_signature_line_length = 88
napoleon_attr_annotations = False
napoleon_use_ivar = True
napoleon_use_rtype = False
toc_object_entries_show_parents = "hide"

html_theme = "sphinx_book_theme"
html_title = "Octavo"
html_theme_options = {
    "show_toc_level": 2,
    "use_download_button": False,
    "navbar_persistent": [],  # the search is in the sidebar
}
html_static_path = ["_static"]
html_css_files = ["wide.css"]
html_copy_source = False
copybutton_exclude = ".linenos, .gp, .go"

# Pages of the site whose text is above this folder.
_ABOVE = re.compile(r"\]\((?:\.\./)+(CONTRIBUTING|CHANGELOG)\.md")


def _link_inside(app: Sphinx, page: str, source: list[str]) -> None:
    """Links to the files of the repository that are pages here, too, lead there."""
    source[0] = _ABOVE.sub(lambda m: f"](/{m[1].lower()}.md", source[0])


def _fold_options(app: Sphinx, described: Any, bound_method: bool) -> None:
    """Signatures end with `**options`: one page has what all optimizers take."""
    signature = getattr(described, "__signature__", None)
    if signature is None:
        return
    options = inspect.Parameter("options", inspect.Parameter.VAR_KEYWORD)
    own = [
        p for n, p in signature.parameters.items() if n not in Options.__annotations__
    ]
    if len(own) < len(signature.parameters):
        described.__signature__ = signature.replace(parameters=[*own, options])


def setup(app: Sphinx) -> None:
    app.connect("source-read", _link_inside)
    app.connect("autodoc-before-process-signature", _fold_options)
