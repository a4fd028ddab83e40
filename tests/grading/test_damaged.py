"""A class with honest notebooks that are damaged or odd: nobody loses a mark, and nobody stops the others."""

import builtins
import json
import os
import re
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from random import Random

import nbformat
import pytest
from distributed import LocalCluster
from nbformat.v4 import new_code_cell
from nbgrader.converters import GenerateFeedback
from nbgrader.utils import temp_attrs

from attacks import SOLUTION, UNIT, first_cell, merge_that
from autograder.grading import grade, intake
from autograder.grading.grade import FAILED, MARKED, UNUSABLE, Settings
from autograder.sandbox import process as sandbox_process
from autograder.sandbox.enclosure import Limits, sandbox_problem
from autograder.sandbox.kernel import StudentKernel
from autograder.sandbox.process import SandboxProcess
from classroom import Classroom
from damage import Damaged, damaged
from test_autograde import POINTS
from test_damaged_at_random import GRADED, may_lose

pytestmark = [
    pytest.mark.skipif(sandbox_problem() is not None, reason=f"no sandbox: {sandbox_problem()}"),
    pytest.mark.xdist_group("damaged"),  # one class for all
]
NAME = f"{UNIT}.ipynb"
USED = set(re.findall(r"\w+", " ".join(SOLUTION.values())))
SHADOWED = sorted(
    name
    for name in dir(builtins)
    if name not in USED and not name.startswith("_") and name.isidentifier() and name not in ("True", "False", "None")
)
"""Built-in names that the answers do not use: a student may call a variable so, and never notice."""

ODD_CELLS = {
    "deep-output": "from IPython.display import publish_display_data\nx = 1\nfor _ in range(300): x = {'a': x}\n"
    "publish_display_data({'application/json': x, 'text/plain': 'deep'}, metadata=x)",
    "half-a-pair": "print('\\ud83d')\nraise ValueError('\\ud83d')",
    "no-data": "kernel = get_ipython().kernel\nfor content in ({'oops': 1}, {'data': 3}, {'data': {'text/plain': [1]}}):\n"
    "    kernel.session.send(kernel.iopub_socket, 'display_data', content, parent=kernel.get_parent())",
    "nested-folders": "import os\nfrom ipykernel import get_connection_file\nos.chdir(os.path.dirname(get_connection_file()))\n"
    "for _ in range(1500): os.mkdir('a'); os.chdir('a')\nos.chdir('/student')",
    "float64": "import torch\ntorch.set_default_dtype(torch.float64)\ntorch.set_grad_enabled(False)",
    "shadows": f"{' = '.join(SHADOWED)} = 0",
    "closes-stdout": "import sys\nsys.stdout.close(); sys.stderr.close()",
    "without-stdout": "import sys\nsys.stdout = None",
    "folder-is-gone": "import os, tempfile\nwith tempfile.TemporaryDirectory() as folder: os.chdir(folder)",
}


def _edit(path: Path, change: Callable[[dict], None]) -> None:
    parsed = json.loads(path.read_text())
    change(parsed)
    path.write_text(json.dumps(parsed))


def _without_tags(parsed: dict) -> None:
    parsed["metadata"] = None
    for cell in parsed["cells"]:
        if "nbgrader" in cell["metadata"]:
            cell["metadata"]["tags"] = None
        else:
            cell["metadata"] = None
        if cell["cell_type"] == "code":
            cell["outputs"] = None


def _nothing_but_text(parsed: dict) -> None:
    for number, cell in enumerate(parsed["cells"]):
        cell["metadata"], cell["id"] = {}, f"new{number}"


def _half_a_pair(parsed: dict) -> None:
    parsed["cells"][0]["source"] = "cut off: \ud83d"


def _from_windows(parsed: dict) -> None:
    for cell in parsed["cells"]:
        cell["source"] = "".join(cell["source"]).replace("\n", "\r\n")
        cell["metadata"].pop("tags", None)


EDITS = {
    "tags-null": _without_tags,
    "nothing-but-text": _nothing_but_text,
    "half-a-pair-in-text": _half_a_pair,
    "from-windows": _from_windows,
}


