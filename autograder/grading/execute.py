"""How a submission is executed: its cells in a kernel of its own, graded cells here, with proxies for the student's answers.

    a cell of the student's      runs in the student's kernel, for its outputs to be seen: no mark depends on them
    a locked, ungraded cell      (set-up) runs there, here, and where the answers are called
    a graded check               runs here only; what it calls `merge` sends tensors to the student's `merge` and back
    a cell tagged `experiment`   does not run: it takes minutes, and no mark depends on it

The student's `merge` is called in a sandbox where nothing else of the notebook has run (`autograder.sandbox.process`): of the
cells above the check only what `merge` needs (`autograder.sandbox.needed`). If it raises an error there, perhaps for want of
something that was not found to be needed, the check is made once more where all of the cells above it have run.

The names of the answers come from the master, never from the submission. What comes out is a plain list of outputs, so a
submission may be executed on any machine that has the masters, and be marked elsewhere.
"""

import ast
import contextlib
import gc
import hashlib
import inspect
import io
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path

import nbformat
import torch
from nbformat import NotebookNode
from nbformat.v4 import new_output
from nbgrader import utils
from nbgrader.preprocessors import NbGraderPreprocessor
from traitlets import Bool, Unicode

from autograder.checking.drive import travelling
from autograder.checking.failure import CheckFailedError
from autograder.checking.masters import SOLUTIONS, answer_names, exercises_of
from autograder.sandbox.calls import Answer, Calls
from autograder.sandbox.enclosure import Limits, require_sandbox
from autograder.sandbox.kernel import StudentKernel
from autograder.sandbox.needed import needed
from autograder.sandbox.process import BAGGAGE_BYTES, SandboxProcess
from autograder.sandbox.watch import StoppedError

PRINTED_CHARACTERS = 2000
COMPILER_USERS = ("optim", "DispatchMode", "Tracker")
"""What imports PyTorch's compiler when it is first used, which takes seconds and 70 MiB."""
ROOMS = ("checking", "sandbox", "grading")
NO_PART_IN_MARKS = ("report.py",)
DENIED = ("Read-only file system", "Network is unreachable", "Temporary failure in name resolution", "Permission denied")


@dataclass
class Execution:
    """What executing a submission gave.

    Attributes:
        outputs: a list of outputs by cell, None for a cell that was not executed.
        events: sentences on what an instructor might want to look at.
        seconds: of the clock, by stage.
        cpu_seconds, peak_bytes: used by all processes of the submission.
    """

    outputs: list[list[dict] | None]
    events: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    cpu_seconds: float = 0.0
    peak_bytes: int = 0

    def put_into(self, notebook: NotebookNode) -> None:
        """Give the notebook's cells their outputs.

        Raises:
            ValueError: if it is not the notebook that was executed.
        """
        if len(self.outputs) != len(notebook.cells):
            raise ValueError("these outputs are another notebook's")
        count = 0
        for cell, outputs in zip(notebook.cells, self.outputs, strict=True):
            if cell.cell_type == "code":
                count += outputs is not None
                cell.outputs = nbformat.from_dict(outputs or [])
                cell.execution_count = count if outputs is not None else None


def execute(
    notebook: NotebookNode,
    unit: str,
    *,
    submission: Path | None = None,
    limits: Limits | None = None,
    sandboxed: bool = True,
) -> Execution:
    """Execute a repaired notebook (see `autograder.grading.sanitize`).

    Args:
        submission: a folder with the files that were handed in.

    Raises:
        SandboxMissingError: if no sandbox can be had and one is wanted.
        Exception: whatever the grader's own code raised: then there is no mark, neither a good one nor a bad one.
    """
    if sandboxed:
        _require_sandbox_once()
    _leave_modules_alone()
    setup = [cell.source for cell in notebook.cells if utils.is_locked(cell) and not utils.is_grade(cell)]
    with contextlib.closing(_Executor(unit, setup, submission, limits or Limits(), sandboxed)) as executor:
        return executor.execute(notebook)


_require_sandbox_once = cache(require_sandbox)


@cache
def _leave_modules_alone() -> None:
    """Have the garbage collector look no more at what has been imported: checks of memory call it, and it takes a second."""
    gc.collect()
    gc.freeze()


class UndecidedError(RuntimeError):
    """What a check measured may be right or forged: a person has to look. The message is a sentence that says why."""


