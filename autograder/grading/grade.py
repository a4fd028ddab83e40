"""Grade a whole class: execute the submissions on all cores, or on a Dask cluster, and have nbgrader mark them.

    python -m autograder.grading.grade 08_lora                    grade what is new or has changed
    python -m autograder.grading.grade                            the same for every unit
    python -m autograder.grading.grade --scheduler tcp://...      on a cluster that is there; every worker needs the project

It may be stopped at any time and started again. Executions are kept as they come in, below `grading/`; only this process
writes to the gradebook, and it marks through nbgrader's own `autograde`. A submission that cannot be graded loses its old
mark and gets a line in the report, and costs no one else anything.
"""

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import re
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path

import dask
import nbformat
from distributed import Client, LocalCluster, as_completed
from nbconvert.exporters.exporter import ResourcesDict
from nbformat import NotebookNode
from nbgrader.api import Gradebook, MissingEntry
from nbgrader.apps import NbGraderAPI
from nbgrader.converters import Autograde
from nbgrader.coursedir import CourseDirectory
from nbgrader.utils import capture_log, temp_attrs
from sqlalchemy.exc import SAWarning
from tqdm import tqdm
from traitlets.config.loader import Config

from autograder.building.build import ROOT, course_config
from autograder.checking.masters import units
from autograder.grading import intake, report
from autograder.grading.execute import (
    Execution,
    execute,
    execution_key,
    load_execution,
    save_execution,
    unit_version,
)
from autograder.grading.intake import Submission, UnusableError, write_files
from autograder.grading.records import FAILED, MARKED, UNUSABLE, Record
from autograder.grading.sanitize import answered, released_of
from autograder.sandbox.enclosure import Limits, SandboxMissingError, remove, require_sandbox
from autograder.sandbox.plain import whole

MARGIN_SECONDS = 900
"""For starting kernels, and for what the checks themselves compute."""


@dataclass
class Settings:
    """How to grade: where the course lies, on which cluster, and how student code is held."""

    root: Path = ROOT
    scheduler: str | None = None
    workers: int = os.cpu_count() or 1
    again: bool = False
    sandboxed: bool = True
    limits: Limits = field(default_factory=Limits)


def grade(unit: str, settings: Settings) -> list[Record]:
    """Grade every submission of a unit that has not been graded as it is now; return the records of all.

    Raises:
        SandboxMissingError: if no sandbox can be had and one is wanted.
        LookupError: if the gradebook does not know the unit.
        BlockingIOError: if another process is grading this course.
    """
    if settings.sandboxed and settings.scheduler is None:
        require_sandbox()
    with _only_one(settings.root):
        run = _Run(unit, settings)
        records, open_ones = run.read_submissions()
        if open_ones:
            with _cluster(settings) as client:
                for record in run.execute_and_mark(client, open_ones):
                    records[record.student] = record
        done = [records[student] for student in sorted(records)]
        report.write(unit, done, settings.root)
    return done


