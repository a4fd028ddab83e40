"""The report, the table of marks and nbgrader's gradebook say the same of everybody."""

import csv
import json
from datetime import datetime

import pytest
from nbgrader.api import Gradebook

from autograder.grading import report
from autograder.grading.records import FAILED, MARKED, UNUSABLE, Record

UNIT = "08_lora"
POINTS = {"check-merge": 2, "colleague": 3}


@pytest.fixture
def course(tmp_path):
    """A gradebook with one unit of two cells, the second of which a person marks."""
    with Gradebook(f"sqlite:///{tmp_path / 'gradebook.db'}") as gradebook:
        gradebook.add_assignment(UNIT, duedate="2026-11-10 12:00:00")
        gradebook.add_notebook(UNIT, UNIT)
        for name, points in POINTS.items():
            gradebook.add_grade_cell(name, UNIT, UNIT, max_score=points, cell_type="code")
    return tmp_path


def hand_in(root, student, status=MARKED, auto=2.0, manual=None, extra=None, penalty=0.0, reason=""):
    """Let a student hand in, and the grader and a person do what they did; return the record."""
    (root / "submitted" / student / UNIT).mkdir(parents=True)
    record = Record(student, status=status, reason=reason, seconds={"cells": 1.0})
    path = root / "grading" / UNIT / "records" / f"{student}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(vars(record)))
    with Gradebook(f"sqlite:///{root / 'gradebook.db'}") as gradebook:
        gradebook.add_student(student, last_name="Doe", first_name="Jo")
        submission = gradebook.add_submission(UNIT, student, timestamp=datetime(2026, 11, 9))
        (notebook,) = submission.notebooks
        notebook.late_submission_penalty = penalty
        for cell in notebook.grades:
            if cell.name == "check-merge":
                cell.auto_score, cell.extra_credit, cell.needs_manual_grade = auto, extra, False
            else:
                cell.manual_score, cell.needs_manual_grade = manual, manual is None
        gradebook.db.commit()
    return record


def table_of(root, records):
    report.write(UNIT, records, root)
    with (root / "report" / "grades.csv").open(newline="", encoding="utf-8") as file:
        return {line["student_id"]: line for line in csv.DictReader(file)}


def totals_of(root):
    """Return the totals in the report's last table."""
    rows = (root / "report" / f"{UNIT}.md").read_text().split("## Everyone")[1].splitlines()[4:]
    return {cells[1].strip(): float(cells[2]) for cells in (row.split("|") for row in rows) if len(cells) > 2}


def test_report_and_table_have_the_gradebooks_points(course):
    records = [
        hand_in(course, "all", manual=3.0),
        hand_in(course, "extra", manual=1.5, extra=1.0),
        hand_in(course, "late", manual=3.0, penalty=2.0),
        hand_in(course, "later", auto=0.0, manual=1.0, penalty=5.0),
        hand_in(course, "waiting"),
    ]
    table = table_of(course, records)
    totals = totals_of(course)
    assert totals == {"all": 5.0, "extra": 4.5, "late": 3.0, "later": 0.0, "waiting": 2.0}
    assert {student: float(line["score"]) for student, line in table.items()} == totals
    with Gradebook(f"sqlite:///{course / 'gradebook.db'}") as gradebook:
        for student, line in table.items():
            submission = gradebook.find_submission(UNIT, student)
            assert float(line["raw_score"]) == submission.score
            assert float(line["late_submission_penalty"]) == submission.late_submission_penalty
    assert {student: line["status"] for student, line in table.items()} == {
        **dict.fromkeys(("all", "extra", "late", "later"), "marked"),
        "waiting": "waits for a person",
    }
    assert {line["waiting_points"] for student, line in table.items() if student != "waiting"} == {"0"}
    assert float(table["waiting"]["waiting_points"]) == 3.0 and float(table["waiting"]["max_score"]) == 5.0


def test_who_has_no_mark_has_no_zero(course):
    (course / "submitted" / "new" / UNIT).mkdir(parents=True)
    with Gradebook(f"sqlite:///{course / 'gradebook.db'}") as gradebook:
        gradebook.add_student("absent")
    records = [
        hand_in(course, "cut-off", UNUSABLE, auto=0.0, manual=0.0, reason="the notebook is cut off"),
        hand_in(course, "unlucky", FAILED, auto=0.0, manual=0.0, reason="the disk was full"),
        hand_in(course, "all", manual=3.0),
    ]
    table = table_of(course, records)
    without = {student: line["status"] for student, line in table.items() if line["score"] == ""}
    assert without == {"absent": "not handed in", "cut-off": "unusable", "new": "not graded yet", "unlucky": "failed"}
    assert all(table[student]["raw_score"] == "" for student in without)
    assert totals_of(course) == {"all": 5.0}


def test_a_record_that_broke_off_stops_nothing(course):
    records = [hand_in(course, "all", manual=3.0)]
    (course / "grading" / UNIT / "records" / "half.json").write_text('{"student": "half", "sta')
    assert table_of(course, records).keys() == {"all"}


def test_a_name_with_a_comma_stays_in_its_column(course):
    records = [hand_in(course, "o'brien, pat", manual=3.0), hand_in(course, 'says "no"', manual=3.0)]
    table = table_of(course, records)
    assert table.keys() == {"o'brien, pat", 'says "no"'}
    assert all(line["last_name"] == "Doe" and float(line["score"]) == 5.0 for line in table.values())


def test_lateness_is_a_column_where_somebody_was_late(course):
    records = [hand_in(course, "all", manual=3.0), hand_in(course, "late", manual=3.0, penalty=2.0)]
    report.write(UNIT, records, course)
    everyone = (course / "report" / f"{UNIT}.md").read_text().split("## Everyone")[1]
    assert "| student | total | check-merge | colleague | late |" in everyone
    assert "| late | 3 | 2 | 3 | -2 |" in everyone and "| all | 5 | 2 | 3 |  |" in everyone
    assert "Of 5 points" in (course / "report" / f"{UNIT}.md").read_text()