class _Executor:
    """Executes one notebook: holds its sandbox, the kernel in there, and the names that graded cells see."""

    def __init__(self, unit: str, setup: list[str], submission: Path | None, limits: Limits, sandboxed: bool):
        self._limits, self._names = limits, answer_names(unit)
        self._sandbox = SandboxProcess(setup, _imported(unit), submission, limits, sandboxed)
        self._student = StudentKernel(self._sandbox)
        self._here: dict[str, object] = {"__name__": "__main__"}
        self._ran: list[str] = []
        self._events: list[str] = []
        self._seconds: dict[str, float] = {}
        self._began = time.monotonic()

    def close(self) -> None:
        self._student.close()
        self._sandbox.close()

    def execute(self, notebook: NotebookNode) -> Execution:
        outputs: list[list[dict] | None] = []
        checks: list[tuple[int, NotebookNode, list[str]]] = []
        for cell in notebook.cells:
            outputs.append(None)
            if cell.cell_type != "code" or ("experiment" in cell.metadata.get("tags", []) and not utils.is_grade(cell)):
                continue
            if utils.is_grade(cell) and utils.is_locked(cell):
                checks.append((len(outputs) - 1, cell, list(self._ran)))
                continue
            if utils.is_locked(cell):
                with self._timed("set-up here"):
                    exec(compile(cell.source, "<set-up cell>", "exec"), self._here)
            outputs[-1] = self._run(cell)
        if self._student.running and self._student.left_running():
            self._events.append("left processes running, which were killed")
        with self._timed("stopping the kernel"):
            self._student.close()
            self._sandbox.answers()
        for place, cell, ran in checks:
            outputs[place] = self._check(cell, ran)
        with self._timed("stopping the sandbox"):
            self._sandbox.close()
        self._events += self._sandbox.left_behind[:1]
        return Execution(outputs, self._events, self._seconds, self._sandbox.watch.cpu_seconds, self._sandbox.watch.peak_bytes)

    @contextlib.contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        start = time.monotonic()
        try:
            yield
        finally:
            self._seconds[stage] = self._seconds.get(stage, 0.0) + time.monotonic() - start

    def _kernel(self) -> StudentKernel:
        """Return the student's kernel, started (again) if need be, with all that has run so far run again."""
        self._stop_if_used_up()
        if self._student.running:
            return self._student
        self._running_sandbox()
        with self._timed("starting the kernel"):
            self._student.start()
        for source in list(self._ran):
            self._stop_if_used_up()
            try:
                self._student.execute(source)
            except StoppedError:  # it did not stop the process the first time; one more try without it
                self._ran.remove(source)
                return self._kernel()
        return self._student

    def _stop_if_used_up(self) -> None:
        if self._sandbox.watch.cpu_seconds > self._limits.total_cpu_seconds:
            raise StoppedError(f"the notebook has used up its {self._limits.total_cpu_seconds:g} s of processor time")
        if time.monotonic() - self._began > self._limits.total_wall_seconds:
            raise StoppedError(f"the notebook has used up its {self._limits.total_wall_seconds:g} s")

    def _run(self, cell: NotebookNode) -> list[dict]:
        """Run a cell in the student's kernel."""
        stage = "set-up there" if utils.is_locked(cell) else "the student's cells"
        try:
            kernel = self._kernel()
            with self._timed(stage):
                outputs = kernel.execute(cell.source)
        except StoppedError as stopped:
            self._events.append(f"{_name(cell)} was stopped: {stopped}")
            return [_error("Stopped", [f"This cell was stopped: {stopped}."])]
        if not utils.is_locked(cell):
            self._ran.append(cell.source)
        self._note_denials(cell, outputs)
        return outputs

    def _check(self, cell: NotebookNode, ran: list[str]) -> list[dict]:
        """Run a graded cell here; a failed check ends in one error, which says what is wrong and nothing of the grader."""
        used = [name for name in self._names if name in _names_in(cell.source)]
        with self._timed("graded cells"):
            attempt = self._attempt(cell, Calls(self._running_sandbox, needed(ran, used, self._here)))
            if attempt.failed is not None and attempt.calls.raised:
                again = self._attempt(cell, Calls(self._running_sandbox, [{"source": source} for source in ran], again=True))
                attempt = again if again.failed is None else attempt
        calls = attempt.calls
        if calls.stopped is not None:
            self._events.append(f"{_name(cell)}: the code that it calls was stopped: {calls.stopped}")
        if attempt.failed is None and calls.baggage > BAGGAGE_BYTES:
            raise UndecidedError(
                f"{_name(cell)} passes by measured memory, but {calls.baggage / 2**20:.0f} MiB were held before the call and "
                "may have been given up in it; see what the student's cells keep, and give the points by hand"
            )
        text = "".join(calls.printed)
        if len(text) > PRINTED_CHARACTERS:
            text = text[:PRINTED_CHARACTERS] + "\n[...]\n"
        outputs = [new_output("stream", name="stdout", text=text + attempt.said)] if text or attempt.said else []
        if attempt.failed is not None:
            outputs.append(_error("CheckFailedError", attempt.failed.lines()))
        return outputs

    def _attempt(self, cell: NotebookNode, calls: "Calls") -> "_Attempt":
        said, failed = io.StringIO(), None
        answers = {name: Answer(name, calls) for name in self._names}
        try:
            torch.seed()
            with contextlib.redirect_stdout(said):
                exec(compile(cell.source, "<graded cell>", "exec"), self._here | answers)
        except CheckFailedError as error:
            failed = error
        if calls.trouble is not None:
            raise calls.trouble
        return _Attempt(calls, said.getvalue(), failed)

    def _running_sandbox(self) -> SandboxProcess:
        """Return the sandbox, started (again) if need be."""
        self._stop_if_used_up()
        if not self._sandbox.running:
            with self._timed("starting the sandbox"):
                self._sandbox.start()
        return self._sandbox

    def _note_denials(self, cell: NotebookNode, outputs: list[NotebookNode]) -> None:
        for output in outputs:
            if output.output_type == "error":
                tried = next((denied for denied in DENIED if denied in output.evalue), None)
                if tried:
                    self._events.append(f"{_name(cell)} tried what the sandbox denies ({tried})")