class _Run:
    def __init__(self, unit: str, settings: Settings):
        self.unit, self.settings = unit, settings
        self.folder = settings.root / "grading" / unit
        self.executed, self.staged = self.folder / "executed", self.folder / "staged"
        self.version = unit_version(unit)
        self.config = course_config(settings.root)
        self.config.ExecuteInSandbox.executed = str(self.executed)
        self.config.CourseDirectory.submitted_directory = str(self.staged)
        self.api = NbGraderAPI(CourseDirectory(config=self.config), config=self.config)
        self.db_url = self.api.coursedir.db_url
        with Gradebook(self.db_url) as gradebook:
            try:
                gradebook.find_notebook(unit, unit)
            except MissingEntry:
                raise LookupError(f"the gradebook does not know {unit}: run `make build UNIT={unit}` first") from None
            self.due = _terms(gradebook.find_assignment(unit).duedate, self.config)
        self.released = released_of(self.db_url, unit, unit)

    def read_submissions(self) -> tuple[dict[str, Record], dict[str, Submission]]:
        """Read every submission; return the records of those that are done with, and those that are to be graded."""
        records, open_ones = {}, {}
        for student, place in intake.students(self.settings.root / "submitted", self.unit):
            try:
                problem = intake.name_problem(student)
                if problem:
                    records[student] = self._keep(Record(student, version=self.version, status=UNUSABLE, reason=problem))
                    continue
                submission = intake.read(place, self.unit, self.answers)
                known = self._known(student, submission)
                if known is not None:
                    records[student] = known
                else:
                    self.withdraw_marks(student)
                    open_ones[student] = submission
            except UnusableError as error:
                records[student] = self._unusable(student, Submission(NotebookNode()), str(error))
            except Exception as error:
                reason = f"it could not be read ({_described(error)})"
                records[student] = self._failed(student, Submission(NotebookNode()), reason)
        return records, open_ones

    def answers(self, notebook: NotebookNode) -> int:
        """Return how many of the unit's answers have been changed in a notebook."""
        return answered(notebook.cells, self.released)

    def _known(self, student: str, submission: Submission) -> Record | None:
        """Return the record of a submission that was marked as it is now, or else forget what was kept of the student.

        If only the date has changed on which it was due, it is marked again, and not executed again.
        """
        known = self._load(student)
        same = known is not None and (known.submission, known.version) == (submission.digest, self.version)
        if same and known.status == MARKED and known.due == self.due and not self.settings.again:
            return known
        if not same or self.settings.again:
            self._record_path(student).unlink(missing_ok=True)
            (self.executed / f"{student}.json").unlink(missing_ok=True)
        return None

    def execute_and_mark(self, client: Client, open_ones: dict[str, Submission]) -> Iterator[Record]:
        """Execute all that has not been executed, wherever there is a free worker, and mark each as it comes in."""
        bar = tqdm(total=len(open_ones), desc=f"grading {self.unit}", unit="submission", disable=None)
        running, ready = {}, []
        for student, submission in open_ones.items():
            try:
                notebook = self.sanitized(student, submission)
                key = execution_key(notebook, self.unit)
                if load_execution(self.executed, student, key) is not None:
                    ready.append(student)
                    continue
                future = client.submit(
                    _execute_there,
                    nbformat.writes(notebook),
                    submission.files,
                    self.unit,
                    self.version,
                    self.settings.limits,
                    self.settings.sandboxed,
                    pure=False,
                )
            except UnusableError as error:
                bar.update()
                yield self._unusable(student, submission, str(error))
                continue
            except Exception as error:
                bar.update()
                yield self._failed(student, submission, f"it could not be put into the released form ({_described(error)})")
                continue
            running[future] = (student, key)
        for student in ready:
            yield self._mark(student, open_ones[student])
            bar.update()
        for future in as_completed(running):
            student, key = running[future]
            try:
                save_execution(self.executed, student, key, future.result())
            except Exception as error:
                yield self._failed(student, open_ones[student], f"executing it failed ({_described(error)})")
            else:
                yield self._mark(student, open_ones[student])
            future.release()
            bar.update()
        bar.close()

    def sanitized(self, student: str, submission: Submission) -> NotebookNode:
        """Return the notebook as nbgrader's own sanitizing leaves it."""
        names = {"student": student, "assignment": self.unit, "notebook": self.unit, "db_url": self.db_url}
        notebook, resources = nbformat.from_dict(submission.notebook), ResourcesDict(nbgrader=names, metadata={})
        for step in self.config.Autograde.sanitize_preprocessors:
            notebook, resources = step(config=self.config)(notebook, resources)
        return notebook

    def withdraw_marks(self, student: str) -> None:
        """Take an earlier mark back: it is not this submission's. What a person gave stays, flagged for review."""
        with Gradebook(self.db_url) as gradebook:
            try:
                submission = gradebook.find_submission(self.unit, student)
            except MissingEntry:
                return
            for notebook in submission.notebooks:
                for mark in notebook.grades:
                    mark.auto_score, mark.needs_manual_grade = None, True
            gradebook.db.commit()

    def autograde(self, student: str) -> dict:
        """Run nbgrader's `autograde` on what is staged of a student; return whether it succeeded, and its log."""
        with temp_attrs(self.api.coursedir, assignment_id=self.unit, student_id=student):
            step = Autograde(coursedir=self.api.coursedir, parent=self.api)
            step.force = True
            return capture_log(step)

    def _mark(self, student: str, submission: Submission) -> Record:
        """Have nbgrader mark an executed submission."""
        try:
            return self._marked(student, submission)
        except (Exception, SystemExit) as error:  # nbgrader's programs end by the latter
            return self._failed(student, submission, f"it could not be marked ({_described(error)})")

    def _marked(self, student: str, submission: Submission) -> Record:
        start = time.monotonic()
        place = self.staged / student
        remove(place)
        try:
            submission.write(place / self.unit, self.unit)
            outcome = self.autograde(student)
        finally:
            remove(place)
        if not outcome["success"]:
            return self._failed(student, submission, f"nbgrader could not mark it: {_reason(outcome)}")
        execution = json.loads((self.executed / f"{student}.json").read_text())["execution"]
        marked = nbformat.read(self.settings.root / "autograded" / student / self.unit / f"{self.unit}.ipynb", as_version=4)
        return self._keep(
            Record(
                student=student,
                submission=submission.digest,
                version=self.version,
                due=self.due,
                status=MARKED,
                notes=[*submission.notes, *marked.metadata.get("repairs", []), *execution["events"]],
                mistakes=dict(_failed_checks(marked)),
                seconds=execution["seconds"] | {"marking": time.monotonic() - start},
                cpu_seconds=execution["cpu_seconds"],
                peak_bytes=execution["peak_bytes"],
            )
        )

    def _unusable(self, student: str, submission: Submission, reason: str) -> Record:
        return self._without_a_mark(student, submission, UNUSABLE, reason)

    def _failed(self, student: str, submission: Submission, reason: str) -> Record:
        return self._without_a_mark(student, submission, FAILED, reason)

    def _without_a_mark(self, student: str, submission: Submission, status: str, reason: str) -> Record:
        """Keep the record of a submission that got no mark, and take an earlier mark back."""
        record = Record(student, submission.digest, self.version, self.due, status, reason, submission.notes)
        try:
            self.withdraw_marks(record.student)
        except Exception as error:
            record.reason += f"; and an earlier mark could not be taken back ({_described(error)})"
        return self._keep(record)

    def _record_path(self, student: str) -> Path:
        if intake.name_problem(student):
            student = f"{intake.printable(student, 20)} {hashlib.sha256(student.encode()).hexdigest()[:8]}"
        return self.folder / "records" / f"{student}.json"

    def _keep(self, record: Record) -> Record:
        """Write a record down. If that fails it still stands in this run's report, and the next run grades once more."""
        record.reason = intake.printable(record.reason)
        record.notes = [intake.printable(note) for note in record.notes]
        record.mistakes = {cell: whole(text) for cell, text in record.mistakes.items()}
        path = self._record_path(record.student)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(".part")
            part.write_text(json.dumps(asdict(record), indent=1))
            part.replace(path)
        except OSError as error:
            record.notes.append(f"its record could not be kept ({_described(error)})")
        return record

    def _load(self, student: str) -> Record | None:
        try:
            return Record(**json.loads(self._record_path(student).read_text()))
        except (OSError, ValueError, TypeError):
            return None


