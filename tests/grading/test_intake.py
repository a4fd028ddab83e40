"""What is handed in is taken in as it is meant, or refused with a sentence; none of it needs a kernel."""

import gzip
import io
import json
import os
import random
import signal
import tarfile
import zipfile
from pathlib import Path

import nbformat
import pytest
import torch
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from attacks import MERGE, SOLUTION, UNIT
from autograder.building.build import instructor_notebook
from autograder.checking.drive import StudentError, read_reply
from autograder.checking.masters import units
from autograder.grading import grade, sanitize
from autograder.grading.intake import (
    FILES_BYTES,
    Submission,
    UnusableError,
    layout,
    name_problem,
    printable,
    read,
    students,
    unknown,
)
from autograder.sandbox.enclosure import remove
from autograder.sandbox.kernel import _output, _said
from autograder.sandbox.plain import whole

NAME = f"{UNIT}.ipynb"
STUB = "raise NotImplementedError()"


def released_notebook() -> NotebookNode:
    """As a student gets it, made without nbgrader: answers are stubs."""
    notebook = instructor_notebook(UNIT)
    for cell in notebook.cells:
        if cell["id"] in SOLUTION:
            names = sanitize.defined(cell.source)
            cell.source = "\n".join(f"def {name}(*anything):\n    {STUB}" for name in sorted(names))
        elif cell.metadata.get("nbgrader", {}).get("solution"):
            cell.source = "*Your answer.*"
    return notebook


RELEASED = released_notebook()
FRAME = [cell for cell in RELEASED.cells if "nbgrader" in cell.metadata]
for frame_cell in FRAME:
    frame_cell.metadata.nbgrader.setdefault("points", 0)


def answered_notebook() -> NotebookNode:
    notebook = nbformat.from_dict(RELEASED)
    for cell in notebook.cells:
        cell.source = SOLUTION.get(cell["id"], cell.source)
        if cell["id"] == "colleague":
            cell.source = "She still pays for the activations."
    return notebook


ANSWERED = json.dumps(answered_notebook()).encode()


def count(notebook: NotebookNode) -> int:
    return sanitize.answered(notebook.cells, FRAME)


def hand_in(folder: Path, files: dict[str, bytes]) -> Submission:
    place = folder / "student" / UNIT
    for path, content in files.items():
        (place / path).parent.mkdir(parents=True, exist_ok=True)
        (place / path).write_bytes(content)
    return read(place, UNIT, count)


