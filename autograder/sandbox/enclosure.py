"""Where student code runs: processes inside bubblewrap, which see their own files, their own memory and no network.

One program runs there, `autograder.sandbox.server`, which starts the notebook's kernel and makes the calls of the checks, each
in a process of its own; `autograder.sandbox.process` is its other end. Inside there are the system's
and Python's own folders, read-only; `peftlab`; a copy of what was submitted, in memory; and nothing of the grader: no
masters, no checks, no gradebook, no other submission, no other process. Nor are the libraries there that do what the students
are to build.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import peftlab
from peftlab.pretrained import cache_folder

HERE = Path(__file__).parent
HIDDEN = (HERE.parent, HERE.parents[1] / "solutions")
YARDSTICKS = ("peft", "bitsandbytes")
"""Packages that do what the course has its students build: an answer that calls them is none."""
STAND_IN = HERE / "inside"
SERVER = "/opt/sandbox_server.py"
SYSTEM = ("/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache", "/etc/alternatives", "/etc/fonts")
SUBMISSION, HOME = "/submission", "/student"
NOBODY = "65534"
REMOVING_SECONDS = 60


@dataclass(frozen=True)
class Limits:
    """What a submission may use. Marks must not depend on how busy the machine is: processor time decides, not the clock."""

    cpu_seconds: float = 60.0
    """Of processor time, for one cell or one call of a check. A right answer needs a few."""
    wall_seconds: float = 600.0
    """Of the clock, likewise: for code that waits for something that never comes."""
    total_cpu_seconds: float = 300.0
    """Of processor time for the whole notebook; what is left after that is not executed."""
    total_wall_seconds: float = 1800.0
    memory_bytes: int = 6 * 2**30
    """For one process, and for all of the submission's processes together."""
    scratch_bytes: int = 2**30
    file_bytes: int = 512 * 2**20
    processes: int = 256
    """Threads count."""
    output_bytes: int = 2**20
    """Printed or shown by one cell; what follows is dropped."""
    reply_bytes: int = 64 * 2**20
    """Of what one call of a check returns."""

    def of_a_process(self) -> dict[str, int]:
        """Return what the system itself sees to, by the names of the module `resource`."""
        return {
            "RLIMIT_DATA": self.memory_bytes,
            "RLIMIT_CPU": int(self.total_cpu_seconds),
            "RLIMIT_NPROC": self.processes,
            "RLIMIT_FSIZE": self.file_bytes,
            "RLIMIT_CORE": 0,
        }


class SandboxMissingError(RuntimeError):
    """Student code would run unprotected; the message says what to do."""


def sandbox_problem() -> str | None:
    """Return why no sandbox can be had on this machine, and what to do about it; None if one started and stopped."""
    if not sys.platform.startswith("linux"):
        return "The sandbox needs Linux: grade in a Linux virtual machine or container."
    if shutil.which("bwrap") is None or shutil.which("prlimit") is None:
        return "bubblewrap is missing. Install it, on Debian or Ubuntu by: sudo apt-get install bubblewrap"
    trial = subprocess.run([*_enclosure(Limits()), "--", "true"], capture_output=True, text=True, check=False)
    if trial.returncode == 0:
        return None
    said = trial.stderr.strip()
    if "uid map" in said:
        said += "\nAppArmor forbids it to ordinary users, as on Ubuntu 24.04. The instructor guide has a profile that helps."
    return f"bubblewrap (0.8 or newer is needed) cannot make a sandbox on this machine: {said}"


def require_sandbox() -> None:
    """Raise `SandboxMissingError` if there is no sandbox to be had."""
    problem = sandbox_problem()
    if problem:
        raise SandboxMissingError(
            f"{problem}\nWithout it student code runs with your rights and can change marks. "
            "To go on all the same: --without-sandbox (with nbgrader's own autograde: --ExecuteInSandbox.without_sandbox=True)"
        )


