"""What learning management systems give out becomes one submission a student, and marks go back as each system takes them."""

import csv
import re
import tempfile
import zipfile
from functools import cache
from pathlib import Path

import pytest
from nbgrader.api import Gradebook

from autograder.grading import intake, lms
from autograder.grading.lms import COLLECTED, KEPT, MISSING, THERE, UNREADABLE, collect, system_of, write_grades
from classroom import found_below

UNIT = "08_lora"
CLASS = [
    "Ada Lovelace",
    "Alan Turing",
    "Emmy Noether",
    "Grace Hopper",
    "Mária Telkes",
    "J. Doe",
    "O'Neill",
    "Li 长",
    "Ng",
    "Zoë B.",
]
FORMS = {
    "moodle": "{student}_{number}_assignsubmission_file/my notebook.ipynb",
    "moodle, flat": "{student}_{number}_assignsubmission_file_my notebook.ipynb",
    "canvas": "{student}_{number}_99{number}_my notebook.ipynb",
    "canvas, late and again": "{student}_LATE_{number}_99{number}_my notebook-2.ipynb",
    "blackboard": "08 LoRA_{student}_attempt_2026-11-20-23-59-01_my notebook.ipynb",
    "folders": "{student}/my notebook.ipynb",
    "in a folder of the class": "download/{student}/my notebook.ipynb",
    "files": "{student}.ipynb",
}


def handed_in(folder: Path, form: str, students: list[str] = CLASS) -> Path:
    """Return an archive with a notebook of everybody."""
    archive = folder / "download.zip"
    with zipfile.ZipFile(archive, "w") as into:
        for number, student in enumerate(students):
            into.writestr(FORMS[form].format(student=student, number=100 + number), f"the notebook of {student}")
    return archive


@cache
def gradebook() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        with Gradebook(f"sqlite:///{folder}/gradebook.db") as made:
            made.update_or_create_student("Never Seen")
        return (Path(folder) / "gradebook.db").read_bytes()


def root_of(folder: Path) -> Path:
    """Return a folder with the gradebook of a class in which somebody has handed nothing in."""
    (folder / "gradebook.db").write_bytes(gradebook())
    return folder


@pytest.mark.parametrize("form", FORMS)
def test_a_class_of_ten_is_the_same_however_it_was_handed_in(form, tmp_path):
    found = collect(handed_in(tmp_path, form), UNIT, root_of(tmp_path))
    assert {line.student: line.status for line in found} == dict.fromkeys(CLASS, COLLECTED) | {"Never Seen": MISSING}
    assert sorted(student for student, _ in intake.students(tmp_path / "submitted", UNIT)) == sorted(CLASS)
    for student in CLASS:
        files = {path.name: path.read_text() for path in (tmp_path / "submitted" / student / UNIT).iterdir()}
        moment = files.pop("timestamp.txt", None)
        assert list(files.values()) == [f"the notebook of {student}"]
        assert next(iter(files)) == ("my notebook.ipynb" if form != "files" else f"{student}.ipynb")
        assert (moment is not None) == (form == "blackboard")
    assert all((line.late == "late") == (form == "canvas, late and again") for line in found if line.status == COLLECTED)


def test_an_unpacked_download_is_taken_too(tmp_path):
    zipfile.ZipFile(handed_in(tmp_path, "moodle")).extractall(tmp_path / "unpacked")
    found = collect(tmp_path / "unpacked", UNIT, root_of(tmp_path))
    assert sum(line.status == COLLECTED for line in found) == 10


def test_nothing_that_is_there_is_overwritten(tmp_path):
    root, archive = root_of(tmp_path), handed_in(tmp_path, "moodle")
    collect(archive, UNIT, root)
    mended = root / "submitted" / "Alan Turing" / UNIT / "my notebook.ipynb"
    mended.write_text("mended by hand")
    found = {line.student: line.status for line in collect(archive, UNIT, root)}
    assert found.pop("Alan Turing") == KEPT and found.pop("Never Seen") == MISSING and set(found.values()) == {THERE}
    assert mended.read_text() == "mended by hand"
    assert not list(root.rglob(".collecting-*"))


