"""nbgrader's own names mapped on ours; everything else about grading lives in `autograder/`."""

from nbconvert.exporters import TemplateExporter
from nbgrader.converters import Autograde, BaseConverter, GenerateFeedback
from nbgrader.preprocessors import (
    CheckCellMetadata,
    ClearHiddenTests,
    ClearOutput,
    Execute,
    OverwriteCells,
    OverwriteKernelspec,
)

from autograder.building.page_style import StyleTables
from autograder.grading import mathjax
from autograder.grading.execute import ExecuteInSandbox
from autograder.grading.literal_names import init_notebooks
from autograder.grading.rubric import HideRubric, ShowRubric
from autograder.grading.sanitize import Repair

c = get_config()

BaseConverter.init_notebooks = init_notebooks
TemplateExporter._create_environment = mathjax.create_environment

c.CourseDirectory.course_id = "peft"
c.CourseDirectory.source_directory = "solutions"
c.CourseDirectory.release_directory = "course"

# nbgrader releases every file that lies beside a source notebook: not the masters, nor anybody's results.
c.CourseDirectory.ignore = [".ipynb_checkpoints", "*.pyc", "__pycache__", "*.py", "results", "*.safetensors", "*.part"]

c.ClearSolutions.code_stub = {"python": "raise NotImplementedError()"}
c.ClearSolutions.text_stub = "*Your answer.*"

# The Validate button: a kernel's last message on a cell may be late on a busy machine, or lost. That is no reason to stop.
c.Execute.iopub_timeout, c.Execute.raise_on_iopub_timeout = 20, False

# Student code runs in a sandbox, graded cells outside it; what came back is put in the released notebook's frame first.
c.Autograde.sanitize_preprocessors = [Repair, ClearOutput, OverwriteKernelspec, OverwriteCells, CheckCellMetadata]
c.Autograde.autograde_preprocessors = [
    *(ExecuteInSandbox if step is Execute else step for step in Autograde.autograde_preprocessors.default_args[0]),
    ShowRubric,
]

# Feedback shows neither the rubric, nor the lines that call hidden tests, nor any script that a submission printed.
c.GenerateFeedback.preprocessors = [
    HideRubric,
    ClearHiddenTests,
    *GenerateFeedback.preprocessors.default_args[0],
    StyleTables,
]
c.HTMLExporter.sanitize_html = True
# Sanitized HTML has lost its pictures, which come as images, too.
c.HTMLExporter.NbConvertBase.display_data_priority = [
    "image/png",
    "image/jpeg",
    "text/html",
    "text/markdown",
    "text/latex",
    "text/plain",
]
