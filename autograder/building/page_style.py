"""What nbgrader's feedback lacks: its style sheet takes lines and spaces from tables, so that their words run together."""

from nbformat import NotebookNode
from nbgrader.preprocessors import NbGraderPreprocessor

CSS = """
table { margin: 1em 0; }
th, td { padding: 0.3em 0.9em; text-align: left; vertical-align: top; }
thead tr { border-bottom: 1px solid #808080; }
"""


class StyleTables(NbGraderPreprocessor):
    """Add the style to a page that nbconvert makes: after `CSSHTMLHeaderPreprocessor`, which begins the list."""

    def preprocess(self, nb: NotebookNode, resources: dict) -> tuple[NotebookNode, dict]:
        """Put our lines behind the style sheets that the page has."""
        resources["inlining"]["css"].append(CSS)
        return nb, resources
