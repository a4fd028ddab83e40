"""The kernel that runs a submission's cells.

Nothing that comes out of it is trusted: outputs are data to be shown, and no mark depends on them. It is stopped from outside
when it uses more than it may.
"""

import contextlib
import inspect
import queue
import secrets
import time
from pathlib import Path

import nbformat
import zmq
from jupyter_client import BlockingKernelClient, write_connection_file
from nbformat import NotebookNode
from nbformat.v4 import new_output

from autograder.sandbox.plain import bounded, whole
from autograder.sandbox.process import SandboxProcess
from autograder.sandbox.watch import StoppedError

START_SECONDS = 300
MESSAGE_BYTES = 256 * 2**20
LOOK_EVERY = 0.25
SHORT = 2000
"""Characters that are left of a part of an error that is too long."""


class StudentKernel:
    """A kernel for one submission's cells; close it when done.

    Args:
        sandbox: where it is to run.
    """

    def __init__(self, sandbox: SandboxProcess):
        self._sandbox, self.limits, self.watch = sandbox, sandbox.watch.limits, sandbox.watch
        self._client = self._kernel = None

    def start(self) -> None:
        """Start the kernel, and wait until it answers.

        Raises:
            RuntimeError: if it does not: the grader's trouble, not the student's.
        """
        try:
            if not self._sandbox.answers():
                self._sandbox.start()
            file, _ = write_connection_file(
                str(self._sandbox.folder / f"kernel-{secrets.token_hex(4)}.json"),
                transport="ipc",
                ip=str(self._sandbox.folder / f"socket-{secrets.token_hex(4)}"),
                key=secrets.token_hex(16).encode(),
            )
            Path(file).chmod(0o644)  # in the sandbox it is somebody else's
            self._kernel = self._sandbox.start_kernel(Path(file))
            self._context = zmq.Context()
            self._context.maxmsgsize = MESSAGE_BYTES
            self._client = BlockingKernelClient(connection_file=file, context=self._context)
            self._client.load_connection_file()
            self._client.start_channels()
            self._client.wait_for_ready(timeout=START_SECONDS)
            self._execute(_PREPARING, numbered=False)
            self._own = {process.pid for process in self._sandbox.students()}
        except (RuntimeError, StoppedError) as error:
            self.close()
            raise RuntimeError(f"the student's kernel did not start: {error}") from error

    def close(self) -> None:
        """Kill every process of the submission's."""
        if self._client is not None:
            self.watch.look()
            for step in (self._client.stop_channels, lambda: self._context.destroy(linger=0)):
                with contextlib.suppress(Exception):  # it may be dead already
                    step()
        self._client = self._kernel = None
        if self._sandbox.running:
            self._sandbox.kill_students()

    @property
    def running(self) -> bool:
        """Whether it has been started and not been closed."""
        return self._client is not None

    def execute(self, code: str) -> list[NotebookNode]:
        """Execute code; return its outputs as a notebook keeps them, at most `limits.output_bytes` of them.

        Raises:
            StoppedError: if the process ended, or used more than it may; it is closed then.
        """
        try:
            return self._execute(code)
        except StoppedError:
            self.close()
            raise

    def _execute(self, code: str, numbered: bool = True) -> list[NotebookNode]:
        outputs, kept = [], 0
        request = self._client.execute(code, allow_stdin=False, store_history=numbered)
        began, looked = self.watch.now(), time.monotonic()
        while True:
            if time.monotonic() - looked > LOOK_EVERY:
                self.watch.stop_if_too_much(began)
                looked = time.monotonic()
            kind, content = _said(self._next_message(), request)
            if kind == "status" and content.get("execution_state") == "idle":
                return outputs
            if kind == "clear_output":
                outputs.clear()
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
            if self._kernel not in self._sandbox.students():
                raise StoppedError("the code ended its own process") from None
            return None
        except RecursionError:  # something that is nested too deep to be shown
            return None
        except Exception as error:  # student code can send anything over this socket
            raise StoppedError(f"what came from the kernel is no Jupyter message ({type(error).__name__})") from error

    def left_running(self) -> bool:
        """Whether the notebook's cells have started processes that are still there."""
        return any(process.pid not in self._own for process in self._sandbox.students())


def prepare_kernel() -> None:
    """Let the student's own modules be found, and let a notebook go on after it has closed what a kernel needs.

    It runs in the student's kernel, where it is sent as source. The working directory is searched where Jupyter searches it,
    but only from now on: what lies there must not take the place of what a kernel starts with.
    """
    import os
    import sys

    from IPython import get_ipython

    environment = [place for place, path in enumerate(sys.path) if os.path.basename(path) in ("site-packages", "dist-packages")]
    if "" not in sys.path:
        sys.path.insert(environment[0] if environment else len(sys.path), "")
    home, streams = os.getcwd(), {"stdout": sys.stdout, "stderr": sys.stderr}
    for stream in streams.values():
        stream.close = lambda: None

    def mend(*details: object) -> None:
        for name, stream in streams.items():
            present = getattr(sys, name, None)
            if not callable(getattr(present, "write", None)) or getattr(present, "closed", False):
                setattr(sys, name, stream)
        try:
            os.getcwd()
        except OSError:  # the folder is gone
            os.chdir(home)

    get_ipython().events.register("post_execute", mend)


# Among names of its own, because the student's may be called `list` or `globals`.
_PREPARING = f"exec({inspect.getsource(prepare_kernel) + 'prepare_kernel()'!r}, {{}})"


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
        data, metadata = content.get("data"), bounded(content.get("metadata"))
        if not isinstance(data, dict):
            return None, 0
        shown = {whole(str(mime)): _shown(str(mime), value) for mime, value in data.items()}
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
    return whole(value) if isinstance(value, str) else "" if value is None else str(bounded(value))


def _shown(mime: str, value: object) -> object:
    """Return what a display shows: JSON where it may be, and text elsewhere."""
    if mime.endswith("json"):
        return bounded(value)
    if isinstance(value, list) and all(isinstance(line, str) for line in value):
        return [whole(line) for line in value]
    return _as_text(value)


def _append(outputs: list[NotebookNode], output: NotebookNode) -> None:
    """Add an output, joined to the last one if both are of the same stream."""
    last = outputs[-1] if outputs else None
    if last is not None and last.output_type == output.output_type == "stream" and last.name == output.name:
        last.text += output.text
    else:
        outputs.append(output)
