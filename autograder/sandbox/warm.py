"""Sandboxes that begin with torch imported: forks of a process that is kept for it (`autograder.sandbox.template`).

To import torch and what comes with it takes several seconds of processor time, a third of what it takes to grade a notebook.
"""

import array
import atexit
import contextlib
import json
import os
import select
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from threading import Lock

from autograder.sandbox import server as sandbox_server
from autograder.sandbox.enclosure import HOME, Limits, environment

TEMPLATE = Path(__file__).with_name("template.py")
MODULES = (
    "torch._dynamo",
    "ipykernel.kernelapp",
    "matplotlib.pyplot",
    "jaxtyping",
    "peftlab.llama",
    "peftlab.memory",
    "peftlab.plots",
    "peftlab.training",
)
"""What the units' set-up cells and the checks' drivers import."""
IMPORT_SECONDS, MOVE_SECONDS, TRIES = 300, 60, 2


class WarmError(RuntimeError):
    """This machine does not let a process move into a sandbox; it says why."""


class Template:
    """The process that sandboxes are forks of. It ends when this one does."""

    def __init__(self):
        self._folder = tempfile.mkdtemp(prefix="warm-")
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(TEMPLATE), str(theirs.fileno()), sandbox_server.__file__, *MODULES],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=environment() | {"HOME": self._folder, "MPLCONFIGDIR": self._folder, "IPYTHONDIR": self._folder},
                cwd=self._folder,
            )

    @property
    def alive(self) -> bool:
        """Whether it has not been ended."""
        return self._process.poll() is None

    def move_in(self, inside: int, limits: Limits, reads: int, writes: int) -> int:
        """Have a fork run the sandbox's program beside a process inside; return the number of the process that waits for it.

        Raises:
            WarmError: if it could not.
        """
        request = {"inside": inside, "environment": environment(), "folder": HOME, "limits": limits.of_a_process()}
        says, said = os.pipe()
        try:
            pipes = array.array("i", [reads, writes, said])
            self._control.settimeout(IMPORT_SECONDS)
            self._control.sendmsg([json.dumps(request).encode()], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, pipes)])
            os.close(said)
            said = None
            process = int(self._control.recv(64) or b"0")
            heard = os.read(says, 1024) if process and select.select([says], [], [], MOVE_SECONDS)[0] else b""
        except (OSError, ValueError) as error:
            raise WarmError(str(error)) from error
        finally:
            for pipe in (says, said):
                if pipe is not None:
                    os.close(pipe)
        if heard != b"in":
            raise WarmError(heard.decode(errors="replace") or "it did not answer")
        return process

    def close(self) -> None:
        """End it."""
        self._control.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(1)
        self._process.kill()
        self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)


class Warm:
    """The one template of this process, made when it is first needed, and no more where the system does not let it work."""

    def __init__(self):
        self._template: Template | None = None
        self._lock, self._tries = Lock(), 0

    @property
    def possible(self) -> bool:
        """Whether it has worked so far, or has not been tried often."""
        return self._tries < TRIES

    def move_in(self, inside: int, limits: Limits, reads: int, writes: int) -> int:
        """See `Template.move_in`."""
        with self._lock:
            if self._template is None or not self._template.alive:
                self._template = Template()
                atexit.register(self._template.close)
            try:
                process = self._template.move_in(inside, limits, reads, writes)
            except WarmError:
                self._tries += 1
                self._template.close()
                self._template = None
                raise
            self._tries = 0
            return process


WARM = Warm()
