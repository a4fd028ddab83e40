"""The kernel that a submission lives in, and its answers as the checks see them from outside.

Nothing that comes out of it is trusted: outputs are data to be shown, and what a driver returns is read without running
anything (`autograder.drive.read_reply`). It is stopped from outside when it uses more than it may.
"""

import base64
import contextlib
import inspect
import queue
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import psutil
import zmq
from jupyter_client import KernelManager
from nbformat import NotebookNode
from nbformat.v4 import new_output, output_from_msg

from autograder import remote_call
from autograder.drive import RemoteAnswer, StudentError, describe_error
from autograder.sandbox import Limits, StudentKernels, sandboxed

REPLY = "application/x-observation"
START_SECONDS = 300
MESSAGE_BYTES = 256 * 2**20
LOOK_EVERY = 0.25


class StoppedError(Exception):
    """The submission's process has ended or was ended; the message is a sentence that says why."""


class StudentKernel:
    """A running kernel for one submission; close it when done.

    Args:
        submission: a folder with the files that were handed in, to be found in the kernel's working directory.
        in_sandbox: False starts an ordinary process, with the grader's own rights.

    Attributes:
        cpu_seconds, peak_bytes: what it has used so far, over all its processes and restarts.
    """

    def __init__(self, submission: Path | None, limits: Limits, in_sandbox: bool = True):
        self.limits = limits
        self.cpu_seconds, self.peak_bytes = 0.0, 0
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
        except RuntimeError as error:
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
        if self._client is not None:
            self._client.stop_channels()
        with contextlib.suppress(Exception):  # it may be dead already
            self._manager.shutdown_kernel(now=True)
        self._context.destroy(linger=0)
        shutil.rmtree(self._folder, ignore_errors=True)
        self._manager = self._client = None

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

    def execute(self, code: str, show: Callable[[NotebookNode], None] = lambda output: None) -> list[NotebookNode]:
        """Execute code; return its outputs as a notebook keeps them, at most `limits.output_bytes` of them.

        Args:
            show: is called with the display that carries a reply, which is no output and not subject to that limit.

        Raises:
            StoppedError: if the process ended, or used more than it may; it is closed then.
        """
        try:
            return self._execute(code, show)
        except StoppedError:
            self.close()
            raise

    def _execute(self, code: str, show: Callable[[NotebookNode], None]) -> list[NotebookNode]:
        outputs, kept = [], 0
        request = self._client.execute(code, allow_stdin=False)
        cpu_before, wall_before = self._cpu_of_this_start, time.monotonic()
        looked = wall_before
        while True:
            if time.monotonic() - looked > LOOK_EVERY:
                self._look()
                looked = time.monotonic()
                self._stop_if_too_much(self._cpu_of_this_start - cpu_before, looked - wall_before)
            message = self._next_message()
            if message is None or message["parent_header"].get("msg_id") != request:
                continue
            kind, content = message["msg_type"], message["content"]
            if kind == "status" and content.get("execution_state") == "idle":
                return outputs
            if kind == "clear_output":
                outputs.clear()
            if kind not in ("stream", "display_data", "execute_result", "error"):
                continue
            output = output_from_msg(message)
            if kind == "display_data" and REPLY in content["data"]:
                show(output)
                continue
            size = len(str(output))
            if kept <= self.limits.output_bytes < kept + size:
                outputs.append(new_output("stream", name="stdout", text="\n[the rest of this cell's output was dropped]\n"))
            kept += size
            if kept <= self.limits.output_bytes or kind == "error":
                _append(outputs, output)

    def _next_message(self) -> dict | None:
        try:
            return self._client.get_iopub_msg(timeout=LOOK_EVERY)
        except queue.Empty:
            if not self._manager.is_alive():
                raise StoppedError("the code ended its own process") from None
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
        code = f"{_CALLING}\n_call_driver(globals(), {', '.join(map(repr, parts))})\ndel _call_driver, _describe_error"
        replies = []
        try:
            kernel = self._kernel()
        except StoppedError as stopped:
            raise StudentError(f"Stopped: {stopped}") from stopped
        try:
            outputs = kernel.execute(code, lambda output: replies.append(output["data"]))
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
            return base64.b64decode(replies[-1][REPLY], validate=True)
        except ValueError as malformed:
            raise StudentError("the code sent nothing back that a check can read") from malformed

    def process(self) -> int:
        """Return the process id of the student's kernel."""
        return self._kernel().process()


# What the sandbox needs to call a driver, as source: the package itself is not to be seen there.
_CALLING = "\n\n".join(
    inspect.getsource(function).replace(f"def {function.__name__}(", f"def _{function.__name__}(", 1)
    for function in (describe_error, remote_call.call_driver)
)


def _append(outputs: list[NotebookNode], output: NotebookNode) -> None:
    """Add an output, joined to the last one if both are of the same stream."""
    last = outputs[-1] if outputs else None
    if last is not None and last.output_type == output.output_type == "stream" and last.name == output.name:
        last.text += output.text
    else:
        outputs.append(output)


def _is_python(process: psutil.Process) -> bool:
    return process.name().startswith("python")
