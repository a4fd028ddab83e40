"""nbgrader's own names mapped on ours; everything else about grading lives in `autograder/`."""

from nbgrader.converters import Autograde
from nbgrader.preprocessors import Execute

from autograder.execute import ExecuteWithoutExperiments

c = get_config()

c.CourseDirectory.course_id = "peft"
c.CourseDirectory.source_directory = "solutions"
c.CourseDirectory.release_directory = "course"

# nbgrader releases every file that lies beside a source notebook: not the masters, nor anybody's results.
c.CourseDirectory.ignore = [".ipynb_checkpoints", "*.pyc", "__pycache__", "*.py", "results", "*.safetensors", "*.part"]

c.ClearSolutions.code_stub = {"python": "raise NotImplementedError()"}
c.ClearSolutions.text_stub = "*Your answer.*"

c.Autograde.autograde_preprocessors = [
    ExecuteWithoutExperiments if step is Execute else step for step in Autograde.autograde_preprocessors.default_args[0]
]
# A graded cell that a student deleted is put back, so that its points are lost only if the answer is missing too.
c.OverwriteCells.add_missing_cells = True

# Seconds: a check takes less than two. The second is how long to wait for a printed line on a busy machine; at
# nbclient's four seconds, correct submissions fail when the machine is full.
c.ExecuteWithoutExperiments.timeout = 120
c.ExecuteWithoutExperiments.iopub_timeout = 60