def sandboxed(
    command: list[str], limits: Limits, run_folder: Path, submission: Path | None, options: Sequence[str] = ()
) -> list[str]:
    """Return the command line that runs `command` in the sandbox.

    Args:
        run_folder: holds the kernel's connection file and sockets; the one folder that both sides write to.
        submission: a folder whose files are copied to the working directory inside.
        options: further ones of bubblewrap.
    """
    box = [*_enclosure(limits), *options, "--bind", str(run_folder), str(run_folder)]
    if submission is not None:
        box += ["--ro-bind", str(submission), SUBMISSION]
    # The limits are set inside: outside they would count every process of the grader's own user.
    limited = [f"--{name.removeprefix('RLIMIT_').lower()}={value}" for name, value in limits.of_a_process().items()]
    copy_then_run = f'[ -d {SUBMISSION} ] && cp -r --no-preserve=mode {SUBMISSION}/. .; exec "$@"'
    return [*box, "--", "sh", "-c", copy_then_run, "sh", "prlimit", *limited, "--", *command]


def _enclosure(limits: Limits) -> list[str]:
    """Return the bubblewrap command line up to the command that runs inside."""
    box = ["bwrap", "--unshare-all", "--unshare-user", "--uid", NOBODY, "--gid", NOBODY, "--hostname", "sandbox"]
    box += ["--cap-drop", "ALL", "--disable-userns", "--die-with-parent", "--new-session", "--clearenv"]
    for folder in ("/tmp", HOME):  # before the rest, which may lie below them
        box += ["--size", str(limits.scratch_bytes), "--tmpfs", folder]
    for path in _readable():
        box += ["--ro-bind", path, path]
    for path in (*HIDDEN, *_yardsticks()):  # they may lie inside an environment that is readable
        if any(Path(folder) in path.parents for folder in _readable()):
            box += ["--tmpfs", str(path)]
    box += ["--ro-bind", str(STAND_IN), "/opt/autograder", "--ro-bind", str(HERE / "server.py"), SERVER]
    box += ["--proc", "/proc", "--dev", "/dev"]
    for name, value in environment().items():
        box += ["--setenv", name, value]
    return [*box, "--chdir", HOME]


def _readable() -> list[str]:
    """Return the folders of the system, of Python and of `peftlab`, which student code may read."""
    package = str(Path(peftlab.__file__).parent)
    own = {sys.prefix, sys.base_prefix, package, str(cache_folder())} | {p for p in sys.path if p.endswith("-packages")}
    return [path for path in (*SYSTEM, *sorted(own)) if os.path.exists(path)]


def _yardsticks() -> list[Path]:
    """Return the folders of these packages, which are found and not imported."""
    found = [importlib.util.find_spec(package) for package in YARDSTICKS]
    return [Path(spec.origin).parent for spec in found if spec and spec.origin]


def environment() -> dict[str, str]:
    """Return the environment of every process inside."""
    return {
        "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
        "HOME": "/tmp",
        "LANG": "C.UTF-8",
        "PYTHONPATH": f"/opt:{Path(peftlab.__file__).parent.parent}",
        "PYTHONDONTWRITEBYTECODE": "1",
        "IPYTHONDIR": "/tmp/ipython",
        "MPLCONFIGDIR": "/tmp/matplotlib",
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",  # as a kernel sets it
        "PEFTLAB_CACHE": str(cache_folder()),
        "PEFTLAB_SHORT": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",  # one worker a core; more threads than cores wait for each other
        "JPY_PARENT_PID": "1",  # the kernel must not look for its parent, which is in another process namespace
    }


def remove(folder: Path) -> str | None:
    """Remove a folder that student code may have written to; return why it could not be removed, or None.

    `rm` goes down without recursion, however deep folders are nested, and has only so much time for it.
    """
    try:
        for command in (["rm", "-rf"], ["chmod", "-R", "u+rwX"], ["rm", "-rf"]):
            if not os.path.lexists(folder):
                return None
            subprocess.run([*command, "--", str(folder)], capture_output=True, timeout=REMOVING_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return f"it takes longer than {REMOVING_SECONDS} s"
    except OSError:  # there is no `rm` on this system
        shutil.rmtree(folder, ignore_errors=True)
    return "something in it is protected" if os.path.lexists(folder) else None
