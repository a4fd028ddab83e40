"""A whole class of hostile and unusual submissions, graded in one run: everyone gets what the honest part deserves."""

import dataclasses
import http.server
import re
import shutil
import sqlite3
import threading
import zipfile
from pathlib import Path

import nbformat
import psutil
import pytest

from attacks import ALL, SOLUTION, UNIT, Attack, hostile_to
from autograder.grading import grade
from autograder.sandbox.enclosure import Limits, sandbox_problem
from classroom import Classroom, found_below
from test_autograde import POINTS

pytestmark = [
    pytest.mark.skipif(sandbox_problem() is not None, reason=f"no sandbox: {sandbox_problem()}"),
    pytest.mark.xdist_group("attacks"),  # one class for all
]
LIMITS = Limits(cpu_seconds=6, wall_seconds=40, memory_bytes=3 * 2**30, scratch_bytes=2**28, file_bytes=2**27)

UNUSABLE = {
    "empty": b"",
    "cut-off": b'{"cells": [',
    "not-json": b"These are my answers.",
    "not-utf8": b'{"cells": "\xff\xfa"}',
    "no-notebook": b'{"a": 1}',
    "odd-json": b"[[[[]]]]",
    "deep-json": b"[" * 100_000,
}


@dataclasses.dataclass
class Graded:
    classroom: Classroom
    records: dict
    visitors: list


