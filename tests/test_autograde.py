"""nbgrader marks real submitted notebooks: full marks, none, and what lies between; no mistake gets its points."""

import itertools

import nbformat
import pytest

from attacks import SOLUTION, UNIT
from autograder.build import instructor_notebook
from autograder.checks import lora
from classroom import Classroom, grade_class

POINTS = {
    "check-lora-forward": 2,
    "check-lora-start": 1,
    "check-lora-memory": 2,
    "check-inject": 2,
    "check-merge": 2,
    "check-adapter-files": 2,
    "check-merge-into-head": 1,
}
ANSWERED_IN = {
    "check-lora-forward": "lora-linear",
    "check-lora-start": "lora-linear",
    "check-lora-memory": "lora-linear",
    "check-inject": "inject",
    "check-merge": "merge",
    "check-adapter-files": "adapter-files",
    "check-merge-into-head": "merge-into-head",
}


def exercise(check: str):
    return lora.EXERCISES[check.replace("-", "_")]


def notebooks(kind: str) -> dict[str, dict[str, str]]:
    """Spread all mistakes, or all variants, over as few notebooks as can be: at most one a cell.

    Returns, for each notebook, the sentence or the variant's name by the check that it is meant for.
    """
    queues: dict[str, list] = {}
    for check, cell in ANSWERED_IN.items():
        queues.setdefault(cell, []).extend((check, name) for name in getattr(exercise(check), kind))
    columns = itertools.zip_longest(*queues.values())
    return {f"{kind}{number:02}": dict(filter(None, column)) for number, column in enumerate(columns)}


def answers(kind: str, chosen: dict[str, str]) -> dict[str, str]:
    changed = {
        ANSWERED_IN[check]: exercise(check).source(getattr(exercise(check), kind)[name]) for check, name in chosen.items()
    }
    return SOLUTION | changed


@pytest.fixture(scope="module")
def marks(tmp_path_factory):
    students = {"right": SOLUTION | {"colleague": "She still pays for the activations."}, "untouched": {}}
    students["half"] = {cell: SOLUTION[cell] for cell in ("lora-linear", "merge")}
    students["warns"] = SOLUTION | {"merge": SOLUTION["merge"] + "\nimport warnings; warnings.warn('mind the gap')"}
    for kind in ("mistakes", "variants"):
        students |= {student: answers(kind, chosen) for student, chosen in notebooks(kind).items()}
    return grade_class(tmp_path_factory.mktemp("class"), UNIT, students)


def test_the_points_of_the_unit():
    notebook = instructor_notebook(UNIT)
    graded = {
        cell["id"]: cell.metadata.nbgrader.points for cell in notebook.cells if cell.metadata.get("nbgrader", {}).get("grade")
    }
    assert graded == POINTS | {"colleague": 2}


def test_the_solution_gets_full_marks(marks):
    assert {check: marks["right"].scores[check] for check in POINTS} == POINTS
    assert not marks["right"].errors


def test_the_untouched_release_gets_none(marks):
    assert {marks["untouched"].scores[check] for check in POINTS} == {0}
    for check in POINTS:
        assert "not written yet" in marks["untouched"].errors[check]


def test_part_of_the_work_gets_part_of_the_marks(marks):
    expected = {check: points if ANSWERED_IN[check] in ("lora-linear", "merge") else 0 for check, points in POINTS.items()}
    assert {check: marks["half"].scores[check] for check in POINTS} == expected


def test_a_warning_costs_nothing(marks):
    assert {check: marks["warns"].scores[check] for check in POINTS} == POINTS


def test_the_written_question_waits_for_a_person(marks):
    assert marks["right"].waiting == {"colleague"}
    assert marks["right"].scores["colleague"] is None
    assert marks["untouched"].scores["colleague"] == 0


@pytest.mark.parametrize(
    ("student", "check", "sentence"),
    [(student, check, sentence) for student, chosen in notebooks("mistakes").items() for check, sentence in chosen.items()],
)
def test_every_mistake_loses_its_points_in_the_students_notebook(marks, student, check, sentence):
    assert marks[student].scores[check] == 0
    assert sentence in marks[student].errors[check]


@pytest.mark.parametrize(
    ("student", "check", "variant"),
    [(student, check, variant) for student, chosen in notebooks("variants").items() for check, variant in chosen.items()],
)
def test_every_variant_gets_full_marks_in_the_students_notebook(marks, student, check, variant):
    assert marks[student].scores[check] == POINTS[check], marks[student].errors.get(check)


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
    classroom.submit("fp32", classroom.answered(SOLUTION | {"lora-linear": wrong}))
    mark = classroom.grade("fp32")
    assert mark.scores["check-lora-forward"] == 0
    message = mark.errors["check-lora-forward"]
    assert "right on the cases that you see, wrong" in message
    assert len(message) < 500 and "hidden_cases" not in message


def test_feedback_is_written_and_shows_the_diagnosis(classroom):
    wrong = SOLUTION["lora-linear"].replace("alpha / rank", "alpha")
    classroom.submit("learner", classroom.answered(SOLUTION | {"lora-linear": wrong}))
    classroom.grade("learner")
    outcome = classroom.api.generate_feedback(UNIT, "learner")
    assert outcome["success"], outcome
    page = (classroom.root / "feedback" / "learner" / UNIT / f"{UNIT}.html").read_text()
    assert "the update is multiplied by alpha" in page
    assert "BEGIN SOLUTION" not in page


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
