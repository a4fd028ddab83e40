"""A class is graded by workers on other hosts, of which one dies on the way.

The hosts are network namespaces of this machine, joined by a bridge. A worker's host has a clone of the project in a folder of
its own, and none of the head's files: where the class is, it sees an empty folder.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from nbgrader.api import Gradebook

from attacks import SOLUTION, UNIT, WRONG_MERGE
from classroom import Classroom
from test_autograde import POINTS

ROOT = Path(__file__).parents[2]
FULL = sum(POINTS.values())
ADDRESSES = {"head": "10.213.7.1", "first": "10.213.7.2", "second": "10.213.7.3"}
PREFIX = f"g{os.getpid() % 100_000}"


def can_have_hosts() -> bool:
    if os.geteuid() != 0 or shutil.which("ip") is None or shutil.which("unshare") is None:
        return False
    tried = subprocess.run(["ip", "netns", "add", f"{PREFIX}try"], capture_output=True)
    subprocess.run(["ip", "netns", "del", f"{PREFIX}try"], capture_output=True)
    return tried.returncode == 0


pytestmark = [
    pytest.mark.skipif(not can_have_hosts(), reason="network namespaces take root, and a system that has them"),
    pytest.mark.xdist_group("hosts"),
]


def ip(*words: str, inside: str | None = None) -> None:
    within = [] if inside is None else ["-n", f"{PREFIX}{inside}"]
    subprocess.run(["ip", *within, *words], check=True, capture_output=True)


@pytest.fixture
def hosts() -> Iterator[None]:
    """Three hosts on a network of their own; the head's has the bridge."""
    try:
        for host in ADDRESSES:
            ip("netns", "add", f"{PREFIX}{host}")
            ip("link", "set", "lo", "up", inside=host)
        ip("link", "add", "bridge", "type", "bridge", inside="head")
        ip("addr", "add", f"{ADDRESSES['head']}/24", "dev", "bridge", inside="head")
        ip("link", "set", "bridge", "up", inside="head")
        for host in ("first", "second"):
            ip(
                "link",
                "add",
                host,
                "netns",
                f"{PREFIX}head",
                "type",
                "veth",
                "peer",
                "name",
                "wire",
                "netns",
                f"{PREFIX}{host}",
            )
            ip("link", "set", host, "master", "bridge", "up", inside="head")
            ip("addr", "add", f"{ADDRESSES[host]}/24", "dev", "wire", inside=host)
            ip("link", "set", "wire", "up", inside=host)
        yield
    finally:
        for host in ADDRESSES:
            subprocess.run(["ip", "netns", "del", f"{PREFIX}{host}"], capture_output=True)


def copy_project(folder: Path) -> None:
    """Copy what a clone has, and what has not been committed yet."""
    listed = subprocess.run(["git", "ls-files", "-z", "-co", "--exclude-standard"], cwd=ROOT, check=True, capture_output=True)
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)


def start(host: str, command: list[str], project: Path, hidden: Path | None = None) -> subprocess.Popen:
    """Start a Python of one host on its own copy of the project, where `hidden` is an empty folder."""
    paths = {"PYTHONPATH": os.pathsep.join([str(project / "course"), str(project)])}
    prefix = ["ip", "netns", "exec", f"{PREFIX}{host}"]
    if hidden is not None:
        prefix += ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"', str(hidden)]
    return subprocess.Popen(
        [*prefix, sys.executable, *command],
        cwd=project,
        env=os.environ | paths,
        start_new_session=True,
        stderr=subprocess.DEVNULL,
    )


def wait_until(happened: Callable[[], bool], seconds: float) -> None:
    until = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < until, "it has not happened in time"
        time.sleep(0.2)


def marks(classroom: Classroom, students: list[str]) -> dict[str, float]:
    with Gradebook(f"sqlite:///{classroom.root / 'gradebook.db'}") as gradebook:
        return {student: gradebook.find_submission(UNIT, student).score for student in students}


def test_workers_on_other_hosts_mark_the_class_though_one_of_them_dies(hosts, tmp_path):
    elsewhere = {host: tmp_path / host for host in ("first", "second")}
    for folder in elsewhere.values():
        copy_project(folder)
    (tmp_path / "head").mkdir()
    classroom = Classroom(tmp_path / "head", UNIT)
    answers = {"first": {}, "second": {}, "third": {}, "wrong": {"merge": WRONG_MERGE}}
    for student, answer in answers.items():
        classroom.submit(student, classroom.answers_alone(SOLUTION | answer))
    scheduler_at = f"tcp://{ADDRESSES['head']}:8786"
    worker = ["-m", "distributed.cli.dask_worker", scheduler_at, "--nworkers", "1", "--nthreads", "1", "--no-dashboard"]
    with contextlib.ExitStack() as started:

        def keep(process: subprocess.Popen) -> subprocess.Popen:
            started.callback(lambda: (process.poll() is None and os.killpg(process.pid, signal.SIGKILL), process.wait()))
            return process

        scheduler = ["-m", "distributed.cli.dask_scheduler", "--host", ADDRESSES["head"], "--port", "8786", "--no-dashboard"]
        keep(start("head", scheduler, ROOT))
        workers = {
            host: keep(start(host, [*worker, "--host", ADDRESSES[host]], folder, hidden=classroom.root))
            for host, folder in elsewhere.items()
        }
        command = ["-m", "autograder.grading.grade", UNIT, "--root", str(classroom.root), "--scheduler", scheduler_at]
        grading = keep(start("head", command, ROOT))
        records = classroom.root / "grading" / UNIT / "records"
        wait_until(lambda: len(list(records.glob("*.json"))) >= 1, 300)
        os.killpg(workers["first"].pid, signal.SIGKILL)
        wait_until(lambda: grading.poll() is not None, 300)
        assert grading.returncode == 0
    assert marks(classroom, list(answers)) == {"first": FULL, "second": FULL, "third": FULL, "wrong": FULL - 2}
