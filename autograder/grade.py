"""Grade a whole class: execute the submissions on all cores, or on a Dask cluster, and have nbgrader mark them.

    python -m autograder.grade 08_lora                    grade what is new or has changed
    python -m autograder.grade                            the same for every unit
    python -m autograder.grade --scheduler tcp://...      on a cluster that is there; every worker needs the project

It may be stopped at any time and started again. Executions are kept as they come in, below `grading/`; only this process
writes to the gradebook, and it marks through nbgrader's own `autograde`. A submission that cannot be graded loses its old
mark and gets a line in the report, and costs no one else anything.
"""

import argparse
import contextlib
import fcntl
import json
import os
import shutil
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import dask
import nbformat
from distributed import Client, LocalCluster, as_completed
from nbconvert.exporters.exporter import ResourcesDict
from nbformat import NotebookNode
from nbgrader.api import Gradebook, MissingEntry
from nbgrader.apps import NbGraderAPI
from nbgrader.coursedir import CourseDirectory
from sqlalchemy.exc import SAWarning
from tqdm import tqdm

from autograder import intake, report
from autograder.build import ROOT, course_config
from autograder.execute import (
    Execution,
    execute,
    execution_key,
    load_execution,
    save_execution,
    unit_version,
)
from autograder.intake import Submission, UnusableError
from autograder.reference import units
from autograder.sandbox import Limits, SandboxMissingError, require_sandbox

MARKED, UNUSABLE, FAILED = "marked", "unusable", "failed"


@dataclass
class Record:
    """What became of a submission.

    Attributes:
        submission, version: digests of what was handed in, and of unit and grader (`execute.unit_version`).
        status: marked; unusable, by the student's doing; or failed, by the grader's, and tried again at the next run.
        line: why there is no mark.
        notes: sentences on what an instructor might want to look at.
        mistakes: what each failed check said, by the id of its cell.
        seconds: by stage.
    """

    student: str
    submission: str = ""
    version: str = ""
    status: str = FAILED
    line: str = ""
    notes: list[str] = field(default_factory=list)
    mistakes: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    cpu_seconds: float = 0.0
    peak_bytes: int = 0


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
        records, open_ones = run.sort_out()
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

    def sort_out(self) -> tuple[dict[str, Record], dict[str, Submission]]:
        """Read every submission; return the records of those that are done with, and those that are to be graded."""
        records, open_ones = {}, {}
        for student, place in intake.students(self.settings.root / "submitted", self.unit):
            try:
                submission = intake.read(place, self.unit)
            except UnusableError as error:
                self.withdraw_marks(student)
                records[student] = self._keep(Record(student, version=self.version, status=UNUSABLE, line=str(error)))
                continue
            known = self._load(student)
            same = known is not None and (known.submission, known.version) == (submission.digest, self.version)
            if same and known.status == MARKED and not self.settings.again:
                records[student] = known
                continue
            if not same or self.settings.again:
                self._record_path(student).unlink(missing_ok=True)
                (self.executed / f"{student}.json").unlink(missing_ok=True)
            self.withdraw_marks(student)
            open_ones[student] = submission
        return records, open_ones

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
            if future.status == "finished":
                save_execution(self.executed, student, key, future.result())
                yield self._mark(student, open_ones[student])
            else:
                yield self._failed(student, open_ones[student], f"executing it failed ({_described(future.exception())})")
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

    def _mark(self, student: str, submission: Submission) -> Record:
        """Have nbgrader mark an executed submission."""
        start = time.monotonic()
        place = self.staged / student
        shutil.rmtree(place, ignore_errors=True)
        try:
            submission.write(place / self.unit, self.unit)
            outcome = self.api.autograde(self.unit, student)
        finally:
            shutil.rmtree(place, ignore_errors=True)
        if not outcome["success"]:
            return self._failed(student, submission, f"nbgrader could not mark it: {outcome['log'].strip().splitlines()[-1]}")
        execution = json.loads((self.executed / f"{student}.json").read_text())["execution"]
        marked = nbformat.read(self.settings.root / "autograded" / student / self.unit / f"{self.unit}.ipynb", as_version=4)
        return self._keep(
            Record(
                student=student,
                submission=submission.digest,
                version=self.version,
                status=MARKED,
                notes=[*submission.notes, *marked.metadata.get("repairs", []), *execution["events"]],
                mistakes=dict(_failed_checks(marked)),
                seconds=execution["seconds"] | {"marking": time.monotonic() - start},
                cpu_seconds=execution["cpu_seconds"],
                peak_bytes=execution["peak_bytes"],
            )
        )

    def _failed(self, student: str, submission: Submission, line: str) -> Record:
        self.withdraw_marks(student)
        return self._keep(Record(student, submission.digest, self.version, FAILED, line, submission.notes))

    def _record_path(self, student: str) -> Path:
        return self.folder / "records" / f"{student}.json"

    def _keep(self, record: Record) -> Record:
        path = self._record_path(record.student)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text(json.dumps(asdict(record), indent=1))
        part.replace(path)
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
    with TemporaryDirectory(prefix="submission-") as folder:
        for path, content in files.items():
            (Path(folder) / path).parent.mkdir(parents=True, exist_ok=True)
            (Path(folder) / path).write_bytes(content)
        return execute(
            nbformat.reads(notebook, as_version=4), unit, submission=Path(folder), limits=limits, sandboxed=sandboxed
        )


def _failed_checks(notebook: NotebookNode) -> Iterator[tuple[str, str]]:
    for cell in notebook.cells:
        marks = cell.metadata.get("nbgrader", {})
        for output in cell.get("outputs", []):
            if marks.get("grade") and marks.get("locked") and output.output_type == "error":
                yield marks["grade_id"], "\n".join(output.traceback[1:])


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
    parser = argparse.ArgumentParser(prog="python -m autograder.grade", description="Grade submissions.")
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
    failed = 0
    try:
        for unit in options.units or _with_submissions(settings.root):
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
