"""How submissions are executed: nbgrader's `Execute`, without the experiments."""

from nbformat import NotebookNode
from nbgrader import utils
from nbgrader.preprocessors import Execute


class ExecuteWithoutExperiments(Execute):
    """Leave out the cells tagged `experiment`: they take minutes, and no mark depends on them."""

    def preprocess_cell(self, cell: NotebookNode, resources: dict, index: int) -> tuple[NotebookNode, dict]:
        """Execute a cell unless it is an ungraded experiment."""
        if "experiment" in cell.metadata.get("tags", []) and not utils.is_grade(cell):
            return cell, resources
        return super().preprocess_cell(cell, resources, index)
