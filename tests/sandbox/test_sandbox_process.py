"""A call of a check, in a submission's sandbox: what comes back of it, and what it cannot do."""

import io
import textwrap

import pytest
import torch

from autograder.sandbox.enclosure import Limits, sandbox_problem
from autograder.sandbox.process import SandboxProcess
from autograder.sandbox.warm import WARM, WarmError
from autograder.sandbox.watch import StoppedError

pytestmark = [
    pytest.mark.skipif(sandbox_problem() is not None, reason=f"no sandbox: {sandbox_problem()}"),
    pytest.mark.xdist_group("sandbox-process"),  # one sandbox for all
]
MIB = 2**20
LIMITS = Limits(cpu_seconds=3, wall_seconds=60, reply_bytes=MIB, memory_bytes=2 * 2**30)
DRIVER = "def drive_answer(answer, **case):\n    return {'outcome': answer(**case)}\n"
SILENT = "def drive_answer(answer, **case):\n    answer(**case)\n    return {}\n"


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory):
    submission = tmp_path_factory.mktemp("submission")
    (submission / "helpers.py").write_text("def twice(x):\n    return 2 * x\n")
    (submission / "torch.py").write_text("raise RuntimeError('this is not PyTorch')\n")
    process = SandboxProcess(["import torch\nSCALE = 2"], submission=submission, limits=LIMITS)
    yield process
    process.close()


def call(sandbox, cell: str, case: dict | None = None, *, source: str = DRIVER, names=("answer",), **settings):
    """Call the `answer` that a cell defines; with `again=True` the cell need not be Python."""
    cell, content = textwrap.dedent(cell), io.BytesIO()
    torch.save(case or {}, content)
    statements = 0 if settings.get("again") else len(compile(cell, "cell", "exec", 0x400).body)  # 0x400: the tree only
    cells = [{"source": cell, "needed": list(range(statements))}]
    return sandbox.call(cells, source, "drive_answer", names, content.getvalue(), **settings)


def outcome(reply) -> object:
    assert reply.error == ""
    return torch.load(io.BytesIO(reply.content), weights_only=True)["outcome"]


def test_a_call_gets_its_arguments_and_the_units_set_up(sandbox):
    reply = call(sandbox, "def answer(x):\n    return SCALE * x", {"x": torch.arange(3)})
    assert outcome(reply).tolist() == [0, 2, 4]


def test_a_call_sees_nothing_of_the_one_before(sandbox):
    call(sandbox, "torch.ones = None\nSCALE = 5\ndef answer():\n    return 1")
    assert outcome(call(sandbox, "def answer():\n    return SCALE * torch.ones(2)")).tolist() == [2, 2]


def test_what_is_printed_comes_back_and_is_cut_off(sandbox):
    reply = call(sandbox, "import sys\ndef answer():\n    print('hello')\n    print('there', file=sys.stderr)\n    return 1")
    assert sorted(reply.printed.split()) == ["hello", "there"]
    assert len(call(sandbox, "def answer():\n    print('x' * 10**7)\n    return 1").printed) <= 2**16


def test_an_error_names_the_students_line(sandbox):
    reply = call(sandbox, "def answer():\n    x = 1\n    return x / 0")
    assert reply.error == "ZeroDivisionError: division by zero (line 3 of your cell: return x / 0)"


def test_a_name_that_is_not_defined_is_named(sandbox):
    assert "`other` not defined" in call(sandbox, "def answer():\n    return 1", names=("other",)).error


def test_the_first_error_of_a_cell_ends_it(sandbox):
    assert "`answer` not defined" in call(sandbox, "1 / 0\ndef answer():\n    return 1").error


def test_a_reply_that_is_too_large_is_refused(sandbox):
    assert "more than 1 MiB" in call(sandbox, "def answer():\n    return torch.ones(2**20)").error


@pytest.mark.parametrize("end", ["os._exit(0)", "os.kill(os.getpid(), 9)", "os.abort()"])
def test_a_process_may_end_itself(sandbox, end):
    assert call(sandbox, f"import os\ndef answer():\n    {end}").error == "the code ended its own process"


