"""The kernel that a submission lives in, and its answers as the checks see them from outside.

Nothing that comes out of it is trusted: outputs are data to be shown, and what a driver returns is read without running
anything (`autograder.drive.read_reply`). It is stopped from outside when it uses more than it may.
"""

import base64
import contextlib
import inspect
import io
import queue
import signal
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import nbformat
import psutil
import torch
import zmq
from jupyter_client import KernelManager
from nbformat import NotebookNode
from nbformat.v4 import new_output

from autograder import intake, remote_call
from autograder.drive import RemoteAnswer, StudentError, describe_error
from autograder.sandbox import Limits, StudentKernels, remove, sandboxed

REPLY = "application/x-observation"
START_SECONDS = 300
MESSAGE_BYTES = 256 * 2**20
LOOK_EVERY = 0.25
SHORT = 2000
"""Characters that are left of a part of an error that is too long."""
EXPANDED = 4
"""How many times as large as it may be sent a reply may be for whoever goes through it."""
REPLY_NESTED, REPLY_PARTS = 50, 1_000_000


class StoppedError(Exception):
    """The submission's process has ended or was ended; the message is a sentence that says why."""


class StudentKernel:
    """A running kernel for one submission; close it when done.

    Args:
        submission: a folder with the files that were handed in, to be found in the kernel's working directory.
        in_sandbox: False starts an ordinary process, with the grader's own rights.

    Attributes:
        cpu_seconds, peak_bytes: what it has used so far, over all its processes and restarts.
        left_behind: sentences on what could not be removed after it.
    """

    def __init__(self, submission: Path | None, limits: Limits, in_sandbox: bool = True):
        self.limits = limits
        self.cpu_seconds, self.peak_bytes = 0.0, 0
        self.left_behind: list[str] = []
        self._cpu_of_this_start = self._resident = 0.0
        self._submission, self._sandboxed = submission, in_sandbox
        self._manager = self._client = None

    def start(self) -> None:
        """Start the kernel, and wait until it answers.

        Raises:
            RuntimeError: if it does not: the grader's trouble, not the student's.
        """
        # A socket's path may have 108 bytes: so in /tmp, whatever TMPDIR says.
        self._folder = Path(tempfile.mkdtemp(prefix="kernel-", dir="/tmp"))
        self._context = zmq.Context()
        self._context.maxmsgsize = MESSAGE_BYTES
        submission = self._submission.resolve() if self._submission else None
        enclose = partial(sandboxed, limits=self.limits, run_folder=self._folder, submission=submission)
        self._manager = KernelManager(
            context=self._context,
            transport="ipc",
            ip=str(self._folder / "socket"),
            connection_file=str(self._folder / "kernel.json"),
            kernel_spec_manager=StudentKernels(enclose if self._sandboxed else None),
            kernel_name="student",
            cache_ports=False,
        )
        self._folder.chmod(0o777)
        self._manager.start_kernel(cwd=str(self._submission) if self._submission and not self._sandboxed else None)
        self._client = self._manager.blocking_client()
        self._client.start_channels()
        try:
            self._client.wait_for_ready(timeout=START_SECONDS)
            self._execute(_PREPARING, lambda data: None, numbered=False)
        except (RuntimeError, StoppedError) as error:
            self.close()
            raise RuntimeError(f"the student's kernel did not start: {error}") from error

    def close(self) -> None:
        """Kill every process of the submission, and remove what it wrote."""
        if self._manager is None:
            return
        self._look()
        self.cpu_seconds, self._cpu_of_this_start = self.cpu_seconds + self._cpu_of_this_start, 0.0
        for process in self._processes():
            with contextlib.suppress(psutil.Error):
                process.send_signal(signal.SIGKILL)
        for step in (
            lambda: self._client.stop_channels(),
            lambda: self._manager.shutdown_kernel(now=True),
            lambda: self._context.destroy(linger=0),
        ):
            with contextlib.suppress(Exception):  # it may be dead already
                step()
        self._manager = self._client = None
        try:
            problem = remove(self._folder)
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        if problem:
            self.left_behind.append(f"what it wrote beside its sockets could not be removed: {problem}")

    @property
    def running(self) -> bool:
        """Whether it has been started and not been closed."""
        return self._manager is not None

    def process(self) -> int:
        """Return the id, as seen from here, of the process that runs the student's code."""
        process = psutil.Process(self._manager.provisioner.pid)
        while self._sandboxed and not _is_python(process):  # bwrap, its init, the kernel
            (process, *_) = process.children() or [None]
            if process is None:
                raise StoppedError("the kernel has ended")
        return process.pid

    def execute(self, code: str, show: Callable[[dict], None] = lambda data: None) -> list[NotebookNode]:
        """Execute code; return its outputs as a notebook keeps them, at most `limits.output_bytes` of them.

        Args:
            show: is called with the data of a display that carries a reply, which is no output and not subject to that limit.

        Raises:
            StoppedError: if the process ended, or used more than it may; it is closed then.
        """
        try:
            return self._execute(code, show)
        except StoppedError:
            self.close()
            raise

    def _execute(self, code: str, show: Callable[[dict], None], numbered: bool = True) -> list[NotebookNode]:
        outputs, kept = [], 0
        request = self._client.execute(code, allow_stdin=False, store_history=numbered)
        cpu_before, wall_before = self._cpu_of_this_start, time.monotonic()
        looked = wall_before
        while True:
            if time.monotonic() - looked > LOOK_EVERY:
                self._look()
                looked = time.monotonic()
                self._stop_if_too_much(self._cpu_of_this_start - cpu_before, looked - wall_before)
            kind, content = _said(self._next_message(), request)
            if kind == "status" and content.get("execution_state") == "idle":
                return outputs
            if kind == "clear_output":
                outputs.clear()
            if kind == "display_data" and isinstance(content.get("data"), dict) and REPLY in content["data"]:
                show(content["data"])
                continue
            output, size = _output(kind, content)
            if output is None:
                continue
            if kept <= self.limits.output_bytes < kept + size:
                outputs.append(new_output("stream", name="stdout", text="\n[the rest of this cell's output was dropped]\n"))
            kept += size
            if kind == "error" and kept > self.limits.output_bytes:
                outputs[:] = [output for output in outputs if output.output_type != "error"]
                output = _shortened(output)
            if kept <= self.limits.output_bytes or kind == "error":
                _append(outputs, output)

    def _next_message(self) -> dict | None:
        try:
            return self._client.get_iopub_msg(timeout=LOOK_EVERY)
        except queue.Empty:
            if not self._manager.is_alive():
                raise StoppedError("the code ended its own process") from None
            return None
        except RecursionError:  # something that is nested too deep to be shown
            return None
        except Exception as error:  # student code can send anything over this socket
            raise StoppedError(f"what came from the kernel is no Jupyter message ({type(error).__name__})") from error

    def processes_inside(self) -> list[psutil.Process]:
        """Return the student's kernel and what it started."""
        try:
            first = psutil.Process(self.process())
            return [first, *first.children(recursive=True)]
        except (psutil.Error, StoppedError):
            return []

    def _processes(self) -> list[psutil.Process]:
        try:
            first = psutil.Process(self._manager.provisioner.pid)
            return [first, *first.children(recursive=True)]
        except (psutil.Error, AttributeError, TypeError):
            return []

    def _look(self) -> None:
        """Read the processor time and the memory of all processes from outside."""
        cpu = resident = 0.0
        for process in self._processes():
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                cpu += times.user + times.system + times.children_user + times.children_system
                resident += process.memory_info().rss
        self._cpu_of_this_start = max(self._cpu_of_this_start, cpu)
        self._resident = resident
        self.peak_bytes = max(self.peak_bytes, int(resident))

    def _stop_if_too_much(self, cpu_seconds: float, wall_seconds: float) -> None:
        limits = self.limits
        if cpu_seconds > limits.cpu_seconds:
            raise StoppedError(f"it ran longer than {limits.cpu_seconds:g} s (of processor time): does a loop not end?")
        if wall_seconds > limits.wall_seconds:
            raise StoppedError(f"it did not end within {limits.wall_seconds:g} s: does it wait for something?")
        if self._resident > limits.memory_bytes:
            raise StoppedError(f"it used more than {limits.memory_bytes / 2**30:.3g} GiB of memory")


