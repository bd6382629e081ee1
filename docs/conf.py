"""Settings of Sphinx; ``bash .ci/docs`` builds the pages."""

from __future__ import annotations

import importlib
import re
import textwrap
from collections import defaultdict
from typing import TYPE_CHECKING

import kdlit

if TYPE_CHECKING:
    from sphinx.application import Sphinx

project = "kdlit"
author = "the kdlit authors"
version = release = kdlit.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",  # the browser fetches MathJax: without a network pages show the source of formulas
]
html_theme = "furo"
html_title = f"kdlit {release}"
html_copy_source = False

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

autodoc_default_options = {
    "members": True,
    "show-inheritance": True,
    "exclude-members": "set",  # which matplotlib makes anew for every subclass of its artists
}
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_custom_sections = [("Keys", "params_style")]


def room(name: str) -> str:
    """Give the reST of the public names of a package, in sections by the module that each is from."""
    package = importlib.import_module(name)
    sections = defaultdict(list)
    for public in package.__all__:
        sections[getattr(package, public).__module__].append(public)
    lines = [f".. automodule:: {name}", "   :no-members:", "   :no-index:", ""]
    for module in sorted(sections, key=lambda module: (not module.endswith(".base"), module)):
        title = module.removeprefix(f"{name}.")
        lines += [title, "-" * len(title), "", f".. automodule:: {module}", "   :no-members:", "   :no-index:", ""]
        for public in sections[module]:
            kind = "autoclass" if isinstance(getattr(package, public), type) else "autofunction"
            lines += [f".. {kind}:: {name}.{public}", ""]
    return "\n".join(lines)


def manual(name: str) -> str:
    """Give what a command says about itself, as it stands."""
    text = importlib.import_module(name).__doc__ or ""
    return ".. code-block:: text\n\n" + textwrap.indent(text.replace("``", ""), "   ")


def fill_in(app: Sphinx, docname: str, source: list[str]) -> None:
    """Make what a page asks for by ``.. room:: PACKAGE`` and ``.. manual:: MODULE``."""
    makers = {"room": room, "manual": manual}
    asked = re.compile(rf"^\.\. ({'|'.join(makers)}):: (\S+)$", flags=re.MULTILINE)
    source[0] = asked.sub(lambda match: makers[match[1]](match[2]), source[0])


def setup(app: Sphinx) -> None:
    """Connect the above."""
    app.connect("source-read", fill_in)