def test_an_exit_is_an_error_like_others(sandbox):
    assert call(sandbox, "def answer():\n    raise SystemExit(3)").error.startswith("SystemExit: 3")


def test_a_call_that_loops_is_stopped_and_the_next_one_works(sandbox):
    with pytest.raises(StoppedError):
        call(sandbox, "def answer():\n    while True:\n        pass")
    assert outcome(call(sandbox, "def answer():\n    return 1")) == 1


def test_a_call_that_takes_too_much_memory_is_stopped_and_the_next_one_works(sandbox):
    greedy = "def answer():\n    kept = []\n    while True:\n        kept.append(torch.ones(2**24))"
    try:
        assert "alloc" in call(sandbox, greedy).error
    except StoppedError as stopped:
        assert "memory" in str(stopped)
    assert outcome(call(sandbox, "def answer():\n    return 1")) == 1


def test_what_a_call_starts_ends_with_it(sandbox):
    call(
        sandbox,
        "import os, time\ndef answer():\n    if os.fork() == 0:\n        os.setsid()\n        time.sleep(600)\n    return 1",
    )
    assert sandbox.students() == []


def test_a_call_cannot_look_into_the_server_and_ends_itself_if_it_kills_it(sandbox):
    look = "import os\ndef answer():\n    return len(open(f'/proc/{os.getppid()}/mem', 'rb').read(1))"
    assert "PermissionError" in call(sandbox, look).error
    with pytest.raises(StoppedError, match="ended its own process"):
        call(sandbox, "import os\ndef answer():\n    os.kill(os.getppid(), 9)")
    assert outcome(call(sandbox, "def answer():\n    return 1")) == 1


def test_a_forged_reply_is_read_as_that_of_its_own_call(sandbox):
    """Whatever a call writes to the pipes that it has, it cannot speak for the server."""
    forged = call(sandbox, "import os\nfor pipe in range(3, 64):\n    try:\n        os.write(pipe, b'e' + bytes(15))\n"
                  "    except OSError:\n        pass\ndef answer():\n    return 1")  # fmt: skip
    assert forged.error or forged.content
    assert outcome(call(sandbox, "def answer():\n    return 1")) == 1


def test_growth_is_measured_from_outside(sandbox):
    large = "def answer():\n    torch.ones(2**24)\n    return 1"
    small = call(sandbox, "def answer():\n    return 1", measured=True)
    assert 60 * MIB < call(sandbox, large, measured=True).grown - small.grown < 68 * MIB
    assert small.grown < 8 * MIB and small.baggage < 8 * MIB


def test_what_is_held_before_the_call_is_reported(sandbox):
    ballast = """
        ballast = torch.ones(2**24)
        def answer():
            global ballast
            ballast = None
            torch.ones(2**24)
            return 1
    """
    reply = call(sandbox, ballast, measured=True)
    assert 60 * MIB < reply.baggage < 70 * MIB and reply.grown < 8 * MIB


@pytest.mark.parametrize(
    "refused",
    [
        "os.fork()",
        "subprocess.run(['true'])",
        "multiprocessing.get_context('spawn').Process(target=print).start()",
        "os.posix_spawn('/bin/true', ['true'], {})",
        "os.execv('/bin/true', ['true'])",
        "open('/tmp/large', 'wb').write(bytes(2**22))",
        "torch.ones(2**20).share_memory_()",
        "torch.save(torch.ones(2**20), '/tmp/large')",
        "mmap.mmap(os.memfd_create('x'), 2**22).write(bytes(2**22))",
    ],
)
def test_a_measured_call_has_no_memory_but_its_own(sandbox, refused):
    imports = "import mmap, multiprocessing, os, signal, subprocess\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    reply = call(sandbox, f"{imports}def answer():\n    {refused}\n    return 1", measured=True)
    assert reply.error, reply


def test_a_measured_call_may_start_threads(sandbox):
    threads = """
        import threading
        def answer():
            seen = []
            thread = threading.Thread(target=seen.append, args=[3])
            thread.start()
            thread.join()
            return seen
    """
    assert outcome(call(sandbox, threads, measured=True)) == [3]


def test_a_module_beside_the_notebook_is_found_but_takes_no_other_ones_place(sandbox):
    assert (
        outcome(call(sandbox, "import torch\nfrom helpers import twice\ndef answer():\n    return twice(torch.ones(1))")) == 2
    )


