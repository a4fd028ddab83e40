"""A submission's sandbox, seen from outside: a kernel is started in it, and checks call the student's answers.

Nothing that student code sends is trusted: what a driver returns is read without running anything
(`autograder.checking.drive`). How much memory a call took is said by a process in there that runs no student code
(`autograder.sandbox.server`).
"""

import base64
import contextlib
import inspect
import json
import os
import secrets
import selectors
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from autograder.checking.drive import describe_error
from autograder.sandbox import server as sandbox_server
from autograder.sandbox.enclosure import SERVER, Limits, remove, sandboxed
from autograder.sandbox.warm import WARM, WarmError
from autograder.sandbox.watch import Moment, StoppedError, Watch

LOOK_EVERY = 0.25
START_SECONDS, AT_ONCE_SECONDS = 300, 30
KILLING_ROUNDS, KILLING_SECONDS = 50, 0.02
KEEPER = "import signal; signal.signal(signal.SIGCHLD, signal.SIG_IGN); print('open', flush=True)\nwhile True: signal.pause()"
"""Keeps a sandbox open as its first process, and takes in those that lose their parents."""
BAGGAGE_BYTES = 16 * 2**20
"""What defining the answers may take without any doubt about what their calls are measured to take."""


@dataclass(frozen=True)
class Reply:
    """What came of a call.

    Attributes:
        content: what `torch.save` made of what the driver returned; to be read with care.
        error: what was raised instead, or "".
        printed: what the student's code printed.
        grown: by how many bytes the process had grown at its peak, since the student's cells had run; None where the
            system does not say so.
        baggage: by how many bytes it had grown before.
    """

    content: bytes
    error: str
    printed: str
    grown: int | None
    baggage: int | None


