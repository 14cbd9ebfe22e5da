"""Sphinx configuration: Markdown pages, and an API reference made from the docstrings. `make docs` builds the site."""

from __future__ import annotations

import os
import re
from importlib.metadata import version as version_of
from typing import Any

# transformers prints notices about torchvision while its modules are read.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

project = "slideredit-rt"
author = "the slideredit-rt authors"
copyright = author
release = version = version_of("slideredit-rt")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
source_suffix = {".md": "markdown", ".rst": "restructuredtext"}

# Pages: GitHub renders the same files, so only what both understand. Headings get GitHub's anchors.
myst_heading_anchors = 4
suppress_warnings = ["myst.xref_ambiguous"]

# Docstrings are Google style; `_read_code_as_markdown` reads their single backticks.
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_custom_sections = [("Attributes", "params_style")]
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
# Other projects' types are named, not linked: the site builds offline. Of ours, every public one must resolve.
nitpick_ignore_regex = [(r"py:.*", r"(?!slideredit_rt\.).*"), (r"py:.*", r"slideredit_rt\.(.*\.)?(_\w+|T)")]

html_theme = "furo"
html_title = f"slideredit-rt {release}"
html_show_copyright = False
html_show_sourcelink = False
# Named by a <picture> element, which Sphinx does not look into.
html_extra_path = ["architecture-light.svg", "architecture-dark.svg"]
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#0f5e9c", "color-brand-content": "#0f5e9c"},
    "dark_css_variables": {"color-brand-primary": "#7cc0f5", "color-brand-content": "#7cc0f5"},
}
copybutton_prompt_text = r"\$ |>>> |\.\.\. "
copybutton_prompt_is_regexp = True

linkcheck_timeout = 20
linkcheck_retries = 2
linkcheck_ignore = [r"https?://(127\.0\.0\.1|localhost|[\w.-]*example\.com)(:\d+)?(/.*)?$"]

_CODE = re.compile(r"(?<!`)`([^`]+)`(?!`)(\w?)")


def _read_code_as_markdown(app: Any, what: str, name: str, of: Any, options: Any, lines: list[str]) -> None:
    """Write `code` as ``code``, which reStructuredText ends with a space or a sign only: hence the escape before a letter."""

    def literal(found: re.Match[str]) -> str:
        return f"``{found[1]}``" + (f"\\ {found[2]}" if found[2] else "")

    lines[:] = _CODE.sub(literal, "\n".join(lines)).split("\n")


def setup(app: Any) -> None:
    """Register the hook on docstrings."""
    # Before napoleon, which splits entries at their colons.
    app.connect("autodoc-process-docstring", _read_code_as_markdown, priority=400)
