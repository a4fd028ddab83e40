"""nbgrader marks real submitted notebooks: full marks, none, and what lies between; no mistake gets its points."""

import itertools
import os
import re
from dataclasses import dataclass
from functools import cache

import nbformat
import pytest
from nbgrader.validator import Validator

from attacks import SOLUTION, UNIT
from autograder.building.build import instructor_notebook
from autograder.checking.exercise import Exercise
from autograder.checking.masters import exercises_of, load_reference, solution_cells, units, without_markers
from classroom import Classroom, Mark, grade_class

NOTEBOOKS = {"mistakes": 2, "variants": 1}
"""How many are handed in of each kind, or as many as a cell has checks."""
GRADED_UNITS = [unit for unit in units() if exercises_of(unit)]


@dataclass(frozen=True)
class Unit:
    """What the tests need to know of a unit, all of it read from its master."""

    name: str
    solution: dict[str, str]
    points: dict[str, float]
    by_hand: dict[str, float]
    exercises: dict[str, Exercise]
    answered_in: dict[str, str]


@cache
def look_at(unit: str) -> Unit:
    notebook = instructor_notebook(unit)
    solution = {cell["id"]: without_markers(cell.source) for cell in solution_cells(notebook.cells)}
    graded = [cell for cell in notebook.cells if cell.metadata.get("nbgrader", {}).get("grade")]
    points = {cell["id"]: cell.metadata.nbgrader.points for cell in graded}
    checks = {_check_of(unit, exercise): exercise for exercise in exercises_of(unit)}
    return Unit(
        unit,
        solution,
        {cell: points[cell] for cell in points if cell in checks},
        {cell: points[cell] for cell in points if cell not in checks},
        checks,
        {check: _defined_in(solution, exercise.spec[0].__name__) for check, exercise in checks.items()},
    )


def _defined_in(solution: dict[str, str], name: str) -> str:
    return next(cell for cell, source in solution.items() if re.search(rf"^(def|class) {name}\b", source, re.MULTILINE))


def _check_of(unit: str, exercise: Exercise) -> str:
    (name,) = (name for name, value in vars(load_reference(unit)).items() if value is exercise)
    return name.replace("_", "-")


def notebooks(unit: Unit, kind: str) -> dict[str, dict[str, str]]:
    """Spread mistakes, or variants, over a few notebooks: at most one a cell, and of every exercise some.

    All of them, in this process, are the business of `test_exercises`; here it is the way through nbgrader and the sandbox that
    is tested. With `EVERY_ANSWER=1` in the environment all are handed in, which takes hours.

    Returns, for each notebook, the sentence or the variant's name by the check that it is meant for.
    """
    queues: dict[str, list] = {}
    for check, cell in unit.answered_in.items():
        queues.setdefault(cell, []).append([(check, name) for name in getattr(unit.exercises[check], kind)])
    # A cell's checks take turns, so that a cell with many of them still has some of each.
    taken = [[pair for pair in itertools.chain(*itertools.zip_longest(*checks)) if pair] for checks in queues.values()]
    columns = list(itertools.zip_longest(*taken))
    if not os.environ.get("EVERY_ANSWER"):
        checks = max(list(unit.answered_in.values()).count(cell) for cell in queues)
        columns = columns[: max(NOTEBOOKS[kind], checks)]
    return {f"{kind}{number:02}": dict(filter(None, column)) for number, column in enumerate(columns)}


def answers(unit: Unit, kind: str, chosen: dict[str, str]) -> dict[str, str]:
    changed = {}
    for check, name in chosen.items():
        exercise = unit.exercises[check]
        changed[unit.answered_in[check]] = exercise.source(getattr(exercise, kind)[name])
    return unit.solution | changed


@pytest.fixture(scope="module", params=[pytest.param(unit, marks=pytest.mark.xdist_group(unit)) for unit in GRADED_UNITS])
def marked(request, tmp_path_factory) -> tuple[Unit, dict[str, Mark]]:
    """A class in which known mistakes and variants of every exercise are handed in by somebody."""
    unit = look_at(request.param)
    written = dict.fromkeys(unit.by_hand, "She still pays for the activations.")
    half = list(unit.solution)[::2]
    students = {"right": unit.solution | written, "untouched": {}, "half": {cell: unit.solution[cell] for cell in half}}
    for kind in ("mistakes", "variants"):
        students |= {student: answers(unit, kind, chosen) for student, chosen in notebooks(unit, kind).items()}
    return unit, grade_class(tmp_path_factory.mktemp("class"), unit.name, students)


def test_every_check_of_the_unit_is_graded_and_tested(marked):
    unit, _ = marked
    assert unit.exercises.keys() == unit.points.keys() and len(unit.exercises) == len(exercises_of(unit.name))
    for kind in ("mistakes", "variants"):
        handed_in = {check for chosen in notebooks(unit, kind).values() for check in chosen}
        assert handed_in == unit.exercises.keys()
    assert len(unit.by_hand) == 1


def test_the_solution_gets_full_marks(marked):
    unit, marks = marked
    assert {check: marks["right"].scores[check] for check in unit.points} == unit.points
    assert not marks["right"].errors


def test_the_untouched_release_gets_none(marked):
    unit, marks = marked
    assert {marks["untouched"].scores[check] for check in unit.points} == {0}
    for check in unit.points:
        assert "not written yet" in marks["untouched"].errors[check]


def test_part_of_the_work_gets_part_of_the_marks(marked):
    unit, marks = marked
    half = list(unit.solution)[::2]
    expected = {check: points if unit.answered_in[check] in half else 0 for check, points in unit.points.items()}
    assert {check: marks["half"].scores[check] for check in unit.points} == expected


