"""What the instructor reads in the morning: `report/UNIT.md` for each unit, and `report/grades.csv` for all units.
If the submissions came from a learning management system, `report/UNIT_SYSTEM.csv` is what it takes back.

The table has the columns of nbgrader's own export, and two more: what became of the submission, and how many points wait for a
person. nbgrader's file has 0 for students without a mark; here the mark stays empty, and the status says why.
"""

import contextlib
import csv
import json
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from nbgrader.api import Assignment, Grade, Gradebook, MissingEntry, SubmittedAssignment

from autograder.building.build import course_config
from autograder.grading import intake, lms
from autograder.grading.records import Record

SHOWN = 10
COLUMNS = (
    *("assignment", "duedate", "timestamp", "student_id", "last_name", "first_name", "email"),
    *("raw_score", "late_submission_penalty", "score", "max_score", "status", "waiting_points"),
)
NOT_HANDED_IN, WAITS, LATE = "not handed in", "waits for a person", "late"


def write(unit: str, records: list[Record], root: Path) -> Path:
    """Write the report on a unit and the table of all marks; return the report's path."""
    folder = root / "report"
    folder.mkdir(exist_ok=True)
    with Gradebook(_db_url(root)) as gradebook:
        marks = _marks(gradebook, unit)
        path = folder / f"{unit}.md"
        path.write_text("\n".join(_lines(unit, records, marks)) + "\n", encoding="utf-8")
        table = [line for assignment in gradebook.assignments for line in _grades(gradebook, assignment, root)]
    part = folder / "grades.csv.part"
    with part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        writer.writeheader()
        writer.writerows(table)
    part.replace(folder / "grades.csv")
    of_unit = [line for line in table if line["assignment"] == unit]
    scores = {line["student_id"]: line["score"] if line.get("score", "") != "" else None for line in of_unit}
    lms.write_grades(unit, scores, max((line["max_score"] for line in of_unit), default=0), root)
    return path


def _grades(gradebook: Gradebook, assignment: Assignment, root: Path) -> Iterator[dict]:
    """Yield a line of the table for everybody whom the gradebook or the folder of submissions knows."""
    statuses = _statuses(root, assignment.name)
    named = {student.id: student for student in gradebook.students}
    handed_in = {student for student, _ in intake.students(root / "submitted", assignment.name)}
    for student in sorted({*named, *statuses, *handed_in}):
        status = statuses.get(student, NOT_HANDED_IN if student not in handed_in else "not graded yet")
        line = {"assignment": assignment.name, "student_id": student, "max_score": assignment.max_score, "status": status}
        line |= {"duedate": assignment.duedate or ""}
        if student in named:
            line |= {name: getattr(named[student], name) or "" for name in ("last_name", "first_name", "email")}
        try:
            submission = gradebook.find_submission(assignment.name, student)
        except MissingEntry:
            submission = None
        if submission is not None and status == "marked":
            line |= _scores(submission)
        yield line


def _scores(submission: SubmittedAssignment) -> dict:
    """Return what the table says of a marked submission; what waits for a person is not in its score."""
    waiting = sum(cell.max_score for cell in _cells(submission) if cell.needs_manual_grade)
    return {
        "timestamp": submission.timestamp or "",
        "raw_score": submission.score,
        "late_submission_penalty": submission.late_submission_penalty,
        "score": max(0.0, submission.score - submission.late_submission_penalty),
        "status": WAITS if waiting else "marked",
        "waiting_points": waiting,
    }


def _cells(submission: SubmittedAssignment) -> list[Grade]:
    """Return the gradebook's entries of a submission's graded cells."""
    return [cell for notebook in submission.notebooks for cell in notebook.grades]


def _statuses(root: Path, unit: str) -> dict[str, str]:
    """Return what became of each student's submission of a unit, as the last run of the grader left it."""
    statuses = {}
    for path in sorted((root / "grading" / unit / "records").glob("*.json")):
        with contextlib.suppress(ValueError, KeyError):  # broken off: the next run grades it again
            record = json.loads(path.read_text())
            statuses[record["student"]] = record["status"]
    return statuses


def summary(unit: str, records: list[Record], root: Path) -> str:
    """Return one or a few lines for the terminal."""
    counted = Counter(record.status for record in records)
    lines = [f"{unit}: {', '.join(f'{number} {status}' for status, number in counted.items()) or 'no submissions'}."]
    lines += [f"  {record.student}: {record.reason}" for record in records if record.reason]
    return "\n".join([*lines, f"  See {root / 'report' / unit}.md"])


def _db_url(root: Path) -> str:
    return course_config(root).CourseDirectory.get("db_url") or f"sqlite:///{root / 'gradebook.db'}"


Mark = tuple[float | None, float, bool]
"""The score, the points there are, and whether a person has to look at it."""


def _marks(gradebook: Gradebook, unit: str) -> dict[str, dict[str, Mark]]:
    """Return the marks by student and graded cell; what is taken off for lateness stands among them, under its name."""
    marks = {}
    for submission in gradebook.assignment_submissions(unit):
        marks[submission.student.id] = {cell.name: _mark(cell) for cell in _cells(submission)}
        if submission.late_submission_penalty:
            marks[submission.student.id][LATE] = -submission.late_submission_penalty, 0.0, False
    return marks


