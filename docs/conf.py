"""The documentation's site: ``python -m sphinx -W --keep-going -n docs build/docs``."""

import inspect
import sys
from importlib.metadata import version as version_of
from pathlib import Path

import nbformat
from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util import import_object, logging
from sphinx.util.docutils import SphinxDirective
from sphinx.writers.html5 import HTML5Translator

sys.path.insert(0, str(Path(__file__).parent / "course"))
import execution

project = "sb3_vpg"
author = "The sb3_vpg authors"
version = release = version_of("sb3_vpg")

# myst_nb includes myst_parser
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.viewcode"]
html_theme = "furo"
html_title = f"sb3_vpg {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_copyright = False
html_math_renderer = "mathml"

myst_enable_extensions = ["dollarmath"]
# Links to headings as GitHub understands them, too
myst_heading_anchors = 3
# execution.py executes the notebooks
nb_execution_mode = "off"
nb_merge_streams = True

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_preserve_defaults = True

# Only our own names can be looked up without a network. sb3_vpg.common is not public. SelfVPG is a type variable.
nitpick_ignore_regex = [("py:.*", r"(?!sb3_vpg).*|sb3_vpg\.common\..*|sb3_vpg\.vpg\.SelfVPG")]


class MarkdownDocstring(SphinxDirective):
    """The docstring of an environment, which is written in Markdown, as everywhere in gymnasium."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        return self.parse_text_to_nodes(inspect.getdoc(import_object(self.arguments[0])), allow_section_headings=True)


def visit_math(translator: HTML5Translator, node: nodes.math | nodes.math_block) -> None:
    """MathML: browsers draw it on their own, without a script from elsewhere."""
    try:
        translator.body.append(tex2mathml(node.astext(), as_block=isinstance(node, nodes.math_block)))
    except MathError as error:
        logging.getLogger(__name__).warning("%s in %r", error, node.astext(), location=node)
    raise nodes.SkipNode


def is_field(app: Sphinx, what: str, name: str, obj: object, skip: bool, options: object) -> bool | None:
    """Leave out the fields of named tuples: the class has them as parameters."""
    return True if type(obj).__name__ == "_tuplegetter" else None


def execute_notebooks(app: Sphinx) -> None:
    execution.execute_all()


def read_notebooks_again(app: Sphinx, env: BuildEnvironment, *docnames: set[str]) -> list[str]:
    """The outputs of a notebook can change although its file does not."""
    return [env.path2doc(notebook) or "" for notebook in execution.NOTEBOOKS]


def insert_outputs(app: Sphinx, docname: str, source: list[str]) -> None:
    """Replace a notebook of the course by the executed one, with a link to download it."""
    notebook = Path(app.env.doc2path(docname))
    if notebook in execution.NOTEBOOKS:
        node = execution.executed(notebook)
        title, _, rest = node.cells[0].source.partition("\n")
        link = f'<a href="{notebook.name}" download>Download this notebook</a>'
        node.cells[0].source = f"{title}\n\n{link} or read on.\n{rest}"
        source[0] = nbformat.writes(node)


def write_downloads(app: Sphinx, exception: Exception | None) -> None:
    if exception is None and app.builder.format == "html":
        for notebook in execution.NOTEBOOKS:
            nbformat.write(execution.standalone(notebook), Path(app.outdir) / "course" / notebook.name)


def setup(app: Sphinx) -> None:
    app.connect("builder-inited", execute_notebooks)
    app.connect("env-get-outdated", read_notebooks_again)
    app.connect("source-read", insert_outputs)
    app.connect("build-finished", write_downloads)
    app.connect("autodoc-skip-member", is_field)
    app.add_directive("markdown-docstring", MarkdownDocstring)
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math, None))