@dataclass(frozen=True)
class _Attempt:
    """An attempt at a check: its calls, what the check printed, and how it failed, if it did."""

    calls: Calls
    said: str
    failed: CheckFailedError | None


def _names_in(source: str) -> set[str]:
    return {node.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)}


@cache
def _imported(unit: str) -> list[str]:
    """Return modules that take long to import, and that kernels or the unit's drivers do on first use: see `COMPILER_USERS`."""
    sources = [travelling(each.driver, each.helpers) for each in exercises_of(unit)]
    uses_compiler = any(user in source for source in sources for user in COMPILER_USERS)
    return ["ipykernel.kernelapp", *(["torch._dynamo"] if uses_compiler else [])]


def _name(cell: NotebookNode) -> str:
    identity = cell.metadata.get("nbgrader", {}).get("grade_id") or cell.get("id", "?")
    return f"cell {identity}"


def _error(name: str, lines: list[str]) -> NotebookNode:
    return new_output("error", ename=name, evalue="\n".join(lines), traceback=lines)


class ExecuteInSandbox(NbGraderPreprocessor):
    """Takes the place of nbgrader's `Execute` in autograding.

    `python -m autograder.grading.grade` executes beforehand, perhaps on another machine; then the outputs are only put in.
    """

    without_sandbox = Bool(False, help="run student code with the grader's own rights").tag(config=True)
    executed = Unicode("", help="the folder with the executions of this unit, by student; else execute here").tag(config=True)

    def preprocess(self, nb: NotebookNode, resources: dict) -> tuple[NotebookNode, dict]:
        """Execute the notebook, or put the outputs in that it gave before."""
        unit, student = resources["nbgrader"]["assignment"], resources["nbgrader"]["student"]
        if self.executed:
            execution = load_execution(Path(self.executed), student, execution_key(nb, unit))
            if execution is None:
                raise LookupError(f"{student}'s notebook has not been executed as it is now")
        else:
            if self.without_sandbox:
                self.log.warning("Student code runs WITHOUT a sandbox: it can read the solutions and change any mark.")
            folder = resources.get("metadata", {}).get("path")
            submission = Path(folder) if folder else None
            execution = execute(nb, unit, submission=submission, sandboxed=not self.without_sandbox)
        execution.put_into(nb)
        return nb, resources


def save_execution(folder: Path, student: str, key: str, execution: Execution) -> None:
    """Keep an execution in `folder`, whole or not at all."""
    path = folder / f"{student}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps({"key": key, "execution": asdict(execution)}))
    part.replace(path)


def load_execution(folder: Path, student: str, key: str) -> Execution | None:
    """Return the execution kept for a student if it is of the notebook that has this key."""
    try:
        kept = json.loads((folder / f"{student}.json").read_text())
        return Execution(**kept["execution"]) if kept["key"] == key else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def execution_key(notebook: NotebookNode, unit: str) -> str:
    """Return a digest of the notebook's cells and of all else that executing them depends on, but for other files."""
    digest = hashlib.sha256(unit_version(unit).encode())
    for cell in notebook.cells:
        said = [cell.cell_type, cell.source, cell.metadata.get("tags", []), cell.metadata.get("nbgrader", {})]
        digest.update(json.dumps(said, sort_keys=True).encode())
    return digest.hexdigest()


@cache
def unit_version(unit: str) -> str:
    """Return a digest of what a mark depends on apart from the submission: grader, checks, `peftlab`, master, limits, torch."""
    import peftlab

    rooms = [Path(__file__).parents[1] / room for room in ROOMS]
    files = [path for room in rooms for path in room.rglob("*.py") if path.name not in NO_PART_IN_MARKS]
    files += Path(peftlab.__file__).parent.rglob("*.py")
    files += (SOLUTIONS / unit).glob("*.py")
    packages = {Path(inspect.getfile(exercise.driver)).parent for exercise in exercises_of(unit)}
    files += [path for package in packages for path in package.glob("*.py")]
    digest = hashlib.sha256(f"{torch.__version__} {Limits()}".encode())
    for path in sorted(files):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()
