"""How Sphinx renders the course; `autograder.building.site` lays out the pages and calls it."""

project = "Parameter-efficient fine-tuning, from scratch"
html_title = project
extensions = [
    "myst_nb",
    "sphinx-mathjax-offline",
    "sphinxext.opengraph",
]  # the last: titles and descriptions for search engines
ogp_social_cards = {"enable": False}
html_theme = "furo"
html_show_sphinx = html_show_copyright = html_copy_source = False
exclude_patterns = ["introduction.md"]  # included by the front page
nb_execution_mode = "off"  # the outputs are those of the run that was laid out
nb_merge_streams = True
nb_code_prompt_show = "Show the solution"
nb_code_prompt_hide = "Hide the solution"
myst_enable_extensions = ["dollarmath", "html_image"]
myst_heading_anchors = 3
suppress_warnings = ["mystnb.unknown_mime_type", "misc.highlighting_failure"]  # progress bars; %pip