def test_the_last_of_several_attempts_counts(tmp_path):
    archive = tmp_path / "download.zip"
    with zipfile.ZipFile(archive, "w") as into:
        for day in ("19", "21", "20"):
            begins = f"08 LoRA_ada1_attempt_2026-11-{day}-08-00-00"
            into.writestr(f"{begins}_a.ipynb", f"of {day}")
            into.writestr(f"{begins}.txt", "Name: Ada Lovelace")
    (line, _) = collect(archive, UNIT, root_of(tmp_path))
    place = tmp_path / "submitted" / "ada1" / UNIT
    assert (place / "a.ipynb").read_text() == "of 21" and "3 attempts" in line.note
    assert re.fullmatch(r"2026-11-21 08:00:00 [+-]\d{4}\n", (place / "timestamp.txt").read_text())


def test_two_of_one_name_are_two(tmp_path):
    found = collect(handed_in(tmp_path, "moodle", ["J. Doe", "J. Doe", "Ng"]), UNIT, root_of(tmp_path))
    assert {line.student for line in found} == {"J. Doe 100", "J. Doe 101", "Ng", "Never Seen"}


def test_what_is_not_a_submission_is_named_and_what_leads_out_is_left(tmp_path):
    archive = handed_in(tmp_path, "moodle")
    with zipfile.ZipFile(archive, "a") as into:
        into.writestr("read me.txt", "of the teacher")
        into.writestr("../../planted_1_assignsubmission_file/x.ipynb", "x")
        into.writestr("Ada Lovelace_100_assignsubmission_onlinetext/onlinetext.html", "<p>hello</p>")
        into.writestr("bad\nname_7_assignsubmission_file/x.ipynb", "x")
    found = {line.student: line for line in collect(archive, UNIT, root_of(tmp_path))}
    assert found["read me.txt"].status == UNREADABLE and "Moodle" in found["read me.txt"].note
    assert found["Ada Lovelace"].files == 1
    assert any(line.status == UNREADABLE and "rename" in line.note for line in found.values())
    assert not found_below(tmp_path.parent, "planted*")


def test_a_damaged_archive_costs_nobody_else_anything(tmp_path):
    archive = handed_in(tmp_path, "folders")
    content = bytearray(archive.read_bytes())
    place = content.index(b"the notebook of Emmy Noether")
    content[place] ^= 0xFF
    archive.write_bytes(content)
    found = {line.student: line.status for line in collect(archive, UNIT, root_of(tmp_path))}
    assert found.pop("Emmy Noether") == UNREADABLE
    assert set(found.values()) == {COLLECTED, MISSING}


def test_no_archive_is_told_so(tmp_path, capsys):
    (tmp_path / "download.zip").write_text("no archive")
    assert lms.main([str(tmp_path / "download.zip"), UNIT, "--root", str(tmp_path)]) == 1
    assert "cannot be read" in capsys.readouterr().err


def test_a_system_is_known_by_most_of_the_names():
    assert system_of(["a_b.ipynb", "c.ipynb"]) == lms.NAMED
    assert system_of(["lovelaceada_12_34_a.ipynb", "turingalan_LATE_13_35_b.zip", "notes.txt"]) == lms.CANVAS


@pytest.mark.parametrize(
    "form, name, row",
    [
        (
            "moodle",
            "08_lora_moodle.csv",
            {"Identifier": "Participant 100", "Full name": "Ada Lovelace", "Grade": "7.5", "Maximum Grade": "14"},
        ),
        ("canvas", "08_lora_canvas.csv", {"Student": "Ada Lovelace", "ID": "100", "Section": "", UNIT: "7.5"}),
        ("blackboard", "08_lora_blackboard.csv", {"Username": "Ada Lovelace", UNIT: "7.5"}),
    ],
)
def test_marks_go_back_as_they_are_wanted(form, name, row, tmp_path):
    collect(handed_in(tmp_path, form), UNIT, root_of(tmp_path))
    scores = dict.fromkeys(CLASS, None) | {"Ada Lovelace": 7.5}
    (path,) = write_grades(UNIT, scores, 14.0, tmp_path)
    assert path.name == name
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    (hers,) = [each for each in rows if row.items() <= each.items()]
    others = [each for each in rows if each != hers and "Points Possible" not in str(each)]
    assert len(others) == 9 and all("7.5" not in each.values() for each in others)


def test_without_a_collection_there_is_no_such_table(tmp_path):
    assert write_grades(UNIT, {"Ada": 1.0}, 14.0, tmp_path) == []
