"""A student may be called `[abc]`: nbgrader takes names for patterns that folders are to match, here a name is a name."""

import os
from glob import glob

from nbgrader.converters import BaseConverter
from nbgrader.converters.base import NbGraderException


def init_notebooks(step: BaseConverter) -> None:
    """Find the notebooks of one of nbgrader's steps, as `BaseConverter.init_notebooks` does.

    Only `*` and what else was asked for is a pattern, not the folder of the course or what was found in it.

    Raises:
        NbGraderException: if there are none.
    """
    names = step.coursedir
    wanted = step._format_source(names.assignment_id, names.student_id)
    found = [wanted]
    if not os.path.isdir(wanted):
        found = [os.path.join(names.root, path) for path in glob(os.path.relpath(wanted, names.root), root_dir=names.root)]
    step.assignments, step.notebooks = {}, []
    for folder in sorted(found):
        notebooks = [os.path.join(folder, path) for path in glob(f"{names.notebook_id}.ipynb", root_dir=folder)]
        if notebooks:
            step.assignments[folder] = notebooks
        else:
            step.log.warning("There is no notebook %s.ipynb in %s", names.notebook_id, folder)
    if not step.assignments:
        message = f"No notebooks were matched by '{wanted}'"
        step.log.error(message)
        raise NbGraderException(message)