def _execute_there(
    notebook: str, files: dict[str, bytes], unit: str, version: str, limits: Limits, sandboxed: bool
) -> Execution:
    """Execute a submission on a worker."""
    if unit_version(unit) != version:
        raise RuntimeError("this worker has another version of the project or of torch than the machine that grades")
    folder, events = Path(tempfile.mkdtemp(prefix="submission-")), []
    try:
        write_files(files, folder)
        nodes = nbformat.reads(notebook, as_version=4)
        seconds = limits.total_wall_seconds + limits.wall_seconds + MARGIN_SECONDS
        execution = _within(seconds, lambda: execute(nodes, unit, submission=folder, limits=limits, sandboxed=sandboxed))
    finally:
        events += _swept(folder)
    execution.events += events
    return execution


def _swept(folder: Path) -> list[str]:
    """Remove a folder that a submission lay in; return what there is to say if that fails, which costs nobody a mark."""
    try:
        problem = remove(folder)
    except Exception as error:
        problem = _described(error)
    return [f"its files could not be removed: {problem}"] if problem else []


def _within(seconds: float, work: Callable[[], Execution]) -> Execution:
    """Return what `work` returns, unless it takes longer: then it is left alone, so that the others go on.

    Raises:
        TimeoutError: if it does. Every cell has its own limit; this one is for what nobody has thought of.
    """
    done: list[Execution | BaseException] = []

    def run() -> None:
        try:
            done.append(work())
        except BaseException as error:  # told to who waits
            done.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if not done:
        raise TimeoutError(f"it did not end within {seconds:g} s")
    if isinstance(done[0], BaseException):
        raise done[0]
    return done[0]


def _terms(due: datetime | None, config: Config) -> str:
    """Return when a unit is due and how lateness is judged, as text; empty where nothing of it has been set."""
    policy = {
        name: value for name, value in config.items() if name in ("AssignLatePenalties", "LateSubmissionPlugin") and value
    }
    return f"{due or ''}{policy or ''}"


