"""A class with a gradebook of its own: releases a unit, takes submissions, has nbgrader mark them."""

import os
import shutil
import subprocess
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import nbformat
from nbformat import NotebookNode
from nbgrader.api import Gradebook
from nbgrader.apps import NbGraderAPI
from nbgrader.coursedir import CourseDirectory

from autograder.building.build import course_config, generate, write_instructor_notebook
from autograder.sandbox.enclosure import sandbox_problem

Answers = dict[str, str]
"""Source by the id of the cell that it goes into."""


@dataclass
class Mark:
    """What one student got: points by graded cell, cells that wait for a person, and the errors that cells ended with."""

    scores: dict[str, float | None] = field(default_factory=dict)
    waiting: set[str] = field(default_factory=set)
    errors: dict[str, str] = field(default_factory=dict)


@cache
def _course(unit: str) -> TemporaryDirectory:
    """Return a folder with the unit's master, its release and a gradebook that knows it: made once, copied for each class."""
    folder = TemporaryDirectory(prefix="course-")
    root = Path(folder.name)
    write_instructor_notebook(unit, root / "solutions")
    generate(unit, root, root / "release", database=True)
    return folder


class Classroom:
    def __init__(self, root: Path, unit: str):
        self.root, self.unit = root, unit
        shutil.copytree(_course(unit).name, root, dirs_exist_ok=True)
        self.release = root / "release" / unit / f"{unit}.ipynb"
        config = course_config(root)
        config.ExecuteInSandbox.without_sandbox = sandbox_problem() is not None
        self.api = NbGraderAPI(CourseDirectory(config=config), config=config)

    def released(self) -> NotebookNode:
        return nbformat.read(self.release, as_version=4)

    def answered(self, answers: Answers) -> NotebookNode:
        """Return the released notebook with these answers in it."""
        notebook = self.released()
        for cell in notebook.cells:
            cell.source = answers.get(cell["id"], cell.source)
        return notebook

    def answers_alone(self, answers: Answers) -> NotebookNode:
        """Return the cells that nbgrader knows, with these answers in them: no mark depends on the others, which take time."""
        notebook = self.answered(answers)
        notebook.cells = [cell for cell in notebook.cells if "nbgrader" in cell.metadata]
        return notebook

    def submit(self, student: str, notebook: NotebookNode) -> Path:
        path = self.root / "submitted" / student / self.unit / f"{self.unit}.ipynb"
        path.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook, path)
        return path

    def grade(self, student: str) -> Mark:
        outcome = self.api.autograde(self.unit, student)
        assert outcome["success"], outcome
        return self.mark(student)

    def mark(self, student: str) -> Mark:
        mark = Mark()
        with Gradebook(f"sqlite:///{self.root / 'gradebook.db'}") as gradebook:
            for grade in gradebook.find_submission_notebook(self.unit, self.unit, student).grades:
                mark.scores[grade.name] = grade.auto_score
                if grade.needs_manual_grade:
                    mark.waiting.add(grade.name)
        graded = nbformat.read(self.root / "autograded" / student / self.unit / f"{self.unit}.ipynb", as_version=4)
        for cell in graded.cells:
            for output in cell.get("outputs", []):
                if output.output_type == "error":
                    mark.errors[cell.metadata.get("nbgrader", {}).get("grade_id", cell["id"])] = "\n".join(output.traceback)
        return mark


def _grade_some(job: tuple[Path, str, dict[str, Answers]]) -> dict[str, Mark]:
    root, unit, students = job
    whole = ("right", "untouched")
    os.environ["OMP_NUM_THREADS"] = "1"  # one worker a core; more threads than cores wait for each other
    classroom = Classroom(root, unit)
    for student, answers in students.items():
        classroom.submit(student, (classroom.answered if student in whole else classroom.answers_alone)(answers))
    return {student: classroom.grade(student) for student in students}


def grade_class(folder: Path, unit: str, students: dict[str, Answers]) -> dict[str, Mark]:
    """Grade many students: with `pytest -n` here, where caches and the sandbox's template are warm; else two at a time.

    Those called `right` and `untouched` hand the whole notebook in, the others its graded cells.
    """
    if int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")) > 1:
        return _grade_some((folder, unit, students))
    names = list(students)
    jobs = [(folder / f"worker{n}", unit, {name: students[name] for name in names[n::2]}) for n in range(2)]
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        return {student: mark for marks in pool.map(_grade_some, jobs) for student, mark in marks.items()}


def found_below(folder: Path, pattern: str) -> str:
    """Return the files and folders with such a name, a line each. Other tests leave folders that are too deep for `rglob`."""
    return subprocess.run(["find", folder, "-name", pattern], capture_output=True, text=True, check=True).stdout