class KernelAnswer(RemoteAnswer):
    """What a student's cells define under a name.

    Args:
        kernel: returns the kernel, running.
        printed: is told what the answer printed.
        ended: is told if the answer stopped the kernel.
    """

    def __init__(
        self,
        name: str,
        kernel: Callable[[], StudentKernel],
        printed: Callable[[str], None],
        ended: Callable[[StoppedError], None],
    ):
        super().__init__(name)
        self._kernel, self._printed, self._ended = kernel, printed, ended

    def run(self, source: str, driver: str, answers: Sequence[str], arguments: bytes) -> bytes:
        """Have the driver called in the student's kernel."""
        parts = [source, driver, list(answers), base64.b64encode(arguments).decode(), REPLY]
        code = _among_names_of_its_own(f"{_CALLING}\n_call_driver(names, {', '.join(map(repr, parts))})")
        replies = []
        try:
            kernel = self._kernel()
        except StoppedError as stopped:
            raise StudentError(f"Stopped: {stopped}") from stopped
        try:
            outputs = kernel.execute(code, replies.append)
        except StoppedError as stopped:
            self._ended(stopped)
            raise StudentError(f"Stopped: {stopped}") from stopped
        self._printed("".join(output.text for output in outputs if output.output_type == "stream"))
        if not replies or not isinstance(replies[-1].get(REPLY), str):
            raise StudentError("the code sent nothing back that a check can read")
        if len(replies[-1][REPLY]) > kernel.limits.reply_bytes:
            raise StudentError(f"the code returned more than {kernel.limits.reply_bytes / 2**20:g} MiB")
        error = replies[-1].get("text/plain", "")
        if error:
            raise StudentError(str(error)[:1000])
        try:
            reply = base64.b64decode(replies[-1][REPLY], validate=True)
        except ValueError as malformed:
            raise StudentError("the code sent nothing back that a check can read") from malformed
        refuse_bombs(reply, EXPANDED * kernel.limits.reply_bytes)
        return reply

    def process(self) -> int:
        """Return the process id of the student's kernel."""
        return self._kernel().process()


