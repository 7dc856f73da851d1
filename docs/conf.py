"""The documentation site: sphinx-build -W -b html docs docs/_build/html."""

import ast
import inspect
import os
import re
import shutil
import textwrap
from pathlib import Path

project = "sgd_sparse_jax"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]

html_theme = "sphinx_book_theme"
html_title = "sgd_sparse_jax"
html_theme_options = {"footer_content_items": [], "navbar_persistent": []}

# Cells run where CI asks for it, else where they have changed; the cache is in _build.
nb_execution_mode = "force" if os.environ.get("CI") else "cache"
nb_execution_raise_on_error = True
nb_execution_timeout = 300
os.environ["JUPYTER_COLUMNS"] = "84"  # rich's tables fit the page

autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints = "none"  # `as_written` has them
maximum_signature_line_length = 88


def as_written(app, what, name, obj, options, arguments, returned):
    """Signatures of the source, which name types such as Params."""
    if what not in ("function", "class") or not obj.__module__.startswith("sgd_sparse_jax"):
        return None
    node = ast.parse(textwrap.dedent(inspect.getsource(obj))).body[0]
    if isinstance(node, ast.ClassDef):
        fields = [ast.unparse(each) for each in node.body if isinstance(each, ast.AnnAssign)]
        return f"({', '.join(fields)})", None
    return f"({ast.unparse(node.args)})", node.returns and ast.unparse(node.returns)


def as_rst(app, what, name, obj, options, lines):
    """Docstrings are plain text with `code` and examples; other markup of reST is escaped."""
    code = r"(^ *>>> .*?(?:\n\n|\Z)|`[^`]+`)"
    parts = re.split(code, "\n".join(lines), flags=re.DOTALL | re.MULTILINE)
    for i, part in enumerate(parts):
        if i % 2 == 0:
            parts[i] = re.sub(r"([|*]|_\b)", r"\\\1", part)
        elif part.startswith("`"):
            parts[i] = f"`{part}`\\ " if re.match(r"\w", parts[i + 1]) else f"`{part}`"
    lines[:] = "".join(parts).split("\n")


def offer_notebook(app, page, template, context, doctree):
    """Adds the executed page to its download button as .ipynb."""
    notebook = Path(app.outdir).parent / "jupyter_execute" / f"{page}.ipynb"
    if notebook.exists():
        copy = Path(app.outdir) / "_sources" / f"{page}.ipynb"
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(notebook, copy)
        context["ipynb_source"] = f"{page}.ipynb"


def setup(app):
    """Docstrings are processed before napoleon, which makes field lists of their sections."""
    app.connect("html-page-context", offer_notebook)
    app.connect("autodoc-process-signature", as_written)
    app.connect("autodoc-process-docstring", as_rst, priority=400)
