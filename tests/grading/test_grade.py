"""Grading a class goes on whatever happens to it, and never leaves a mark that is not this submission's."""

import os
import signal
import subprocess
import sys
import time

import pytest
from distributed import LocalCluster
from nbgrader.api import Gradebook

from attacks import MERGE, SOLUTION, UNIT, WRONG_MERGE
from autograder.building.build import ROOT
from autograder.grading import grade
from autograder.grading.grade import FAILED, MARKED, Settings
from autograder.sandbox import enclosure as sandbox
from classroom import Classroom
from test_autograde import POINTS

needs_sandbox = pytest.mark.skipif(sandbox.sandbox_problem() is not None, reason=f"no sandbox: {sandbox.sandbox_problem()}")
FULL = sum(POINTS.values())
pytestmark = pytest.mark.xdist_group("grade")  # one cluster for all


@pytest.fixture(scope="module")
def cluster():
    """The address of a cluster with one worker."""
    with LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=None, memory_limit=0) as cluster:
        yield cluster.scheduler_address


@pytest.fixture
def classroom(tmp_path) -> Classroom:
    return Classroom(tmp_path, UNIT)


def submit(classroom: Classroom, **answers: dict[str, str]) -> None:
    for student, answer in answers.items():
        classroom.submit(student, classroom.answers_alone(SOLUTION | answer))


def total(classroom: Classroom, student: str) -> float:
    return sum(classroom.mark(student).scores[check] or 0 for check in POINTS)


def run(classroom: Classroom, **settings: object) -> dict[str, grade.Record]:
    return {record.student: record for record in grade.grade(UNIT, Settings(root=classroom.root, **settings))}


@needs_sandbox
def test_killed_and_started_again(classroom):
    submit(classroom, right={}, wrong={"merge": WRONG_MERGE}, third={}, fourth={"merge": MERGE + "\n"})
    command = [sys.executable, "-m", "autograder.grading.grade", UNIT, "--root", str(classroom.root), "--workers", "1"]
    records = classroom.root / "grading" / UNIT / "records"
    first = subprocess.Popen(command, cwd=ROOT, start_new_session=True, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not list(records.glob("*.json")) and time.monotonic() < deadline:
        time.sleep(0.1)
    first.send_signal(signal.SIGKILL)
    first.wait()
    kept = {path: path.stat().st_mtime_ns for path in records.glob("*.json")}
    assert 1 <= len(kept) < 4
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert {student: total(classroom, student) for student in ("right", "wrong", "third", "fourth")} == {
        "right": FULL,
        "wrong": FULL - 2,
        "third": FULL,
        "fourth": FULL,
    }
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in kept.items())


@needs_sandbox
def test_a_cluster_that_is_there_is_used(classroom, cluster):
    submit(classroom, right={})
    assert run(classroom, scheduler=cluster)["right"].status == MARKED
    assert total(classroom, "right") == FULL


def test_a_due_date_that_is_moved_counts_and_nothing_is_executed_again(classroom, cluster, monkeypatch):
    plain = grade.course_config

    def with_a_penalty(root):
        config = plain(root)
        config.LateSubmissionPlugin.penalty_method = "zero"
        return config

    monkeypatch.setattr(grade, "course_config", with_a_penalty)
    submit(classroom, late={})
    (classroom.root / "submitted" / "late" / UNIT / "timestamp.txt").write_text("2026-11-20 12:00:00 UTC")
    penalties, executed = [], set()
    for due in ("2026-11-10 12:00:00", "2026-11-30 12:00:00"):
        with Gradebook(f"sqlite:///{classroom.root / 'gradebook.db'}") as gradebook:
            gradebook.update_or_create_assignment(UNIT, duedate=due)
        run(classroom, scheduler=cluster)
        with Gradebook(f"sqlite:///{classroom.root / 'gradebook.db'}") as gradebook:
            penalties.append(gradebook.find_submission(UNIT, "late").late_submission_penalty)
        executed.add((classroom.root / "grading" / UNIT / "executed" / "late.json").stat().st_mtime_ns)
    assert penalties == [FULL, 0]
    assert len(executed) == 1


def _dies(notebook, files, unit, version, limits, sandboxed):
    os._exit(1)


def _refuses(notebook, files, unit, version, limits, sandboxed):
    raise RuntimeError("the disk is full")


@pytest.mark.parametrize("instead", [_dies, _refuses])
def test_the_graders_own_trouble_leaves_no_mark_and_is_mended_by_the_next_run(classroom, cluster, monkeypatch, instead):
    submit(classroom, student={})
    sandboxed = sandbox.sandbox_problem() is None
    assert run(classroom, sandboxed=sandboxed, scheduler=cluster)["student"].status == MARKED
    submit(classroom, student={"merge": WRONG_MERGE})
    with monkeypatch.context() as patched:
        patched.setattr(grade, "_execute_there", instead)
        record = run(classroom, sandboxed=sandboxed, workers=1)["student"]
    assert record.status == FAILED and "executing it failed" in record.reason
    assert {classroom.mark("student").scores[check] for check in POINTS} == {None}
    assert classroom.mark("student").waiting >= POINTS.keys()
    assert run(classroom, sandboxed=sandboxed, scheduler=cluster)["student"].status == MARKED
    assert total(classroom, "student") == FULL - 2


def test_another_version_is_refused(classroom):
    with pytest.raises(RuntimeError, match="another version"):
        grade._execute_there("", {}, UNIT, "of long ago", sandbox.Limits(), True)


def test_without_a_sandbox_it_stops_and_says_what_to_do(classroom, monkeypatch, capsys):
    monkeypatch.setattr(sandbox.shutil, "which", lambda name: None)
    submit(classroom, right={})
    assert grade.main([UNIT, "--root", str(classroom.root)]) == 2
    said = capsys.readouterr().err
    assert "apt-get install bubblewrap" in said or "needs Linux" in said
    assert "--without-sandbox" in said


def test_without_a_sandbox_it_goes_on_if_told_to(classroom, capsys):
    submit(classroom, right={})
    assert grade.main([UNIT, "--root", str(classroom.root), "--without-sandbox", "--workers", "1"]) == 0
    assert "WITHOUT a sandbox" in capsys.readouterr().err
    assert total(classroom, "right") == FULL


def test_two_gradings_at_once_are_refused(classroom):
    with grade._only_one(classroom.root), pytest.raises(BlockingIOError, match="being graded already"):
        run(classroom, sandboxed=False)


def test_an_empty_class_and_an_unknown_unit(classroom, capsys):
    assert grade.main([UNIT, "--root", str(classroom.root)]) == 0
    assert "no submissions" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        grade.main(["99_nothing"])
    assert "there is no unit" in capsys.readouterr().err


def test_a_gradebook_without_the_unit(tmp_path, capsys):
    assert grade.main([UNIT, "--root", str(tmp_path), "--without-sandbox"]) == 2
    assert "make build" in capsys.readouterr().err