def zipped(files: dict[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for path, content in files.items():
            archive.writestr(path, content)
    return packed.getvalue()


def notebook_of(*cells: dict, **more: object) -> bytes:
    return json.dumps({"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": list(cells)} | more).encode()


def repair(notebook: NotebookNode) -> tuple[dict[str, str], list[str], list[NotebookNode]]:
    cells, repairs = sanitize.repaired(
        notebook.cells, FRAME, sanitize._experiments(UNIT), sanitize._prompts(UNIT), sanitize._given(UNIT)
    )
    by_name = {name: cell.source for cell in cells if (name := cell.metadata.get("nbgrader", {}).get("grade_id"))}
    return by_name, repairs, cells


def is_right(notebook: NotebookNode) -> bool:
    sources, _, _ = repair(notebook)
    return all(sources[name].strip() == source.strip() for name, source in SOLUTION.items())


@pytest.fixture
def in_time():
    """Fail where something would be waited for without end."""

    def late(*_):
        raise AssertionError("it hangs")

    signal.signal(signal.SIGALRM, late)
    signal.alarm(20)
    yield
    signal.alarm(0)


def test_a_folder_that_is_called_like_the_notebook(tmp_path):
    for files in ({f"{NAME}/{NAME}": ANSWERED, f"{NAME}/helpers.py": b"x = 1"}, {f"{NAME}/a.txt": b"", "b.ipynb": ANSWERED}):
        submission = hand_in(tmp_path / str(len(files[min(files)])), files)
        submission.write(tmp_path / "out" / str(len(files)), UNIT)
        assert is_right(submission.notebook)
    place = tmp_path / "submitted" / "other" / NAME
    place.mkdir(parents=True)
    (place / NAME).write_bytes(ANSWERED)
    assert list(students(tmp_path / "submitted", UNIT)) == [("other", place)]
    assert is_right(read(place, UNIT).notebook)


def test_what_is_nobodys_is_named(tmp_path, capsys):
    for name in ("right/08_lora", "Ada Byron_1_assignsubmission_file", ".git"):
        (tmp_path / "submitted" / name).mkdir(parents=True)
    (tmp_path / "submitted" / "smith_08_lora.ipynb").write_bytes(ANSWERED)
    strangers = ["Ada Byron_1_assignsubmission_file", "smith_08_lora.ipynb"]
    assert unknown(tmp_path / "submitted", units()) == strangers
    (tmp_path / "submitted" / "right" / "08_lora").rmdir()
    (tmp_path / "submitted" / "right").rmdir()
    assert grade.main(["--root", str(tmp_path), "--without-sandbox"]) == 0
    said = capsys.readouterr()
    assert ", ".join(strangers) in said.err and "no submissions" in said.out
    assert "Moodle names so" in said.err


def test_what_a_learning_management_system_named_is_told_with_what_to_do():
    assert layout(["smithjohn_LATE_12_345_08_lora-1.ipynb"]).startswith("Canvas names so")
    assert layout(["Ada Byron_4711_assignsubmission_file_08_lora.ipynb"]).startswith("Moodle names so")
    assert layout(["submissions.zip"]).startswith("Unpack")
    assert layout(["smith", "08_lora.ipynb"]) == ""


def test_a_compressed_archive_that_unpacks_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr("autograder.grading.intake.NOTEBOOK_BYTES", 2**20)
    with pytest.raises(UnusableError, match="more than 1 are not read"):
        hand_in(tmp_path, {"a.tar.gz": gzip.compress(bytes(2**22))})


@pytest.mark.parametrize("place", [f"{UNIT}.zip", UNIT, NAME])
def test_a_pipe_is_not_opened(tmp_path, in_time, place):
    os.mkfifo(tmp_path / place)
    with pytest.raises(UnusableError, match="no regular file"):
        read(tmp_path / place, UNIT)


def test_a_pipe_beside_the_notebook_is_left_out(tmp_path, in_time):
    (tmp_path / "student" / UNIT).mkdir(parents=True)
    os.mkfifo(tmp_path / "student" / UNIT / "08_lora.zip")
    assert any("special file" in note for note in hand_in(tmp_path, {NAME: ANSWERED}).notes)


def test_folders_without_end_are_not_followed_without_end(tmp_path, in_time):
    deep = tmp_path / "student" / UNIT
    deep.mkdir(parents=True)
    here = os.open(deep, os.O_RDONLY)
    for _ in range(1500):
        os.mkdir("a", dir_fd=here)
        below = os.open("a", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)
    try:
        submission = hand_in(tmp_path, {NAME: ANSWERED})
    finally:  # what stays would stop pytest itself, which removes the folders of earlier runs
        removed = remove(tmp_path / "student")
    assert is_right(submission.notebook) and any("deep" in note for note in submission.notes)
    assert removed is None and not (tmp_path / "student").exists()


def test_what_cannot_be_removed_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr("autograder.sandbox.enclosure.REMOVING_SECONDS", 0)
    (tmp_path / "full").mkdir()
    assert "longer" in remove(tmp_path / "full")


def nested(levels: int) -> str:
    return '{"a":' * levels + "1" + "}" * levels


@pytest.mark.parametrize("levels", [300, 900])
def test_outputs_and_metadata_may_be_nested_as_they_like(tmp_path, levels):
    cell = '{"cell_type": "code", "source": "x = 1", "id": "a", "metadata": %s, "outputs": [%s], "execution_count": 1}'
    text = '{"nbformat": 4, "nbformat_minor": 5, "metadata": %s, "cells": [%s]}'
    deep = nested(levels)
    submission = hand_in(tmp_path, {NAME: (text % (deep, cell % (deep, deep))).encode()})
    assert submission.notebook.cells[0].source == "x = 1"
    submission.write(tmp_path / "out", UNIT)


@pytest.mark.parametrize(
    "cell",
    [
        {"cell_type": "code", "source": ["x = ", "1"], "metadata": {"tags": None}, "outputs": None},
        {"cell_type": "code", "source": "x = 1", "metadata": None},
        {"cell_type": "code", "source": "x = 1", "metadata": [], "outputs": "none", "id": 7, "execution_count": "x"},
        {"cell_type": "code", "source": "x = 1", "metadata": {"nbgrader": None, "tags": [None, 3]}},
        {"cell_type": "code", "source": "x = 1"},
        {"cell_type": "code", "source": "x = 1", "id": "no id\r\n"},
        {"cell_type": "code", "source": "x = 1", "id": ""},
        {"cell_type": "code", "source": "x = 1", "id": "a" * 65},
    ],
)
def test_a_cell_whose_form_is_not_as_it_should_be(tmp_path, cell):
    submission = hand_in(tmp_path, {NAME: notebook_of(cell, None, {"cell_type": "poem", "source": None}, metadata=None)})
    submission.notebook.cells += answered_notebook().cells
    _, _, cells = repair(submission.notebook)
    assert "x = 1" in [cell.source for cell in cells]
    nbformat.validate(nbformat.from_dict(nbformat.v4.new_notebook(cells=cells)))


ANYTHING = [None, 3, "x", [], {}, "\ud83d", True, [None], {"a": None}, 1e400, [[]], "\r\n"]


def _broken(value: object, often: float, chance: random.Random) -> object:
    """Put something else in the place of what stands in a notebook, here and there."""
    if chance.random() < often:
        return chance.choice(ANYTHING)
    if isinstance(value, dict):
        return {key: _broken(item, often, chance) for key, item in value.items()}
    return [_broken(item, often, chance) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize("seed", range(20))
def test_a_notebook_with_anything_in_any_place_is_repaired_or_refused(tmp_path, seed):
    chance = random.Random(seed)
    broken = _broken(json.loads(ANSWERED), chance.choice([0.002, 0.02, 0.1]), chance)
    try:
        _, _, cells = repair(hand_in(tmp_path, {NAME: json.dumps(broken).encode()}).notebook)
    except UnusableError:
        return
    notebook = new_notebook(cells=cells)
    nbformat.validate(notebook)
    nbformat.writes(notebook).encode()


def test_half_a_surrogate_pair_is_replaced(tmp_path):
    assert whole("a\ud83d") == "a\ufffd" and whole("\ud83d" + "\ude00") == "😀" and whole("é") == "é"
    cells = [
        {"cell_type": "markdown", "source": "cut \ud83d", "metadata": {"\udc00": "\ud800"}, "attachments": {"\ud83d": None}},
        {"cell_type": "code", "source": ["'\ud83d", "\ude00'"], "metadata": {}, "id": "\ud83d", "outputs": ["\ud83d"]},
    ]
    submission = hand_in(tmp_path, {NAME: notebook_of(*cells)})
    assert [cell.source for cell in submission.notebook.cells] == ["cut \ufffd", "'😀'"]
    nbformat.writes(submission.notebook).encode()


def test_line_ends_are_made_one_and_experiments_are_known(tmp_path):
    notebook = answered_notebook()
    for cell in notebook.cells:
        cell.source = cell.source.replace("\n", "\r\n")
        cell.metadata.pop("tags", None)
    _, repairs, cells = repair(hand_in(tmp_path, {NAME: json.dumps(notebook).encode()}).notebook)
    assert not repairs
    tagged = [cell for cell in cells if cell.metadata.get("tags") == ["experiment"]]
    assert len(tagged) == len([cell for cell in RELEASED.cells if "experiment" in cell.metadata.get("tags", [])]) > 1


def test_an_edited_experiment_is_known_by_its_id():
    notebook = answered_notebook()
    (place, *_) = [n for n, cell in enumerate(notebook.cells) if "experiment" in cell.metadata.get("tags", [])]
    for key in ("id", "metadata"):
        edited = nbformat.from_dict(notebook)
        cell = edited.cells[place]
        cell.source, name = "load_smollm2()  # mine", cell["id"]
        cell.metadata = nbformat.from_dict({} if key == "id" else {"id": name})
        cell["id"] = name if key == "id" else "another"
        _, _, cells = repair(edited)
        assert next(cell for cell in cells if "# mine" in cell.source).metadata.tags == ["experiment"]


@pytest.mark.parametrize("stamp", [b"yesterday, about noon", b"\xff\xfe\x00", b"9" * 400, b"1234567 UTC+99999"])
def test_a_timestamp_that_is_no_time_is_ignored(tmp_path, stamp):
    submission = hand_in(tmp_path, {NAME: ANSWERED, "timestamp.txt": stamp})
    assert "timestamp.txt" not in submission.files and "which is no time" in submission.notes[0]


def test_a_timestamp_counts_and_the_one_in_an_archive_does_not_replace_it(tmp_path):
    inside = zipped({f"stuff/{NAME}": ANSWERED, "stuff/timestamp.txt": b"2020-01-01 00:00:00 UTC"})
    submission = hand_in(tmp_path, {"homework.zip": inside, "timestamp.txt": b"\xef\xbb\xbf2026-11-20 12:00:00 UTC\n"})
    assert submission.files == {"timestamp.txt": b"2026-11-20 12:00:00 UTC"}


def test_names_that_no_file_system_takes_are_left_out(tmp_path):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz", errors="surrogateescape") as archive:
        for name in (NAME, "helpers.py", "长" * 100 + ".txt", "half\udcff.txt", f"{NAME}/x", "helpers.py/x", "d/" * 60 + "x"):
            content = ANSWERED if name == NAME else b"x"
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    submission = hand_in(tmp_path, {"all.tar.gz": packed.getvalue()})
    assert submission.files == {"helpers.py": b"x"}
    assert "cannot stand beside" in submission.notes[-1]
    json.dumps(submission.notes, ensure_ascii=False).encode()
    submission.write(tmp_path / "out", UNIT)


def test_what_lies_beside_the_notebook_stays_beside_it(tmp_path):
    files = {f"hand in/{NAME}": ANSWERED, "hand in/helpers.py": b"1", "hand in/data/a.csv": b"2", "readme.txt": b"3"}
    expected = {"helpers.py": b"1", "data/a.csv": b"2", "readme.txt": b"3"}
    assert hand_in(tmp_path / "a", {"homework.zip": zipped(files)}).files == expected
    assert hand_in(tmp_path / "b", files).files == expected
    on_windows = {path.replace("/", "\\"): content for path, content in files.items()}
    assert hand_in(tmp_path / "c", {"homework.zip": zipped(on_windows)}).files == expected


def test_large_files_are_left_out_one_by_one(tmp_path):
    files = {NAME: ANSWERED, "helpers.py": b"x = 1", "small.bin": bytes(FILES_BYTES // 4), "large.bin": bytes(FILES_BYTES)}
    submission = hand_in(tmp_path, files)
    assert submission.files.keys() == {"helpers.py", "small.bin"}
    assert "large.bin was left out (20 MiB" in submission.notes[0]


def test_the_answered_notebook_counts(tmp_path):
    untouched = json.dumps(RELEASED).encode()
    some = answered_notebook()
    some.cells = [cell for cell in some.cells if cell["id"] != "merge"]
    both = {NAME: untouched, "08_lora_final.ipynb": ANSWERED}
    assert is_right(hand_in(tmp_path / "a", both).notebook)
    assert is_right(hand_in(tmp_path / "b", {NAME: ANSWERED, "08_lora_old.ipynb": untouched}).notebook)
    assert is_right(hand_in(tmp_path / "c", {"a.ipynb": json.dumps(some).encode(), "b.ipynb": ANSWERED}).notebook)
    submission = hand_in(tmp_path / "d", {NAME: b'{"cells": [', "copy of it.ipynb": ANSWERED})
    assert is_right(submission.notebook) and any("another notebook counts" in note for note in submission.notes)
    assert any("what counts is 08_lora_final.ipynb" in note for note in hand_in(tmp_path / "e", both).notes)
    other = ANSWERED.replace(b"She still", b"He still")
    assert b"He still" in json.dumps(hand_in(tmp_path / "f", {NAME: other, "b.ipynb": ANSWERED}).notebook).encode()
    with pytest.raises(UnusableError, match=r"not clear: a.ipynb, b.ipynb"):
        hand_in(tmp_path / "g", {"a.ipynb": other, "b.ipynb": ANSWERED})


@pytest.mark.parametrize("name", ["08_lora.ipynb.txt", "08_lora.ipynb.json", "08_lora.IPYNB", "08_lora.json", "08_lora"])
def test_other_endings_are_taken_if_they_hold_a_notebook(tmp_path, name):
    submission = hand_in(tmp_path, {name: ANSWERED, "notes.txt": b"x"})
    assert is_right(submission.notebook) and submission.notes == [f"the notebook was called {name}"]
    assert submission.files == {"notes.txt": b"x"}


def test_an_archive_in_an_archive_is_taken_and_a_third_is_not(tmp_path):
    twice = zipped({"homework.zip": zipped({f"a/{NAME}": ANSWERED})})
    assert is_right(hand_in(tmp_path / "a", {"all.ZIP": twice}).notebook)
    with pytest.raises(UnusableError, match=r"there is no notebook in it; .* found homework.zip"):
        hand_in(tmp_path / "b", {"all.zip": zipped({"again.zip": twice})})


def test_what_was_there_instead_is_said(tmp_path):
    with pytest.raises(UnusableError, match=r"expected 08_lora.ipynb, found a.txt, answers.rar \(of archives, .zip"):
        hand_in(tmp_path / "a", {"answers.rar": b"Rar!", "a.txt": b"my answers"})
    with pytest.raises(UnusableError, match="cannot be unpacked"):
        hand_in(tmp_path / "b", {"answers.zip": b"Rar!"})


def test_names_of_students():
    for good in ("[abc]", "a*", "{unit}%s", "-dash", "o'brien; drop table--", "Zoë Müller", "a" * 200):
        assert name_problem(good) is None
    for bad in ("line\nbreak", "half\udcff", " space", "a" * 201, "长" * 80):
        assert "rename the folder" in name_problem(bad)
    assert printable("a\n\ud800b" + "c" * 1000).encode() and len(printable("c" * 1000)) == 500


def strip_all(notebook: NotebookNode) -> NotebookNode:
    for number, cell in enumerate(notebook.cells):
        cell.metadata = nbformat.from_dict({})
        cell["id"] = f"new{number}"
    return notebook


def test_answers_are_known_without_metadata_and_ids():
    notebook = strip_all(answered_notebook())
    notebook.cells.insert(3, new_code_cell("layer = merge"))
    sources, repairs, cells = repair(notebook)
    assert all(sources[name].strip() == source.strip() for name, source in SOLUTION.items())
    assert sources["colleague"] == "She still pays for the activations."
    assert len(cells) == len(notebook.cells) and not any("missing" in text for text in repairs)


def test_a_deleted_written_answer_is_not_taken_from_the_text_below_it():
    notebook = strip_all(answered_notebook())
    notebook.cells = [cell for cell in notebook.cells if not cell.source.startswith("She still")]
    sources, repairs, _ = repair(notebook)
    assert sources["colleague"] == "*The cell for this answer was missing.*" and "colleague was missing" in repairs
    assert any(text.startswith("colleague waits for a person") for text in repairs)


def test_answers_that_stand_in_one_cell_are_not_overwritten_by_a_stub():
    notebook = answered_notebook()
    notebook.cells = [cell for cell in notebook.cells if cell["id"] not in ("inject", "merge")]
    place = next(n for n, cell in enumerate(notebook.cells) if cell["id"] == "lora-linear")
    notebook.cells[place].source += "\n\n" + SOLUTION["inject"] + "\n\n" + MERGE
    sources, repairs, _ = repair(notebook)
    assert STUB not in sources["merge"] + sources["inject"] and "merge was missing" in repairs


def test_a_notebook_in_which_nothing_is_known_gets_no_mark():
    for cells in ([], [new_code_cell("x = 1"), new_markdown_cell("My answers.")]):
        with pytest.raises(UnusableError, match="no cell of this unit"):
            repair(new_notebook(cells=cells))


@pytest.mark.parametrize("unit", [unit for unit in units() if unit != UNIT])
def test_another_units_notebook_gets_no_mark_or_only_what_it_answers(unit):
    notebook = instructor_notebook(unit)
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict({"nbgrader": cell.metadata["nbgrader"]} if "nbgrader" in cell.metadata else {})
    with pytest.raises(UnusableError, match="another unit"):
        repair(notebook)


def saved(value: object) -> bytes:
    reply = io.BytesIO()
    torch.save(value, reply)
    return reply.getvalue()


def shared_lists() -> list:
    value = [0]
    for _ in range(40):
        value = [value] * 10
    return value


def deep_list() -> list:
    value = []
    for _ in range(200):
        value = [value]
    return value


@pytest.mark.parametrize(
    "value",
    [
        {"a": shared_lists()},
        {"a": deep_list()},
        {"a": torch.zeros(1).expand(2**30)},
        {"a": [torch.zeros(2**20)] * 1000},
        {"a": ["x" * 2**20] * 1000},
    ],
    ids=["shared", "deep", "stride 0", "same tensor", "same text"],
)
def test_a_reply_that_is_small_and_enormous_is_refused(value, in_time):
    with pytest.raises(StudentError, match="far larger"):
        read_reply(saved(value), 2**28)


def test_a_reply_that_is_as_asked_for_is_not_refused():
    read_reply(saved({"a": torch.zeros(2**20), "b": [torch.zeros(3).expand(4, 3), "text", 1.5, None]}), 2**28)


@pytest.mark.parametrize(
    "message",
    [
        None,
        [],
        {"parent_header": None, "msg_type": "stream", "content": {}},
        {"parent_header": {"msg_id": "r"}, "msg_type": 3, "content": {}},
        {"parent_header": {"msg_id": "r"}, "msg_type": "display_data", "content": {}},
        {"parent_header": {"msg_id": "r"}, "msg_type": "display_data", "content": {"data": ["text"], "metadata": 1}},
        {"parent_header": {"msg_id": "r"}, "msg_type": "execute_result", "content": {"data": {"text/plain": 3}}},
        {"parent_header": {"msg_id": "r"}, "msg_type": "stream", "content": {"name": "\ud83d", "text": None}},
        {"parent_header": {"msg_id": "r"}, "msg_type": "error", "content": {"traceback": [None, {"a": 1}]}},
        {"parent_header": {"msg_id": "r"}, "msg_type": "error", "content": "gone wrong"},
        {
            "parent_header": {"msg_id": "r"},
            "msg_type": "display_data",
            "content": {"data": {"application/json": json.loads(nested(300)), "text/html": json.loads(nested(300))}},
        },
    ],
)
def test_a_message_of_the_kernel_becomes_an_output_or_nothing(message):
    output, size = _output(*_said(message, "r"))
    if output is not None:
        cell = new_code_cell("x", outputs=[output])
        nbformat.validate(new_notebook(cells=[cell]))
        json.dumps(cell, ensure_ascii=False).encode()
        assert size < 10_000


def written_beside(notebook: NotebookNode, place: int, text: str) -> NotebookNode:
    """Leave the written answer's placeholder as it was, and put a cell of text that many cells below it."""
    question = next(n for n, cell in enumerate(notebook.cells) if cell["id"] == "colleague")
    notebook.cells[question].source = "*Your answer.*"
    notebook.cells.insert(question + place, new_markdown_cell(text))
    return notebook


@pytest.mark.parametrize("place", [0, 1])
def test_an_answer_beside_its_placeholder_waits_for_a_person(place):
    sources, repairs, cells = repair(written_beside(answered_notebook(), place, "She still pays for the activations."))
    assert sources["colleague"] != "*Your answer.*" and any("colleague waits for a person" in text for text in repairs)
    assert [cell.source for cell in cells].count("She still pays for the activations.") == 1


def test_an_empty_written_answer_waits_for_nobody():
    for notebook in (RELEASED, written_beside(answered_notebook(), 1, " \n")):
        sources, repairs, _ = repair(nbformat.from_dict(notebook))
        assert sources["colleague"] == "*Your answer.*" and not repairs


@pytest.mark.parametrize("place", [0, 1, 40])
def test_an_answer_in_a_cell_of_its_own_is_not_overwritten_by_its_stub(place):
    notebook = answered_notebook()
    stub = next(n for n, cell in enumerate(notebook.cells) if cell["id"] == "merge")
    notebook.cells[stub].source = next(cell.source for cell in FRAME if cell["id"] == "merge")
    notebook.cells.insert(stub + place, new_code_cell(MERGE))
    sources, repairs, cells = repair(notebook)
    assert sources["merge"] == "# Answered in another cell." and "merge is answered in another cell" in repairs
    answer = next(n for n, cell in enumerate(cells) if cell.source.strip() == MERGE.strip())
    assert answer < next(n for n, cell in enumerate(cells) if cell["id"] == "check-merge")
