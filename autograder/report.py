"""What the instructor reads in the morning: `report/UNIT.md` for each unit, and `report/grades.csv`, nbgrader's own export."""

import statistics
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from nbgrader.api import Grade, Gradebook
from nbgrader.plugins import CsvExportPlugin

from autograder.build import course_config

if TYPE_CHECKING:
    from autograder.grade import Record

SHOWN = 10


def write(unit: str, records: list["Record"], root: Path) -> Path:
    """Write the report on a unit and the table of all marks; return the report's path."""
    folder = root / "report"
    folder.mkdir(exist_ok=True)
    with Gradebook(_db_url(root)) as gradebook:
        marks = _marks(gradebook, unit)
        path = folder / f"{unit}.md"
        path.write_text("\n".join(_lines(unit, records, marks)) + "\n", encoding="utf-8")
        exporter = CsvExportPlugin()
        exporter.to = str(folder / "grades.csv")
        exporter.export(gradebook)
    return path


def summary(unit: str, records: list["Record"], root: Path) -> str:
    """Return one or a few lines for the terminal."""
    counted = Counter(record.status for record in records)
    lines = [f"{unit}: {', '.join(f'{number} {status}' for status, number in counted.items()) or 'no submissions'}."]
    lines += [f"  {record.student}: {record.line}" for record in records if record.line]
    return "\n".join([*lines, f"  See {root / 'report' / unit}.md"])


def _db_url(root: Path) -> str:
    return course_config(root).CourseDirectory.get("db_url") or f"sqlite:///{root / 'gradebook.db'}"


Mark = tuple[float | None, float, bool]
"""The score, the points there are, and whether a person has to look at it."""


def _marks(gradebook: Gradebook, unit: str) -> dict[str, dict[str, Mark]]:
    """Return the marks by student and graded cell."""
    return {
        submission.student.id: {mark.name: _mark(mark) for notebook in submission.notebooks for mark in notebook.grades}
        for submission in gradebook.assignment_submissions(unit)
    }


def _mark(grade: Grade) -> Mark:
    score = grade.auto_score if grade.manual_score is None else grade.manual_score
    return score, grade.max_score, grade.needs_manual_grade


def _lines(unit: str, records: list["Record"], marks: dict) -> Iterator[str]:
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


def _not_marked(records: list["Record"]) -> Iterator[str]:
    without = [record for record in records if record.line]
    if without:
        yield "## Without a mark"
        yield ""
        yield "*Unusable* is for the student to mend; *failed* is the grader's trouble, and is tried again by the next run."
        yield ""
        yield from _rows(("student", "status", "why"), ((record.student, record.status, record.line) for record in without))


def _distribution(all_marks: list[dict]) -> Iterator[str]:
    cells = list(all_marks[0])
    totals = [sum(score or 0.0 for score, _, _ in student.values()) for student in all_marks]
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


def _mistakes(records: list["Record"]) -> Iterator[str]:
    counted = Counter(
        (cell, text.splitlines()[0] if text else "") for record in records for cell, text in record.mistakes.items()
    )
    if counted:
        yield "## The commonest mistakes"
        yield ""
        rows = ((number, cell, sentence) for (cell, sentence), number in counted.most_common(SHOWN))
        yield from _rows(("students", "graded cell", "what the check said"), rows)


def _notes(records: list["Record"]) -> Iterator[str]:
    noted = [(record.student, note) for record in records for note in record.notes]
    if noted:
        yield "## Worth a look"
        yield ""
        yield "What was repaired before marking, and what submissions tried or used too much of. None costs a mark by itself."
        yield ""
        yield from _rows(("student", "what"), noted)


def _cost(records: list["Record"]) -> Iterator[str]:
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


def _table(records: list["Record"], marks: dict) -> Iterator[str]:
    yield "## Everyone"
    yield ""
    cells = list(marks[records[0].student])
    rows = []
    for record in records:
        scores = marks[record.student]
        total = sum(score or 0.0 for score, _, _ in scores.values())
        each = ("waits" if score is None else f"{score:g}" for score, _, _ in scores.values())
        rows.append((record.student, f"{total:g}", *each))
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