def _hand_in_oddly(classroom: Classroom) -> None:
    right = nbformat.writes(classroom.answered(SOLUTION))
    submitted = classroom.root / "submitted"
    classroom.submit("[abc]", classroom.answered(SOLUTION))
    folder = classroom.submit("called-like-it", classroom.released()).parent
    (folder / NAME).unlink()
    (folder / NAME).mkdir()
    (folder / NAME / NAME).write_text(right)
    (folder / NAME / "more.txt").write_text("more")
    (classroom.submit("noon", classroom.answered(SOLUTION)).parent / "timestamp.txt").write_text("yesterday, about noon")
    launcher = classroom.submit("launcher", classroom.answered(SOLUTION)).parent / "ipykernel_launcher.py"
    launcher.write_text("raise SystemExit('not this one')")
    notebook = classroom.answered(SOLUTION | {"lora-linear": "from helpers import LoRALinear"})
    setup = next(cell.source for cell in notebook.cells if cell["id"] == "setup")
    helpers = f"{setup}\n{SOLUTION['lora-linear']}"
    folder = submitted / "helped" / UNIT
    folder.mkdir(parents=True)
    with zipfile.ZipFile(folder / "homework.zip", "w") as archive:
        archive.writestr(f"hand in/{NAME}", nbformat.writes(notebook))
        archive.writestr("hand in/helpers.py", helpers)
        archive.writestr("hand in/" + "长" * 100 + ".txt", "x")
        archive.writestr("hand in/adapters.bin", os.urandom(21 * 2**20))
    final = classroom.submit("final", classroom.released()).parent / "08_lora_final.ipynb"
    final.write_text(right)
    # What cannot be marked
    (submitted / "pipe").mkdir()
    os.mkfifo(submitted / "pipe" / f"{UNIT}.zip")
    classroom.submit("line\nbreak", classroom.answered(SOLUTION))
    classroom.submit(os.fsdecode(b"half\xff"), classroom.answered(SOLUTION))
    classroom.submit("long" + "g" * 248, classroom.answered(SOLUTION))
    other = classroom.released()
    other.cells = [new_code_cell("x = 1")]
    classroom.submit("nothing-known", other)


@cache
def at_random(seed: int) -> Damaged:
    return damaged(UNIT, Random(seed))


@pytest.fixture(scope="module")
def graded(tmp_path_factory) -> tuple[Classroom, dict]:
    classroom = Classroom(tmp_path_factory.mktemp("damaged"), UNIT)
    for name, source in ODD_CELLS.items():
        notebook = classroom.answered(SOLUTION)
        first_cell(source)(notebook)
        classroom.submit(name, notebook)
    for name, edit in EDITS.items():
        _edit(classroom.submit(name, classroom.answered(SOLUTION)), edit)
    enormous = merge_that(
        "import torch\n    save, value = torch.save, [0]\n    for _ in range(40): value = [value] * 10\n"
        "    torch.save = lambda observed, file: save({'a': value}, file)"
    )
    classroom.submit("enormous", classroom.answered(SOLUTION | enormous.answers))
    _hand_in_oddly(classroom)
    for seed in range(GRADED):
        for path, content in at_random(seed).files.items():
            place = classroom.root / "submitted" / f"random {seed}" / UNIT / path
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(content)
    records = grade.grade(UNIT, Settings(root=classroom.root, limits=Limits(cpu_seconds=30, wall_seconds=120)))
    return classroom, {record.student: record for record in records}


HONEST = [*ODD_CELLS, *EDITS, "[abc]", "called-like-it", "noon", "launcher", "helped", "final"]


@pytest.mark.parametrize("student", HONEST)
def test_nobody_loses_a_mark_to_the_machinery(graded, student):
    classroom, records = graded
    assert records[student].status == MARKED, records[student].reason
    mark = classroom.mark(student)
    assert {check: mark.scores[check] for check in POINTS} == POINTS, (mark.errors, records[student].notes)


@pytest.mark.parametrize("seed", range(GRADED))
def test_random_damage_costs_no_mark(graded, seed):
    classroom, records = graded
    record, made = records[f"random {seed}"], at_random(seed)
    if record.status == UNUSABLE:
        assert made.may_be_refused and record.reason
        return
    assert record.status == MARKED, (record.reason, made.done)
    mark = classroom.mark(record.student)
    lost = {check for check in POINTS if mark.scores[check] != POINTS[check]}
    assert lost <= may_lose(made), (made.done, mark.errors, record.notes)
    assert made.unit.question in mark.waiting, made.done


def test_an_enormous_reply_costs_its_own_points_only(graded):
    classroom, records = graded
    assert records["enormous"].status == MARKED
    scores = classroom.mark("enormous").scores
    assert {check for check in POINTS if scores[check] == 0} == {"check-merge"}


@pytest.mark.parametrize(
    "student, line",
    [
        ("pipe", "no regular file"),
        ("line\\nbreak", "rename the folder"),
        ("half\ufffd", "rename the folder"),
        ("longggg", "rename the folder"),
        ("nothing-known", "no cell of this unit's exercises"),
    ],
)
def test_what_cannot_be_marked_gets_a_line(graded, student, line):
    classroom, records = graded
    (record,) = [record for name, record in records.items() if re.match(student, name)]
    assert record.status == UNUSABLE and line in record.reason
    assert record.reason in (classroom.root / "report" / f"{UNIT}.md").read_text()