def _mark(cell: Grade) -> Mark:
    """Return a cell's mark as the gradebook has it: a person's before the check's, and extra credit with it."""
    unmarked = cell.auto_score is None and cell.manual_score is None
    return None if unmarked else cell.score, cell.max_score, cell.needs_manual_grade


def _total(scores: dict[str, Mark]) -> float:
    """Return a submission's points: what waits for a person counts as none, and lateness takes away no more than there is."""
    return max(0.0, sum(score or 0.0 for score, _, _ in scores.values()))


def _lines(unit: str, records: list[Record], marks: dict) -> Iterator[str]:
    marked = [record for record in records if record.status == "marked" and record.student in marks]
    yield f"# {unit}: {len(records)} submissions"
    yield ""
    yield from _not_marked(records)
    if not marked:
        yield "Nothing has been marked."
        return
    yield from _distribution([marks[record.student] for record in marked])
    yield from _mistakes(marked)
    yield from _notes(marked)
    yield from _cost(marked)
    yield from _table(marked, marks)


def _not_marked(records: list[Record]) -> Iterator[str]:
    without = [record for record in records if record.reason]
    if without:
        yield "## Without a mark"
        yield ""
        yield "*Unusable* is for the student to mend; *failed* is the grader's trouble, and is tried again by the next run."
        yield ""
        yield from _rows(("student", "status", "why"), ((record.student, record.status, record.reason) for record in without))


def _distribution(all_marks: list[dict]) -> Iterator[str]:
    cells = [cell for cell in all_marks[0] if cell != LATE]
    totals = [_total(student) for student in all_marks]
    possible = sum(points for _, points, _ in all_marks[0].values())
    yield "## Marks"
    yield ""
    yield f"Of {possible:g} points: mean {statistics.mean(totals):.1f}, median {statistics.median(totals):.1f}, "
    yield f"from {min(totals):g} to {max(totals):g}. Points that wait for a person count as none here."
    yield ""
    yield "```"
    width = max(possible / 10, 1e-9)
    bins = Counter(min(int(total / width), 9) for total in totals)
    for number in range(10):
        yield f"{number * width:5.1f} to {(number + 1) * width:4.1f}  {bins[number]:4}  {'#' * bins[number]}"
    yield "```"
    yield ""
    rows = []
    for cell in cells:
        scores = [student[cell] for student in all_marks if cell in student]
        full = sum(score is not None and score >= points for score, points, _ in scores)
        waiting = sum(waits for _, _, waits in scores)
        rows.append((cell, f"{scores[0][1]:g}", f"{full} of {len(scores)}", waiting or ""))
    yield from _rows(("graded cell", "points", "full marks", "waiting for a person"), rows)


def _mistakes(records: list[Record]) -> Iterator[str]:
    counted = Counter(
        (cell, text.splitlines()[0] if text else "") for record in records for cell, text in record.mistakes.items()
    )
    if counted:
        yield "## The commonest mistakes"
        yield ""
        rows = ((number, cell, sentence) for (cell, sentence), number in counted.most_common(SHOWN))
        yield from _rows(("students", "graded cell", "what the check said"), rows)


def _notes(records: list[Record]) -> Iterator[str]:
    noted = [(record.student, note) for record in records for note in record.notes]
    if noted:
        yield "## Worth a look"
        yield ""
        yield "What was repaired before marking, and what submissions tried or used too much of. None costs a mark by itself."
        yield ""
        yield from _rows(("student", "what"), noted)


def _cost(records: list[Record]) -> Iterator[str]:
    yield "## Cost"
    yield ""
    stages = {stage: None for record in records for stage in record.seconds}
    rows = []
    for stage in stages:
        seconds = [record.seconds.get(stage, 0.0) for record in records]
        rows.append((stage, f"{statistics.mean(seconds):.2f}", f"{max(seconds):.2f}"))
    yield from _rows(("stage", "seconds a submission", "longest"), rows)
    dearest = max(records, key=lambda record: record.cpu_seconds)
    largest = max(records, key=lambda record: record.peak_bytes)
    yield f"Most processor time: {dearest.student}, {dearest.cpu_seconds:.0f} s. "
    yield f"Most memory: {largest.student}, {largest.peak_bytes / 2**20:,.0f} MiB."
    yield ""


def _table(records: list[Record], marks: dict) -> Iterator[str]:
    yield "## Everyone"
    yield ""
    cells = list(dict.fromkeys(cell for record in records for cell in marks[record.student]))
    cells.sort(key=LATE.__eq__)  # last, where anybody was late
    rows = []
    for record in records:
        scores = marks[record.student]
        each = (scores.get(cell, ("", 0.0, False))[0] for cell in cells)
        shown = ("waits" if score is None else score if score == "" else f"{score:g}" for score in each)
        rows.append((record.student, f"{_total(scores):g}", *shown))
    yield from _rows(("student", "total", *cells), rows)


def _rows(head: Iterable[str], rows: Iterable[Iterable[object]]) -> Iterator[str]:
    """Yield a Markdown table; what students wrote cannot break out of its cell."""
    head = list(head)
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    for row in rows:
        cells = (" ".join(str(cell).replace("|", "\\|").replace("<", "&lt;").split()) for cell in row)
        yield f"| {' | '.join(cells)} |"
    yield ""