def test_run_again_cells_are_those_of_a_notebook(sandbox):
    cell = "%matplotlib inline\nlisted = !echo 3\n%time x = int(listed[0])\ndef answer():\n    return SCALE * x"
    assert outcome(call(sandbox, cell, again=True)) == 6
    assert "not defined" in call(sandbox, "def answer()\n    return 1", again=True).error


def test_a_closed_sandbox_starts_again(sandbox):
    sandbox.close()
    assert not sandbox.running and sandbox.students() == []
    assert outcome(call(sandbox, "def answer():\n    return 1")) == 1
    assert sandbox.left_behind == []


LOOKS_AROUND = """
import ctypes, os, resource, socket


def answer():
    library = ctypes.CDLL(None, use_errno=True)
    status = dict(line.split(":", 1) for line in open("/proc/self/status") if ":" in line)
    limits = [getattr(resource, name) for name in ("RLIMIT_DATA", "RLIMIT_CPU", "RLIMIT_NPROC", "RLIMIT_FSIZE", "RLIMIT_CORE")]
    return {
        "rights": [status[name].strip() for name in status if name.startswith(("Cap", "NoNewPrivs", "Uid", "Gid"))],
        "limits": [list(resource.getrlimit(limit)) for limit in limits],
        "may make a user namespace": library.unshare(0x10000000) == 0,
        "may mount": library.mount(b"none", b"/tmp", b"tmpfs", 0, None) == 0,
        "folders": sorted(os.listdir("/")) + sorted(os.listdir("/opt")),
        "mounts": sorted(line.split()[4] for line in open("/proc/self/mountinfo")),
        "environment": sorted(f"{name}={value}" for name, value in os.environ.items() if name not in ("PWD", "OLDPWD", "_")),
        "interfaces": [line.split(":")[0].strip() for line in open("/proc/net/dev") if ":" in line],
        "name": socket.gethostname(),
        "here": os.getcwd(),
        "files": sorted(os.listdir(".")),
        "descriptors": sorted(int(name) for name in os.listdir("/proc/self/fd")),
        "mask": oct(os.umask(0)),
    }
"""


def test_a_warm_sandbox_is_as_closed_as_a_cold_one(monkeypatch, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    seen = {}
    for kind in ("warm", "cold"):
        with monkeypatch.context() as patched:
            patched.setattr(WARM, "_tries", 0 if kind == "warm" else 99)
            sandbox = SandboxProcess(["import torch"], submission=tmp_path, limits=LIMITS)
            try:
                seen[kind] = outcome(call(sandbox, LOOKS_AROUND))
                assert len(sandbox.watch._first) == (2 if kind == "warm" else 1), "it was not started so"
                (folder,) = {mount for mount in seen[kind]["mounts"] if mount.startswith("/tmp/sandbox-")}
                seen[kind]["mounts"].remove(folder)
            finally:
                sandbox.close()
    assert seen["warm"] == seen["cold"]
    assert not seen["warm"]["may make a user namespace"] and not seen["warm"]["may mount"]
    assert seen["warm"]["rights"][-1] == "1" and "0" * 16 in seen["warm"]["rights"]
    assert seen["warm"]["interfaces"] == ["lo"] and "mine.txt" in seen["warm"]["files"]


def test_where_no_process_may_move_in_the_sandbox_starts_cold(monkeypatch, tmp_path):
    def refused(*_):
        raise WarmError("setns: Operation not permitted")

    monkeypatch.setattr(WARM, "move_in", refused)
    sandbox = SandboxProcess(["import torch"], submission=tmp_path, limits=LIMITS)
    try:
        assert outcome(call(sandbox, "def answer():\n    return 1")) == 1
    finally:
        sandbox.close()


def test_a_template_that_was_killed_is_made_anew(tmp_path):
    for _ in range(2):
        sandbox = SandboxProcess(["import torch"], submission=tmp_path, limits=LIMITS)
        try:
            assert outcome(call(sandbox, "def answer():\n    return 1")) == 1
        finally:
            sandbox.close()
        WARM._template._process.kill()
        WARM._template._process.wait()
