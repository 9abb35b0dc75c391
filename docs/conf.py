"""Sphinx configuration."""

from importlib.metadata import version as installed_version

project = "sb3-ext"
author = "sb3-ext contributors"
release = installed_version("sb3-ext")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.viewcode", "sphinx_copybutton"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
autodoc_typehints = "none"
html_theme = "sphinx_rtd_theme"
# Included by the pages of the algorithms
exclude_patterns = ["_build", "results"]
