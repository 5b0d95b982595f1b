"""Configuration of the documentation site. `make docs` builds it into docs/_build/html."""

from pathlib import Path
from typing import Annotated, Any, get_origin

from docutils import nodes
from sphinx.application import Sphinx

from fcvit import __version__
from fcvit.training.recipe import fields_of_all_tasks

project = "FCViT for PaddlePaddle"
author = "The FCViT for PaddlePaddle authors"
project_copyright = f"2026, {author}"
release = version = __version__

extensions = ["cyclopts.ext.sphinx", "myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
myst_enable_extensions = ["html_image"]  # copies the images of `<img>`, which sets their width
myst_heading_anchors = 3
nb_execution_mode = "off"  # The notebook is stored with its outputs, which a test checks.
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_use_rtype = False
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(collections|fcvit|numpy|os|paddle|pathlib|PIL)\..*|FCViT|ImageLike")]  # types
smartquotes = False  # It would turn --option into a dash.
html_theme = "pydata_sphinx_theme"
html_title = project
html_show_sourcelink = False
html_sidebars = {page: [] for page in ("install", "tutorial", "changelog")}  # They have no section navigation.
html_theme_options = {
    "navigation_with_keys": True,
    "show_nav_level": 2,
    "show_toc_level": 2,
    "footer_start": ["copyright"],
    "footer_end": [],
}


def write_recipe_fields(app: Sphinx) -> None:
    """Write the table of recipe fields, which docs/reference/recipes.md includes, from their declarations."""
    rows = []
    group = ""
    for name, field in fields_of_all_tasks().items():
        if field.group != group:
            group = field.group
            rows += ["", f"## {group}", "", "| field | values | default | description |", "| --- | --- | --- | --- |"]
        default = f"`{field.default_text}`" if field.default_text else ""
        rows.append(f"| `{name}` | {field.expected} | {default} | {field.description} |")
    target = Path(app.srcdir) / "_build" / "recipe_fields.md"
    target.parent.mkdir(exist_ok=True)
    target.write_text("\n".join(rows) + "\n", "utf-8")


class WithoutCommandLine:
    """Hide the command-line part of annotated types while autodoc reads a function's signature."""

    def __init__(self, app: Sphinx):
        self.hidden: dict[str, Any] = {}
        app.connect("autodoc-before-process-signature", self.hide)
        app.connect("autodoc-process-signature", self.restore, priority=900)  # After autodoc's own listener.

    def hide(self, app: Sphinx, function: Any, bound: bool) -> None:
        self.hidden = getattr(function, "__annotations__", {})
        if self.hidden:
            function.__annotations__ = {
                name: hint.__origin__ if get_origin(hint) is Annotated else hint for name, hint in self.hidden.items()
            }

    def restore(self, app: Sphinx, kind: str, name: str, function: Any, *_: object) -> None:
        if self.hidden:
            function.__annotations__ = self.hidden
            self.hidden = {}


def write_dashes(app: Sphinx, document: nodes.document) -> None:
    """Write the dash between a parameter and its description, which `smartquotes` would write."""
    for text in list(document.findall(nodes.Text)):
        if text.astext() == " -- ":
            text.parent.replace(text, nodes.Text(" – "))


def setup(app: Sphinx) -> None:
    """Connect the generated pages and the changes to the reference pages."""
    app.connect("builder-inited", write_recipe_fields)
    app.connect("doctree-read", write_dashes)
    WithoutCommandLine(app)
