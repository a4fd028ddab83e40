"""Formulas in formgrader without the internet.

nbgrader's page loads MathJax 2 from elsewhere, and saves no mark before it has come. There is no setting for it. Here the page
brings MathJax along, as it is installed with `sphinx-mathjax-offline`, and the one thing that formgrader asks of version 2.
"""

import importlib.util
from functools import cache
from pathlib import Path

from jinja2 import ChoiceLoader, DictLoader, Environment
from nbconvert.exporters import TemplateExporter

FORMGRADER = "formgrade"
TEMPLATE = """\
{%- macro mathjax(url="") -%}
<script>
  window.MathJax = {
    tex: {inlineMath: [["$", "$"], ["\\\\(", "\\\\)"]], tags: "ams"},
    options: {enableMenu: false, enableExplorer: false, enableAssistiveMml: false},
  };
</script>
<script>{{ mathjax_source() }}</script>
<script>
  MathJax.Hub = {
    Config() {}, Configured() {}, Queue() {},
    Startup: {signal: {Interest(told) { MathJax.startup.promise.finally(() => told("End")); }}},
  };
</script>
{%- endmacro %}
"""


@cache
def source() -> str:
    """Return MathJax itself: one file, with its fonts, that draws in SVG."""
    package = Path(importlib.util.find_spec("sphinx-mathjax-offline").origin).parent
    return (package / "static" / "mathjax" / "tex-svg-full.js").read_text(encoding="utf-8")


_create_environment = TemplateExporter._create_environment


def create_environment(exporter: TemplateExporter) -> Environment:
    """Do as `TemplateExporter._create_environment` does; and have formgrader's pages bring MathJax along."""
    environment = _create_environment(exporter)
    if exporter.template_name == FORMGRADER:
        environment.loader = ChoiceLoader([DictLoader({"mathjax.html.j2": TEMPLATE}), environment.loader])
        environment.globals["mathjax_source"] = source
    return environment