def test_a_name_is_no_pattern_to_any_of_nbgraders_steps(graded):
    classroom, _ = graded
    assert classroom.api.generate_feedback(UNIT, "[abc]")["success"]
    assert (classroom.root / "feedback" / "[abc]" / UNIT / f"{UNIT}.html").is_file()
    with temp_attrs(classroom.api.coursedir, assignment_id=UNIT):
        step = GenerateFeedback(coursedir=classroom.api.coursedir, parent=classroom.api)
        step.init_notebooks()
    assert str(classroom.root / "autograded" / "[abc]" / UNIT) in step.assignments


def test_what_was_done_is_noted(graded):
    _, records = graded
    for student, note in {
        "noon": 'timestamp.txt says "yesterday, about noon"',
        "helped": "adapters.bin was left out (21 MiB",
        "final": "what counts is 08_lora_final.ipynb, which has the most answers (5)",
        "nothing-but-text": "merge had lost its nbgrader metadata",
    }.items():
        assert any(note in said for said in records[student].notes), records[student].notes
    for student in ("from-windows", "half-a-pair-in-text", "[abc]"):
        assert not records[student].notes


def _fails(*_, **__):
    raise ZeroDivisionError("thrown in")


def _throw_in(monkeypatch, owner: object, name: str, is_meant: Callable[..., bool]) -> None:
    """Have a function fail for one submission."""
    original = getattr(owner, name)

    def instead(*arguments, **options):
        return _fails() if is_meant(*arguments) else original(*arguments, **options)

    monkeypatch.setattr(owner, name, instead)


STEPS = {
    "take-in": "it could not be read",
    "sanitize": "it could not be put into the released form",
    "start": "executing it failed",
    "kernel": "executing it failed",
    "execute": "executing it failed",
    "call": "executing it failed",
    "mark": "it could not be marked",
    "deep": "could not be marked",
}
"""What the report says of a submission for which this step raised an error."""


def test_an_error_in_any_step_costs_nobody_else_a_mark(tmp_path, monkeypatch):
    classroom = Classroom(tmp_path, UNIT)
    for student in (*STEPS, "clean-up", "sweep", "first", "zlast"):
        path = classroom.submit(student, classroom.answers_alone(SOLUTION))
        (path.parent / "who.txt").write_text(student)

    def is_of(student: str) -> Callable[..., bool]:
        return lambda sandbox, *_: (sandbox._submission / "who.txt").read_text() == student

    def holds(student: str) -> Callable[..., bool]:
        return lambda folder: (folder / "who.txt").is_file() and (folder / "who.txt").read_text() == student

    removed = SandboxProcess.close

    def close_badly(sandbox):
        if is_of("clean-up")(sandbox):
            with monkeypatch.context() as patched:
                patched.setattr(sandbox_process, "remove", _fails)
                return removed(sandbox)
        return removed(sandbox)

    def too_deep(*_):
        return too_deep()

    monkeypatch.setattr(SandboxProcess, "close", close_badly)
    _throw_in(monkeypatch, intake, "read", lambda place, *_: place.parent.name == "take-in")
    _throw_in(monkeypatch, grade._Run, "sanitized", lambda run, student, *_: student == "sanitize")
    _throw_in(monkeypatch, SandboxProcess, "start", is_of("start"))
    _throw_in(monkeypatch, SandboxProcess, "start_kernel", is_of("kernel"))
    _throw_in(monkeypatch, StudentKernel, "execute", lambda kernel, *_: is_of("execute")(kernel._sandbox))
    _throw_in(monkeypatch, SandboxProcess, "call", is_of("call"))
    _throw_in(monkeypatch, grade._Run, "autograde", lambda run, student: student == "mark")
    _throw_in(monkeypatch, grade, "remove", holds("sweep"))
    marked = grade._Run.autograde
    monkeypatch.setattr(grade._Run, "autograde", lambda *given: too_deep() if given[-1] == "deep" else marked(*given))
    with LocalCluster(processes=False, n_workers=1, threads_per_worker=1, dashboard_address=None, memory_limit=0) as cluster:
        found = grade.grade(UNIT, Settings(root=tmp_path, scheduler=cluster.scheduler_address))
    records = {record.student: record for record in found}
    for student, line in STEPS.items():
        assert records[student].status == FAILED and line in records[student].reason, records[student]
        assert "thrown in" in records[student].reason or "RecursionError" in records[student].reason
    for student in ("first", "zlast", "clean-up", "sweep"):
        assert records[student].status == MARKED, records[student].reason
        assert {check: classroom.mark(student).scores[check] for check in POINTS} == POINTS
    for student in ("clean-up", "sweep"):
        assert any("could not be removed" in note for note in records[student].notes)
    assert "| take-in | failed |" in (tmp_path / "report" / f"{UNIT}.md").read_text()


def test_what_does_not_end_is_left_alone():
    with pytest.raises(TimeoutError, match="did not end within"):
        grade._within(0.05, lambda: __import__("time").sleep(1))
    with pytest.raises(ZeroDivisionError):
        grade._within(5, _fails)