@pytest.fixture(scope="module")
def graded(tmp_path_factory) -> Graded:
    classroom = Classroom(tmp_path_factory.mktemp("attacked"), UNIT)
    visitors, server = [], None

    class Visited(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            visitors.append(self.path)

    server = http.server.HTTPServer(("127.0.0.1", 0), Visited)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name, attack in ALL.items():
        attack = hostile_to(attack, classroom.root, server.server_port)
        is_changed = attack.notebook is not Attack.notebook
        notebook = (classroom.answered if is_changed else classroom.answers_alone)(SOLUTION | attack.answers)
        attack.notebook(notebook)
        classroom.submit(name, notebook)
    for name, content in UNUSABLE.items():
        classroom.submit(name, classroom.released()).write_bytes(content)
    _hand_in_oddly(classroom)
    records = grade.grade(UNIT, grade.Settings(root=classroom.root, limits=LIMITS))
    server.shutdown()
    return Graded(classroom, {record.student: record for record in records}, visitors)


def _hand_in_oddly(classroom: Classroom) -> None:
    notebook = nbformat.writes(classroom.answered(SOLUTION))
    submitted = classroom.root / "submitted"
    folder = submitted / "renamed" / UNIT
    folder.mkdir(parents=True)
    (folder / "08_lora (1).ipynb").write_text(notebook)
    folder = submitted / "zipped" / UNIT
    folder.mkdir(parents=True)
    with zipfile.ZipFile(folder / "homework.zip", "w") as archive:
        archive.writestr("../../../../planted", "x")
        archive.writestr(f"stuff/{UNIT}.ipynb", notebook)
    folder = submitted / "utf16" / UNIT
    folder.mkdir(parents=True)
    (folder / f"{UNIT}.ipynb").write_bytes(notebook.encode("utf-16"))
    target = classroom.root / "target.ipynb"
    target.write_text(notebook)
    folder = submitted / "symlink" / UNIT
    folder.mkdir(parents=True)
    (folder / f"{UNIT}.ipynb").symlink_to(target)
    (submitted / "symlinked-folder").mkdir()
    (submitted / "symlinked-folder" / UNIT).symlink_to(submitted / "right" / UNIT)
    folder = submitted / "nothing" / UNIT
    folder.mkdir(parents=True)


@pytest.mark.parametrize("name", ALL)
def test_everyone_gets_what_the_honest_part_deserves(graded, name):
    attack, record = ALL[name], graded.records[name]
    assert record.status == grade.MARKED, record.reason
    mark = graded.classroom.mark(name)
    deserved = {check: 0 if check in attack.lost else points for check, points in POINTS.items()}
    assert {check: mark.scores[check] for check in POINTS} == deserved, (mark.errors, record.notes)
    if attack.said:
        assert attack.said in (mark.errors[attack.lost[0]] if attack.lost else "\n".join(record.notes))


@pytest.mark.parametrize("name", [*UNUSABLE, "symlink", "symlinked-folder", "nothing"])
def test_what_cannot_be_read_gets_a_clear_line_and_no_mark(graded, name):
    record = graded.records[name]
    assert record.status == grade.UNUSABLE
    assert any(word in record.reason for word in ("empty", "JSON", "UTF-8", "notebook", "symbolic link")), record.reason
    assert record.reason in (graded.classroom.root / "report" / f"{UNIT}.md").read_text().replace("\\|", "|")


@pytest.mark.parametrize("name", ["renamed", "zipped", "utf16"])
def test_what_can_be_read_gets_its_mark(graded, name):
    assert {check: graded.classroom.mark(name).scores[check] for check in POINTS} == POINTS


def test_nothing_happened_outside_the_sandbox(graded):
    root = graded.classroom.root
    assert not graded.visitors
    assert not Path("/tmp/pickled").exists() and not Path("/tmp/full").exists()
    assert not found_below(root.parent, "planted") and not (root.parent.parent / "planted").exists()
    assert nbformat.read(root / "submitted" / "right" / UNIT / f"{UNIT}.ipynb", as_version=4).cells
    assert (root / "submitted" / "symlink" / UNIT / f"{UNIT}.ipynb").is_symlink()
    assert nbformat.reads((root / "target.ipynb").read_text(), as_version=4).cells[0].get("outputs") in (None, [])
    with sqlite3.connect(root / "gradebook.db") as database:
        assert database.execute("select max(auto_score) from grade").fetchone()[0] <= 2
    assert not [p for p in psutil.process_iter(["cmdline"]) if "4242" in (p.info["cmdline"] or [])]


def test_feedback_runs_no_script_and_shows_no_hidden_line(graded):
    graded.classroom.api.generate_feedback(UNIT, "prints-a-script")
    page = (graded.classroom.root / "feedback" / "prints-a-script" / UNIT / f"{UNIT}.html").read_text()
    assert "alert(1)" in page and not re.search(r"<script>alert|<[^>]*onclick", page)
    assert "hidden.check" not in page and "BEGIN HIDDEN" not in page


def test_the_report_names_the_commonest_mistakes_and_what_is_suspicious(graded):
    text = (graded.classroom.root / "report" / f"{UNIT}.md").read_text()
    for heading in ("Without a mark", "Marks", "The commonest mistakes", "Worth a look", "Cost", "Everyone"):
        assert f"## {heading}" in text
    assert "| leaves-a-process | left processes running" in text
    table = (graded.classroom.root / "report" / "grades.csv").read_text()
    assert f"{UNIT},,,right" in table


def test_grading_again_does_nothing_until_something_changes(graded):
    root = graded.classroom.root
    before = {path: path.stat().st_mtime_ns for path in (root / "grading" / UNIT / "records").iterdir()}
    shutil.rmtree(root / "submitted" / "loops")
    notebook = graded.classroom.answered(SOLUTION | {"merge": "merge = unmerge = None"})
    graded.classroom.submit("warns", notebook)
    graded.classroom.submit("vs-code", notebook).write_text("{")
    records = {record.student: record for record in grade.grade(UNIT, grade.Settings(root=root, limits=LIMITS))}
    after = {path: path.stat().st_mtime_ns for path in (root / "grading" / UNIT / "records").iterdir()}
    changed = {path.stem for path in after if after[path] != before[path]}
    assert changed - set(UNUSABLE) - {"symlink", "symlinked-folder", "nothing"} == {"warns", "vs-code"}
    assert graded.classroom.mark("warns").scores["check-merge"] == 0
    assert records["vs-code"].status == grade.UNUSABLE
    assert {graded.classroom.mark("vs-code").scores[check] for check in POINTS} == {None}  # no stale mark