def test_the_written_question_waits_for_a_person(marked):
    unit, marks = marked
    assert marks["right"].waiting == unit.by_hand.keys()
    for question in unit.by_hand:
        assert marks["right"].scores[question] is None
        assert marks["untouched"].scores[question] == 0


def test_mistakes_lose_their_points_in_the_students_notebook(marked):
    unit, marks = marked
    for student, chosen in notebooks(unit, "mistakes").items():
        for check, sentence in chosen.items():
            assert marks[student].scores[check] == 0, sentence
            assert sentence in marks[student].errors[check]


def test_variants_get_full_marks_in_the_students_notebook(marked):
    unit, marks = marked
    for student, chosen in notebooks(unit, "variants").items():
        for check, variant in chosen.items():
            assert marks[student].scores[check] == unit.points[check], (variant, marks[student].errors.get(check))


POINTS = look_at(UNIT).points


@pytest.fixture
def classroom(tmp_path):
    return Classroom(tmp_path, UNIT)


def test_a_deleted_graded_cell_is_put_back(classroom):
    notebook = classroom.answered(SOLUTION)
    notebook.cells = [cell for cell in notebook.cells if cell["id"] != "check-merge"]
    classroom.submit("deleter", notebook)
    assert classroom.grade("deleter").scores["check-merge"] == 2


def test_an_edited_check_is_put_back(classroom):
    notebook = classroom.answered({})
    for cell in notebook.cells:
        if cell["id"] in POINTS:
            cell.source = "pass"
    classroom.submit("cheat", notebook)
    mark = classroom.grade("cheat")
    assert {mark.scores[check] for check in POINTS} == {0}


def test_a_hidden_case_fails_with_one_short_message(classroom):
    """Right in fp32 and wrong in other dtypes: the visible check cannot see it, the hidden one does."""
    wrong = (
        SOLUTION["lora-linear"]
        .replace("base.weight.new_empty(", "torch.empty(")
        .replace("base.weight.new_zeros(", "torch.zeros(")
    )
    classroom.submit("fp32", classroom.answers_alone(SOLUTION | {"lora-linear": wrong}))
    mark = classroom.grade("fp32")
    assert mark.scores["check-lora-forward"] == 0
    message = mark.errors["check-lora-forward"]
    assert "right on the cases that you see, wrong" in message
    assert len(message) < 500 and "hidden_cases" not in message


def test_feedback_is_written_and_shows_the_diagnosis(classroom):
    wrong = SOLUTION["lora-linear"].replace("alpha / rank", "alpha")
    classroom.submit("learner", classroom.answers_alone(SOLUTION | {"lora-linear": wrong}))
    classroom.grade("learner")
    outcome = classroom.api.generate_feedback(UNIT, "learner")
    assert outcome["success"], outcome
    page = (classroom.root / "feedback" / "learner" / UNIT / f"{UNIT}.html").read_text()
    assert "the update is multiplied by alpha" in page
    assert "BEGIN SOLUTION" not in page


def test_the_rubric_stands_above_the_answer_for_the_marker_and_not_in_feedback(classroom):
    classroom.submit("learner", classroom.answers_alone({}))
    classroom.grade("learner")
    graded = nbformat.read(classroom.root / "autograded" / "learner" / UNIT / f"{UNIT}.ipynb", as_version=4)
    (question,) = look_at(UNIT).by_hand
    place = next(number for number, cell in enumerate(graded.cells) if cell["id"] == question)
    assert graded.cells[place - 1].source.startswith("**Rubric.**") and "SOLUTION" not in graded.cells[place - 1].source
    assert classroom.api.generate_feedback(UNIT, "learner")["success"]
    page = (classroom.root / "feedback" / "learner" / UNIT / f"{UNIT}.html").read_text()
    assert "Rubric" not in page
    assert classroom.api.autograde(UNIT, "learner")["success"], "grading again meets its own rubric"


def test_a_broken_notebook_is_named_and_kept(classroom):
    path = classroom.submit("broken", classroom.released())
    path.write_text("{ this is no notebook")
    outcome = classroom.api.autograde(UNIT, "broken")
    assert not outcome["success"]
    assert path.read_text() == "{ this is no notebook"
    classroom.submit("right", classroom.answered(SOLUTION))
    mark = classroom.grade("right")
    assert {check: mark.scores[check] for check in POINTS} == POINTS


def test_the_experiments_are_left_out(classroom):
    classroom.submit("right", classroom.answered(SOLUTION))
    classroom.grade("right")
    graded = nbformat.read(classroom.root / "autograded" / "right" / UNIT / f"{UNIT}.ipynb", as_version=4)
    executed = [cell for cell in graded.cells if cell.cell_type == "code" and cell.execution_count]
    assert executed and not any("load_smollm2()" in cell.source for cell in executed)


def test_nbgraders_own_validation_finds_the_one_wrong_answer(tmp_path, monkeypatch):
    """The button that students have: the same cells, the checks called directly."""
    unit = look_at("01_why_peft")
    monkeypatch.setenv("PEFTLAB_SHORT", "1")
    classroom = Classroom(tmp_path, unit.name)
    answers = dict.fromkeys(unit.by_hand, "Three cards would not do.") | {"classify": "def classify(*names): return 'full'"}
    path = classroom.submit("student", classroom.answered(unit.solution | answers))
    (failed,) = Validator().validate(str(path))["failed"]
    assert "classify" in failed["source"]
