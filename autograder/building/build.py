"""Build what students and instructors open from the masters.

    python -m autograder.building.build            build every unit
    python -m autograder.building.build 08_lora    build one
    python -m autograder.building.build --check    build nothing; fail if course/ differs from its masters

master (solutions/UNIT/UNIT.py) -> instructor's notebook (solutions/UNIT/UNIT.ipynb) -> student's notebook
(course/UNIT/UNIT.ipynb), the last step by nbgrader's own `generate_assignment`. Building twice gives the same bytes.
"""

import argparse
import hashlib
import shutil
import sys
import tempfile
from copy import deepcopy
from functools import cache
from pathlib import Path

import jupytext
import nbformat
from nbformat import NotebookNode
from nbgrader.apps import NbGraderAPI
from nbgrader.coursedir import CourseDirectory
from traitlets.config import Config
from traitlets.config.loader import PyFileConfigLoader

from autograder.building import front, hosted, index
from autograder.checking import hidden
from autograder.checking.masters import SOLUTIONS, master_path, units

ROOT = SOLUTIONS.parent
COURSE = ROOT / "course"


def instructor_notebook(unit: str) -> NotebookNode:
    """Return the master as a notebook, with hidden tests and what Colab needs; a cell's id depends on its content alone."""
    notebook = deepcopy(_read(master_path(unit).read_text(encoding="utf-8")))
    hidden.add_to(notebook, unit)
    hosted.add_to(notebook, unit)
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        }
    )
    taken: dict[str, int] = {}
    for cell in notebook.cells:
        identity = cell.metadata.get("nbgrader", {}).get("grade_id") or _digest(cell.source)
        taken[identity] = taken.get(identity, 0) + 1
        cell["id"] = identity if taken[identity] == 1 else f"{identity}-{taken[identity]}"
        cell.metadata.pop("lines_to_next_cell", None)  # jupytext's note on blank lines in the master
        if cell.cell_type == "code":
            cell["execution_count"], cell["outputs"] = None, []
    notebook["nbformat"], notebook["nbformat_minor"] = 4, 5
    return notebook


@cache
def _read(master: str) -> NotebookNode:
    """Return a master as a notebook, for a copy: jupytext takes a quarter of a second."""
    return jupytext.reads(master, fmt="py:percent")


def _digest(source: str) -> str:
    return hashlib.sha256(source.encode()).hexdigest()[:12]


def write_instructor_notebook(unit: str, folder: Path) -> Path:
    """Write the instructor's notebook to `folder/UNIT/UNIT.ipynb` and return that path."""
    path = folder / unit / f"{unit}.ipynb"
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(instructor_notebook(unit), path)
    return path


def course_config(root: Path) -> Config:
    """Return the project's nbgrader configuration, for a course in `root`."""
    config = PyFileConfigLoader("nbgrader_config.py", str(ROOT)).load_config()
    config.CourseDirectory.root = str(root)
    return config


def generate(unit: str, root: Path, release: Path, database: bool) -> Path:
    """Run nbgrader's `generate_assignment` on `root/solutions/UNIT` and return the notebook it writes below `release`.

    Args:
        database: also record the graded cells in `root/gradebook.db`, where autograding finds them.

    Raises:
        RuntimeError: with nbgrader's log, if it refuses the notebook.
    """
    config = course_config(root)
    config.CourseDirectory.release_directory = str(release)
    config.GenerateAssignment.no_database = not database
    if not database:
        config.GenerateAssignment.preprocessors = [step for step in _default_preprocessors() if step.__name__ != "SaveCells"]
    outcome = NbGraderAPI(CourseDirectory(config=config), config=config).generate_assignment(unit, force=True)
    if not outcome["success"]:
        raise RuntimeError(f"nbgrader could not generate {unit}:\n{outcome['log']}{outcome.get('error') or ''}")
    return release / unit / f"{unit}.ipynb"


def _default_preprocessors() -> list[type]:
    from nbgrader.converters import GenerateAssignment

    return list(GenerateAssignment.preprocessors.default_args[0])


def build(names: list[str]) -> None:
    """Build instructor's and students' notebooks, the gradebook's record of the graded cells, the index and the pictures."""
    for unit in names:
        write_instructor_notebook(unit, SOLUTIONS)
        with tempfile.TemporaryDirectory() as scratch:
            released = generate(unit, ROOT, Path(scratch), database=True)
            (COURSE / unit).mkdir(exist_ok=True)
            # Only the notebook is replaced: what else lies in the folder is its reader's own work.
            shutil.copy(released, COURSE / unit / released.name)
        print(f"course/{unit}/{unit}.ipynb")
    index.write()
    front.write()


def drift(names: list[str]) -> list[str]:
    """Return the units whose notebook in `course/` is not what its master gives."""
    differing = []
    for unit in names:
        with tempfile.TemporaryDirectory() as scratch:
            write_instructor_notebook(unit, Path(scratch) / "solutions")
            built = generate(unit, Path(scratch), Path(scratch) / "release", database=False)
            present = COURSE / unit / f"{unit}.ipynb"
            if not present.is_file() or present.read_bytes() != built.read_bytes():
                differing.append(unit)
    return differing


def main(arguments: list[str] | None = None) -> int:
    """Run the command line described in this module's docstring; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m autograder.building.build", description="Build the course from its masters."
    )
    parser.add_argument("units", nargs="*", metavar="UNIT", help="folder names, such as 08_lora; default: all")
    parser.add_argument("--check", action="store_true", help="only compare course/ with what the masters give")
    options = parser.parse_args(arguments)
    for name in options.units:
        if name not in units():
            parser.error(f"there is no unit {name!r}; there are {', '.join(units())}")
    names = options.units or units()
    if not options.check:
        build(names)
        return 0
    differing = drift(names)
    for unit in differing:
        print(f"course/{unit} differs from solutions/{unit}: run `make build` and commit what it writes", file=sys.stderr)
    for page in index.differing():
        differing.append(str(page))
        print(f"{page} is not what the masters' headers give: run `make build` and commit what it writes", file=sys.stderr)
    for picture in front.differing():
        differing.append(str(picture))
        print(f"{picture} shows what is no longer so: run `make build` and commit what it draws", file=sys.stderr)
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
