"""Configuration of Sphinx: `make docs` builds the site in build/docs."""

import os
import pathlib
import shutil
import sys

_HERE = pathlib.Path(__file__).resolve().parent
_ROOT = _HERE.parent
sys.path[:0] = [str(_ROOT), str(_HERE)]

import reference_pages  # noqa: E402

import vaecf  # noqa: E402

project = "vaecf"
author = copyright = "The vaecf authors"
release = vaecf.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]

# Pages made at build time: the reference, and copies of the notebooks.
reference_pages.write(_HERE / "_generated")
shutil.rmtree(_HERE / "_notebooks", ignore_errors=True)
shutil.copytree(_ROOT / "experiments" / "notebooks", _HERE / "_notebooks")

# Every local link and every anchor is checked; a dead one is a warning.
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence"]
myst_heading_anchors = 4
myst_url_schemes = ["http", "https"]

# Bars of tqdm are text here, which tqdm warns of without ipywidgets.
os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_merge_streams = True

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 80
# Docstrings write names and values in single backticks.
default_role = "code"

html_theme = "sphinx_book_theme"
html_title = "vaecf"
html_static_path = ["_static"]
html_css_files = ["vaecf.css"]
html_theme_options = {
    "show_toc_level": 2,
    "navigation_with_keys": False,
    "use_download_button": False,
}


def setup(app):
    """Keeps a figure and its error on one line: 1.2 ± .1."""

    def no_break(app, name, source):
        source[0] = source[0].replace(
            " ± ", "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}"
        )

    app.connect("source-read", no_break)