class SandboxProcess:
    """A sandbox for one submission; close it when done.

    Args:
        setup: sources that run before the student's, with which they share nothing that they could change.
        modules: what the drivers import, to be imported once.
        submission: a folder with the files that were handed in, to be found in the working directory.
        in_sandbox: False starts an ordinary process, with the grader's own rights.

    Attributes:
        watch: what has been used so far, over all processes and restarts.
        folder: on both sides the same, for the kernel's sockets.
        left_behind: sentences on what could not be removed.
    """

    def __init__(
        self,
        setup: Sequence[str],
        modules: Sequence[str] = (),
        submission: Path | None = None,
        limits: Limits | None = None,
        in_sandbox: bool = True,
    ):
        self.watch = Watch(limits or Limits())
        self._setup, self._modules = list(setup), list(modules)
        self._submission, self._sandboxed = submission, in_sandbox
        self._process: subprocess.Popen | None = None
        self._own: set[int] = set()
        self.left_behind: list[str] = []

    @property
    def running(self) -> bool:
        """Whether it has been started and not been closed; student code may have ended it since."""
        return self._process is not None

    def answers(self) -> bool:
        """Whether it is running and says so; if student code has ended it, it is closed now."""
        if self.running:
            with contextlib.suppress(StoppedError):
                self._ask({"kind": "answer"})
        return self.running

    def start(self) -> None:
        """Start it.

        Raises:
            RuntimeError: if it does not start: the grader's trouble, not the student's.
        """
        # A socket's path may have 108 bytes: so in /tmp, whatever TMPDIR says.
        self.folder = Path(tempfile.mkdtemp(prefix="sandbox-", dir="/tmp"))
        self.folder.chmod(0o777)
        submission = self._submission.resolve() if self._submission else None
        if not (self._sandboxed and WARM.possible and self._start_warm(submission)):
            self._start_cold(submission)
        os.set_blocking(self._from, False)
        request = {"kind": "prepare", "setup": self._setup, "modules": self._modules}
        try:
            said, _ = self._ask(request | {"describe": inspect.getsource(describe_error)}, START_SECONDS)
        except StoppedError as error:
            raise RuntimeError(f"the sandbox did not start: {error}") from error
        if said["error"]:
            self.close()
            raise RuntimeError(f"the sandbox did not start: {said['error']}")
        self._own = {process.pid for process in self.watch.processes()}

    def _start_warm(self, submission: Path | None) -> bool:
        """Open a sandbox, and have a process move in that has torch in memory; return whether this machine lets it."""
        says, said = os.pipe()
        options = ["--as-pid-1", "--info-fd", str(said)]
        command = sandboxed([sys.executable, "-ISc", KEEPER], self.watch.limits, self.folder, submission, options)
        reads, self._to = os.pipe()
        self._from, writes = os.pipe()
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, pass_fds=[said]
            )
            self.watch.start(self._process.pid)
            with open(says) as told, self._process.stdout as opened:
                os.close(said)
                ready = opened.readline()
                inside = json.load(told)["child-pid"] if ready else 0
            self.watch.start(self._process.pid, WARM.move_in(inside, self.watch.limits, reads, writes))
        except (WarmError, ValueError):
            self._end()
            return False
        finally:
            os.close(reads)
            os.close(writes)
        return True

    def _start_cold(self, submission: Path | None) -> None:
        """Start a sandbox whose program imports torch itself."""
        if self._sandboxed:
            command = sandboxed([sys.executable, "-P", SERVER, "--alone"], self.watch.limits, self.folder, submission)
        else:
            command = [sys.executable, "-P", sandbox_server.__file__]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=None if self._sandboxed else submission,
            env=os.environ | {"OMP_NUM_THREADS": "1"},  # a fork has no thread but its own, and would wait for the others
        )
        self._to, self._from = os.dup(self._process.stdin.fileno()), os.dup(self._process.stdout.fileno())
        self._process.stdin.close()
        self._process.stdout.close()
        self.watch.start(self._process.pid)

    def _end(self) -> None:
        self.watch.kill()
        for pipe in (self._to, self._from):
            with contextlib.suppress(OSError):
                os.close(pipe)
        self._process.kill()
        self._process.wait()
        self._process = None

    def close(self) -> None:
        """Kill every process in it."""
        if self._process is None:
            return
        self._end()
        try:
            problem = remove(self.folder)
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        if problem:
            self.left_behind.append(f"what it wrote beside its sockets could not be removed: {problem}")

    def students(self) -> list[psutil.Process]:
        """Return the processes that run student code, and those that they have started."""
        others = (process for process in self.watch.processes() if process.pid not in self._own)
        return [process for process in others if _lives(process)] if self.running else []

    def kill_students(self) -> None:
        """Kill these; if there are always new ones, everything."""
        for _ in range(KILLING_ROUNDS):
            students = self.students()
            if not students:
                return
            for process in students:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            time.sleep(KILLING_SECONDS)
        self.close()

    def start_kernel(self, connection_file: Path) -> psutil.Process:
        """Start a kernel with this connection file; return its process.

        Raises:
            StoppedError: if it ended at once.
        """
        if not self.answers():
            self.start()
        self._ask({"kind": "kernel", "connection_file": str(connection_file)})
        students = self.students()
        if not students:
            raise StoppedError("the kernel ended")
        return students[0]

    def call(
        self,
        cells: Sequence[dict],
        source: str,
        driver: str,
        answers: Sequence[str],
        arguments: bytes,
        *,
        again: bool = False,
        measured: bool = False,
    ) -> Reply:
        """Run the student's cells, then `driver(*answers, **arguments)`, in a new process.

        Args:
            cells: see `autograder.sandbox.needed.needed`; with `again`, the "source" of each cell as it stands in the notebook.
            source: defines the driver.
            answers: names that the cells define.
            arguments: what `torch.save` makes of the keyword arguments.
            measured: take away from it what it could keep memory in that is not its own.

        Raises:
            StoppedError: if it used more than it may, or killed what watches over it.
        """
        request = {
            "kind": "call",
            "cells": list(cells),
            "source": source,
            "driver": driver,
            "answers": list(answers),
            "arguments": base64.b64encode(arguments).decode(),
            "again": again,
            "confined": measured,
            "reply_bytes": self.watch.limits.reply_bytes,
        }
        if not self.running:
            self.start()
        said, content = self._ask(request)
        grown, defined = said["grown"], said["defined"]
        baggage = max(defined, 0) if defined is not None else grown
        peak = None if grown is None else grown - (baggage if defined is not None else 0)
        return Reply(content, said["error"], said["printed"], peak, baggage)

    def _ask(self, request: dict, seconds: float | None = None) -> tuple[dict, bytes]:
        """Send a request, and return the reply to it, while watching what is used; or only how long it takes.

        Raises:
            StoppedError: if too much was used, or the sandbox's program does not answer.
        """
        identity = secrets.token_hex(16)
        began = self.watch.now() if seconds is None else None
        try:
            self._send(json.dumps(request | {"id": identity}).encode())
            try:
                said, content = self._receive(began, seconds)
            except StoppedError:
                self.kill_students()
                if self.running:
                    self._receive(None, AT_ONCE_SECONDS)  # what it says of the process that was killed
                raise
        except (_EndedError, ValueError, struct.error):
            self.close()
            raise StoppedError("the code ended its own process") from None
        self.watch.look()
        if said.get("id") != identity:
            self.close()
            raise RuntimeError("a reply came to a request that was not made")
        return said, content

    def _send(self, content: bytes) -> None:
        view = memoryview(struct.pack(">Q", len(content)) + content)
        try:
            while view:
                view = view[os.write(self._to, view[: 2**20]) :]
        except OSError:
            raise _EndedError from None

    def _receive(self, began: Moment | None, seconds: float | None) -> tuple[dict, bytes]:
        """Return a reply: what is said, and what the student's code sent."""
        frames = []
        for _ in range(2):
            (size,) = struct.unpack(">Q", self._exactly(8, began, seconds))
            frames.append(self._exactly(size, began, seconds))
        return json.loads(frames[0]), frames[1]

    def _exactly(self, size: int, began: Moment | None, seconds: float | None) -> bytes:
        content, start = bytearray(), time.monotonic()
        looked = start
        with selectors.DefaultSelector() as selector:
            selector.register(self._from, selectors.EVENT_READ)
            while len(content) < size:
                if selector.select(LOOK_EVERY):
                    part = os.read(self._from, min(size - len(content), 2**20))
                    if not part:
                        raise _EndedError
                    content += part
                now = time.monotonic()
                if seconds is not None and now - start > seconds:
                    raise _EndedError
                if began is not None and now - looked > LOOK_EVERY:
                    self.watch.stop_if_too_much(began)
                    looked = now
        return bytes(content)


class _EndedError(Exception):
    """The sandbox's own program has ended, or does not answer."""


def _lives(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