def _failed_checks(notebook: NotebookNode) -> Iterator[tuple[str, str]]:
    for cell in notebook.cells:
        marks = cell.metadata.get("nbgrader", {})
        for output in cell.get("outputs", []):
            if marks.get("grade") and marks.get("locked") and output.output_type == "error":
                yield marks["grade_id"], "\n".join(output.traceback[1:])


def _reason(outcome: dict) -> str:
    """Return the line of nbgrader's log that says why it stopped."""
    lines = [line.strip() for line in outcome.get("log", "").splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Warning|Interrupt)\b", line)]
    return (errors or lines or ["it did not say why"])[-1]


def _described(error: BaseException) -> str:
    first_line = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {first_line[:300]}"


@contextlib.contextmanager
def _only_one(root: Path) -> Iterator[None]:
    """Keep a second grading of the same course out: one writer to the gradebook."""
    (root / "grading").mkdir(exist_ok=True)
    with open(root / "grading" / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError("this course is being graded already, by another process") from None
        yield


@contextlib.contextmanager
def _cluster(settings: Settings) -> Iterator[Client]:
    """Yield a client of the cluster that was named, or of one on this machine: a process a core, a submission at a time."""
    if settings.scheduler is not None:
        with Client(settings.scheduler, timeout=30) as client:
            yield client
        return
    quiet = {"distributed.scheduler.allowed-failures": 2, "distributed.comm.timeouts.connect": "120s"}
    # A worker checks with torch: one thread each, or they wait for each other.
    alone = {"OMP_NUM_THREADS": "1"}
    with (
        dask.config.set({**quiet, "distributed.nanny.pre-spawn-environ": alone}),
        LocalCluster(
            n_workers=settings.workers,
            threads_per_worker=1,
            dashboard_address="127.0.0.1:0",
            memory_limit=0,
            silence_logs="ERROR",
            host="127.0.0.1",
        ) as cluster,
        Client(cluster) as client,
    ):
        yield client


def main(arguments: list[str] | None = None) -> int:
    """Run the command line described in this module's docstring; return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m autograder.grading.grade", description="Grade submissions.")
    parser.add_argument("units", nargs="*", metavar="UNIT", help="such as 08_lora; default: all")
    parser.add_argument("--root", type=Path, default=ROOT, help="the folder with submitted/ and gradebook.db")
    parser.add_argument("--scheduler", metavar="ADDRESS", help="a Dask scheduler; default: workers on this machine")
    parser.add_argument("--workers", type=int, default=Settings.workers, help="how many on this machine; default: a core each")
    parser.add_argument("--again", action="store_true", help="grade again what has been graded already")
    parser.add_argument("--without-sandbox", action="store_true", help="student code gets your rights: only if you trust it")
    options = parser.parse_args(arguments)
    for name in options.units:
        if name not in units():
            parser.error(f"there is no unit {name!r}; there are {', '.join(units())}")
    settings = Settings(options.root.resolve(), options.scheduler, options.workers, options.again, not options.without_sandbox)
    if options.without_sandbox:
        print("WARNING: student code runs WITHOUT a sandbox. It can read the solutions and change any mark.", file=sys.stderr)
    # nbgrader's own objects warn about their order of construction, once a submission: nothing that an instructor can mend.
    warnings.filterwarnings("ignore", category=SAWarning)
    failed, submitted = 0, settings.root / "submitted"
    strangers = intake.unknown(submitted, units())
    if strangers:
        print(
            f"{submitted} holds {len(strangers)} entries in which no unit is, as STUDENT/UNIT/, STUDENT/UNIT.zip or "
            f"STUDENT/UNIT.ipynb: {', '.join(strangers[:10])}{', ...' if len(strangers) > 10 else ''}",
            intake.layout(strangers),
            sep="\n",
            file=sys.stderr,
        )
    try:
        names = options.units or _with_submissions(settings.root)
        if not names:
            print(f"There are no submissions in {submitted}.")
        for unit in names:
            records = grade(unit, settings)
            failed += sum(record.status == FAILED for record in records)
            print(report.summary(unit, records, settings.root))
    except (SandboxMissingError, LookupError, BlockingIOError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nStopped. What has been graded is kept: the same command goes on from here.", file=sys.stderr)
        return 130
    return 1 if failed else 0


def _with_submissions(root: Path) -> list[str]:
    return [unit for unit in units() if any(intake.students(root / "submitted", unit))]


if __name__ == "__main__":
    sys.exit(main())
