"""How Sphinx makes the site: notebooks by myst-nb as they are saved, the reference by autodoc."""

project = "promptnb"
author = "The promptnb authors"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.coverage"]
html_theme = "furo"
html_title = "promptnb"
html_static_path = ["static"]
html_css_files = ["site.css"]
exclude_patterns = ["nbs/papers/run.ipynb", "nbs/papers/study.ipynb", "**/.ipynb_checkpoints"]
nb_execution_mode = "off"  # outputs are committed
nb_number_source_lines = False
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
autodoc_typehints = "none"
default_role = "code"  # `x` in a docstring is code, as in Markdown
coverage_show_missing_items = True  # with -q a warning each
coverage_statistics_to_report = False
html_show_sourcelink = False
suppress_warnings = [
    "mystnb.unknown_mime_type",  # of widgets
    "toc.not_included",  # tables as files: a paper's page links to them
]


def as_markdown(app, what, name, obj, options, lines):
    "Docstrings are plain text with `code`: a bar in them is a bar, not reStructuredText's substitution."
    if what == "module":  # its page begins with it
        lines.clear()
    lines[:] = [line.replace("|", r"\|").replace("*", r"\*") for line in lines]


def setup(app):
    "Called by Sphinx."
    app.connect("autodoc-process-docstring", as_markdown)
