"""A submission's sandbox, seen from outside: a kernel is started in it, and checks call the student's answers.

Nothing that student code sends is trusted: what a driver returns is read without running anything (`autograder.drive`).
How much memory a call took is said by a process in there that runs no student code (`autograder.sandbox_server`).
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

from autograder import sandbox_server
from autograder.drive import describe_error
from autograder.sandbox import SERVER, Limits, remove, sandboxed
from autograder.watch import Moment, StoppedError, Watch

LOOK_EVERY = 0.25
AT_ONCE_SECONDS = 30
KILLING_ROUNDS, KILLING_SECONDS = 50, 0.02
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
        self.left_behind: list[str] = []

    @property
    def running(self) -> bool:
        """Whether it has been started and not been closed."""
        return self._process is not None

    def start(self) -> None:
        """Start it.

        Raises:
            RuntimeError: if it does not start: the grader's trouble, not the student's.
        """
        # A socket's path may have 108 bytes: so in /tmp, whatever TMPDIR says.
        self.folder = Path(tempfile.mkdtemp(prefix="sandbox-", dir="/tmp"))
        self.folder.chmod(0o777)
        submission = self._submission.resolve() if self._submission else None
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
            bufsize=0,
        )
        os.set_blocking(self._process.stdout.fileno(), False)
        self.watch.start(self._process.pid)
        request = {"kind": "prepare", "setup": self._setup, "modules": self._modules}
        try:
            said, _ = self._ask(request | {"describe": inspect.getsource(describe_error)})
        except StoppedError as error:
            raise RuntimeError(f"the sandbox did not start: {error}") from error
        if said["error"]:
            self.close()
            raise RuntimeError(f"the sandbox did not start: {said['error']}")
        self._own = {process.pid for process in self.watch.processes()}

    def close(self) -> None:
        """Kill every process in it."""
        if self._process is None:
            return
        self.watch.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()
        self._process.kill()
        self._process.wait()
        self._process = None
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
        if not self.running:
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
            cells: see `autograder.needed.needed`; with `again`, the "source" of each cell as it stands in the notebook.
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

    def _ask(self, request: dict) -> tuple[dict, bytes]:
        """Send a request, and return the reply to it, while watching what is used."""
        identity = secrets.token_hex(16)
        began = self.watch.now()
        try:
            self._send(json.dumps(request | {"id": identity}).encode())
            try:
                said, content = self._receive(began)
            except StoppedError as stopped:
                self.kill_students()
                if self.running:
                    self._receive(None)  # what it says of the process that was killed
                raise stopped
        except _EndedError:
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
                view = view[os.write(self._process.stdin.fileno(), view[: 2**20]) :]
        except OSError:
            raise _EndedError from None

    def _receive(self, began: Moment | None) -> tuple[dict, bytes]:
        """Return a reply: what is said, and what the student's code sent. With None it has to come at once."""
        header, content = (self._exactly(struct.unpack(">Q", self._exactly(8, began))[0], began) for _ in range(2))
        return json.loads(header), content

    def _exactly(self, size: int, began: Moment | None) -> bytes:
        content, start = bytearray(), time.monotonic()
        looked = start
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while len(content) < size:
                if selector.select(LOOK_EVERY):
                    part = os.read(self._process.stdout.fileno(), min(size - len(content), 2**20))
                    if not part:
                        raise _EndedError
                    content += part
                now = time.monotonic()
                if began is None and now - start > AT_ONCE_SECONDS:
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