def refuse_bombs(reply: bytes, expanded_bytes: int) -> None:
    """Raise an error at a reply that is small, and enormous for whoever goes through it.

    A list may stand in another one many times and is sent once, and so may the numbers of a tensor; and lists can be nested
    without end. A reply that cannot be read is the reader's business (`autograder.drive.read_reply`).

    Raises:
        StudentError: if it is such a reply.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(reply)) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > len(reply):
                return
        value = torch.load(io.BytesIO(reply), weights_only=True, map_location="cpu")
    except Exception:
        return
    waiting, parts, size = [(value, 0)], 0, 0
    while waiting:
        value, depth = waiting.pop()
        parts += 1
        if isinstance(value, dict):
            inside = [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple):
            inside = list(value)
        else:
            inside = []
            if isinstance(value, torch.Tensor):
                size += value.numel() * value.element_size()
            elif isinstance(value, str):
                size += len(value)
            elif isinstance(value, int):
                size += value.bit_length() // 8
        if depth > REPLY_NESTED or parts + len(waiting) + len(inside) > REPLY_PARTS or size > expanded_bytes:
            raise StudentError("the code returned something that is far larger, or nested far deeper, than what was asked for")
        waiting += [(item, depth + 1) for item in inside]


def _among_names_of_its_own(source: str) -> str:
    """Return code that runs `source` in the student's kernel: the student's global names are `names` there, and no others."""
    own = "_builtins_for_the_check"
    return f"import builtins as {own}\n{own}.exec({source!r}, {{'names': {own}.globals()}})\ndel {own}"


def _source(function: Callable) -> str:
    return inspect.getsource(function).replace(f"def {function.__name__}(", f"def _{function.__name__}(", 1)


# What the sandbox needs, as source: the package itself is not to be seen there.
_CALLING = "\n\n".join(map(_source, (describe_error, remote_call.call_driver)))
_PREPARING = _among_names_of_its_own(f"{_source(remote_call.prepare_kernel)}\n_prepare_kernel()")


def _said(message: dict | None, request: str) -> tuple[str, dict]:
    """Return the kind and the content of a message that answers the request; student code can send anything."""
    if not isinstance(message, dict):
        return "", {}
    parent, kind, content = message.get("parent_header"), message.get("msg_type"), message.get("content")
    if not isinstance(parent, dict) or parent.get("msg_id") != request or not isinstance(kind, str):
        return "", {}
    return kind, content if isinstance(content, dict) else {}


def _output(kind: str, content: dict) -> tuple[NotebookNode | None, int]:
    """Return a message as an output that any program can read, and its size; None if there is nothing to show."""
    if kind == "stream":
        name = "stderr" if content.get("name") == "stderr" else "stdout"
        output = {"output_type": kind, "name": name, "text": _as_text(content.get("text"))}
    elif kind in ("display_data", "execute_result"):
        data, metadata = content.get("data"), intake.bounded(content.get("metadata"))
        if not isinstance(data, dict):
            return None, 0
        shown = {intake.whole(str(mime)): _shown(str(mime), value) for mime, value in data.items()}
        output = {"output_type": kind, "data": shown, "metadata": metadata if isinstance(metadata, dict) else {}}
        if kind == "execute_result":
            count = content.get("execution_count")
            output["execution_count"] = count if type(count) is int else None
    elif kind == "error":
        lines = content.get("traceback")
        traceback = [_as_text(line) for line in lines] if isinstance(lines, list) else []
        name, value = _as_text(content.get("ename")), _as_text(content.get("evalue"))
        output = {"output_type": kind, "ename": name, "evalue": value, "traceback": traceback}
    else:
        return None, 0
    return nbformat.from_dict(output), len(str(output))


def _shortened(error: NotebookNode) -> NotebookNode:
    lines = [line[-SHORT:] for line in error.traceback[-3:]]
    return new_output("error", ename=error.ename[:SHORT], evalue=error.evalue[:SHORT], traceback=lines)


def _as_text(value: object) -> str:
    return intake.whole(value) if isinstance(value, str) else "" if value is None else str(intake.bounded(value))


def _shown(mime: str, value: object) -> object:
    """Return what a display shows: JSON where it may be, and text elsewhere."""
    if mime.endswith("json"):
        return intake.bounded(value)
    if isinstance(value, list) and all(isinstance(line, str) for line in value):
        return [intake.whole(line) for line in value]
    return _as_text(value)


def _append(outputs: list[NotebookNode], output: NotebookNode) -> None:
    """Add an output, joined to the last one if both are of the same stream."""
    last = outputs[-1] if outputs else None
    if last is not None and last.output_type == output.output_type == "stream" and last.name == output.name:
        last.text += output.text
    else:
        outputs.append(output)


def _is_python(process: psutil.Process) -> bool:
    return process.name().startswith("python")
