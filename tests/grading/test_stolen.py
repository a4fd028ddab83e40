"""Points for memory that is wasted: answers that are right but for their bytes, and hide these. None gets the check's points.

Each theft is the solution of a unit with cells replaced. What is measured inside of the student's process can be forged
there; what decides is how large the system says that the process was.
"""

import contextlib
from collections.abc import Iterator

import pytest
from nbformat import NotebookNode
from nbgrader import utils

from autograder.building.build import instructor_notebook
from autograder.checking.exercise import Exercise
from autograder.checking.masters import exercises_of, load_hidden_cases, solution_cells, units, without_markers
from autograder.grading.execute import UndecidedError, _Executor, execute
from autograder.sandbox.enclosure import Limits, sandbox_problem

pytestmark = pytest.mark.skipif(sandbox_problem() is not None, reason=f"no sandbox: {sandbox_problem()}")

FORGED_METERS = """
import builtins, torch, peftlab.memory, peftlab.tracker
_step, _exec, _save = peftlab.memory.tensors_of_step, builtins.exec, torch.save
def _lies(*given, **named):
    return _step(*given, **named) | {"saved": []}
def _says_less(source, *scopes):
    if isinstance(source, str):
        source = source.replace('"saved": [whole_storage(tensor) for tensor in saved.values()]', '"saved": []')
    return _exec(source, *scopes)
def _sends_less(value, *given, **named):
    if isinstance(value, dict):
        value = value | {name: [] for name in ("saved",) if name in value}
    return _save(value, *given, **named)
class _NoHooks:
    def __init__(self, *hooks): pass
    def __enter__(self): return self
    def __exit__(self, *raised): return None
peftlab.memory.tensors_of_step = _lies
builtins.exec = _says_less
torch.save = _sends_less
torch.autograd.graph.saved_tensors_hooks = _NoHooks
peftlab.tracker.PeftMemTracker.bytes_by_category = lambda self, which="current": __import__("collections").defaultdict(int)
"""
"""Every meter that a driver of ours uses, made to say less."""


def solution(unit: str) -> dict[str, str]:
    """Return the sources of the unit's solution cells, by id."""
    return {cell["id"]: without_markers(cell.source) for cell in solution_cells(instructor_notebook(unit).cells)}


def edited(source: str, edits: dict[str, str]) -> str:
    """Return a source with these pieces replaced, each of which has to be there once."""
    for old, new in edits.items():
        assert source.count(old) == 1, (old, source.count(old))
        source = source.replace(old, new)
    return source


def in_class_body(source: str, name: str, code: str) -> str:
    """Return a source in which a class runs this code where it is defined."""
    indented = "\n".join("    " + line for line in [f"exec({code!r}, {{}})"])
    head = next(line for line in source.splitlines() if line.startswith(f"class {name}"))
    return source.replace(head, f"{head}\n{indented}", 1)


# ---- many ways to one check: LoRA, with B A as a whole matrix -------------------------------------------------------------
LORA = solution("08_lora")["lora-linear"]
SPARING, WASTEFUL = "(x @ self.lora_A.T) @ self.lora_B.T", "x @ (self.lora_B @ self.lora_A).T"
WASTES = edited(LORA, {SPARING: WASTEFUL})
INIT = "        super().__init__()\n"
PRODUCT = "return self.base(x) + (x @ self.lora_A.T) @ self.lora_B.T * self.scaling"
INSTEAD = {
    "computed in a child": (
        "import os\nimport signal\nread, wrote = os.pipe()\n"
        "if os.fork() == 0:\n    large = self.lora_B @ self.lora_A\n    os.write(wrote, b'done')\n    os._exit(0)\n"
        "os.wait()\n"
    ),
    "kept in a file": (
        "import tempfile\nfrom numpy.lib.format import open_memmap\nshape = len(self.lora_B), self.lora_A.shape[1]\n"
        "large = open_memmap(tempfile.mktemp(), 'w+', 'float32', shape=shape)\n"
        "large[:] = (self.lora_B @ self.lora_A).detach().numpy()\n"
    ),
    "kept in shared memory": "large = (self.lora_B @ self.lora_A).detach().share_memory_()\n",
    "kept in a module": "import math\nmath.large = getattr(math, 'large', []) + [self.base.weight.detach().clone()]\n",
    "kept in a global list": "KEPT.append(self.base.weight.detach().clone())\n",
    "done with numpy": "large = self.lora_B.detach().numpy() @ self.lora_A.detach().numpy()\n",
    "kept by a thread": (
        "import threading\nthreading.Thread(target=lambda large: __import__('time').sleep(60), "
        "args=[self.base.weight.detach().clone()], daemon=True).start()\n"
    ),
}


def and_also(work: str) -> str:
    """Return a right LoRALinear that does some more in `forward`."""
    indented = "".join(f"        {line}\n" for line in work.splitlines())
    return "KEPT = []\n\n\n" + edited(LORA, {f"        {PRODUCT}": f"{indented}        {PRODUCT}"})


LORA_THEFTS = {
    "nothing is hidden": [WASTES],
    "meters forged in an earlier cell": [FORGED_METERS, WASTES],
    "meters forged in the class body": [in_class_body(WASTES, "LoRALinear", FORGED_METERS)],
    "meters forged in __init__": [edited(WASTES, {INIT: f"{INIT}        exec({FORGED_METERS!r}, {{}})\n"})],
    "meters forged in the cell of the answer": [f"{FORGED_METERS}\n{WASTES}\nLoRALinear.lies = _lies"],
    "a step that is not taken": [
        in_class_body(
            edited(WASTES, {"return self.base(x) + ": "return self.base(x) if len(self.lora_B) > 1000 else self.base(x) + "}),
            "LoRALinear",
            "import peftlab.memory\npeftlab.memory.tensors_of_step = lambda *given, **named: {}",
        )
    ],
    "nothing done where it is large": [
        edited(WASTES, {"return self.base(x) + ": "return self.base(x) if len(self.lora_B) > 1000 else self.base(x) + "})
    ],
    "renamed to a kernel": [
        in_class_body(WASTES, "LoRALinear", "import ctypes\nctypes.CDLL(None).prctl(15, b'ipykernel_launch', 0, 0, 0)")
    ],
    "a child that is called like a kernel": [
        in_class_body(
            WASTES,
            "LoRALinear",
            "import subprocess\nsubprocess.Popen(['sleep', '60'], executable='/bin/sleep', start_new_session=True)",
        )
    ],
    "the system's own figures forged": [
        in_class_body(
            WASTES,
            "LoRALinear",
            "import os, resource\nresource.getrusage = lambda who: None\nos.wait4 = None\n"
            "try:\n    open('/proc/self/clear_refs', 'w').write('5')\nexcept OSError:\n    pass",
        )
    ],
} | {f"right, and a large matrix is {how}": [and_also(work)] for how, work in INSTEAD.items()}
BALLAST = "BALLAST = [torch.ones(2**26)]\n\n\n" + edited(
    WASTES, {"        if self.merged": "        BALLAST.clear()\n        if self.merged"}
)


@pytest.fixture(autouse=True)
def _without_diagnosis(monkeypatch):
    """Naming a mistake takes longer than finding that there is one."""
    monkeypatch.setattr(Exercise, "diagnose", lambda *given: None)


@pytest.fixture(scope="module")
def lora() -> Iterator[tuple[_Executor, NotebookNode]]:
    """An executor, which has one sandbox for all thefts, and the cell that checks memory."""
    notebook = instructor_notebook("08_lora")
    setup = [cell.source for cell in notebook.cells if cell["id"] == "setup"]
    executor = _Executor("08_lora", setup, None, Limits(), True)
    for source in setup:
        exec(compile(source, "<set-up cell>", "exec"), executor._here)
    yield executor, next(cell for cell in notebook.cells if cell["id"] == "check-lora-memory")
    executor.close()


def errors(outputs: list[dict]) -> list[str]:
    return [output.evalue for output in outputs if output.output_type == "error"]


@pytest.mark.xdist_group("stolen-lora")
def test_the_solution_has_the_points(lora):
    executor, check = lora
    assert errors(executor._check(check, [LORA])) == []


@pytest.mark.xdist_group("stolen-lora")
@pytest.mark.parametrize("theft", LORA_THEFTS)
def test_a_large_matrix_cannot_be_hidden(lora, theft):
    executor, check = lora
    with contextlib.suppress(UndecidedError):  # no mark, and a person has to look
        assert errors(executor._check(check, LORA_THEFTS[theft]))


@pytest.mark.xdist_group("stolen-lora")
def test_ballast_that_is_given_up_in_the_call_is_for_a_person_to_judge(lora):
    executor, check = lora
    with pytest.raises(UndecidedError, match="held before the call"):
        executor._check(check, [in_class_body(BALLAST, "LoRALinear", FORGED_METERS)])


# ---- a notebook a unit, whose answers all waste, each in its own way ------------------------------------------------------
LINE = "the line itself"
KEEPS = "KEPT.extend(p.detach().clone() for p in {}.parameters())"
THEFTS: dict[str, dict[str, tuple[str, str, list[str]]]] = {
    "03_layer_freezing": {
        "check-freezing-memory": ("train-last", "layers[:count].requires", [LINE, KEEPS.format("model")]),
        "check-run-checkpointed": (
            "run-checkpointed",
            "x = checkpoint(",
            [
                "copied = lambda t: (t.dtype, t.detach().contiguous().view(torch.uint8).numpy().copy())",
                "with torch.autograd.graph.saved_tensors_hooks(copied, lambda kept: torch.from_numpy(kept[1]).view(kept[0])):",
                "    x = layer(x, cos, sin, None)",
            ],
        ),
    },
    "04_bitfit": {
        "check-train": ("train-biases", "biases = [", [LINE, KEEPS.format("model")]),
        "check-bias-memory": ("biased-linear", "return x @ weight.T", ["KEPT.append(x.clone())", LINE]),
    },
    "05_prompt_tuning": {
        "check-prompted-memory": ("prompted-model", "self.soft_prompt =", [LINE, KEEPS.format("base")]),
    },
    "06_prefix_tuning": {
        "check-prefix-memory": (
            "prefix-attention",
            "mixed = F.scaled",
            ["KEPT.append(torch.zeros(batch, queries.shape[1], seq, seq).softmax(-1))", LINE],
        ),
        "check-prefix-model": ("prefix-model", "self.prefix = prefix", [LINE, KEEPS.format("base")]),
    },
    "07_adapters": {
        "check-adapter-memory": ("adapter", "return h + self.up", ["KEPT.append(h.detach().clone())", LINE]),
        "check-adapted-memory": ("add-adapters", "like = model", [LINE, KEEPS.format("model")]),
    },
    "10_qlora": {
        "check-fast-dequantize": (
            "fast-dequantize",
            "# A part at a time",
            [
                "with torch.utils._python_dispatch._disable_current_modes():  # no tracker sees this",
                "    if packed.device.type == 'cpu':",
                "        index = torch.stack([packed >> 4, packed & 15], 1).flatten().long()",
                LINE,
            ],
        ),
        "check-nf4-memory": (
            "nf4-linear",
            "return x @ layer.dequantized().T",
            ["weight = layer.dequantized()", "KEPT.append(weight)", "return x @ weight.T"],
        ),
        "check-qlora-layer": (
            "qlora-layer",
            "update = x @",
            ["update = x @ (self.lora_B.to(x.dtype) @ self.lora_A.to(x.dtype)).T"],
        ),
        "check-qlora": ("qlora", "base = quantize(", ["KEPT.append(model.get_submodule(name).weight.data)", LINE]),
        "check-prepare": ("prepare", "for parameter in", ["KEPT.extend(p.detach().float() for p in model.parameters())", LINE]),
    },
    "15_eight_bit_optimizer": {
        "check-adamw-8bit": ("adamw-8bit", "decayed = parameter", ["KEPT.extend([first.clone(), second.clone()])", LINE]),
    },
}
"""By unit and check: the cell whose answer wastes, how one of its lines begins, and the lines in the place of that."""


def with_lines(source: str, beginning: str, lines: list[str]) -> str:
    """Return a source with other lines in the place of the one that begins so, as far in as that was."""
    (old,) = [line for line in source.splitlines() if line.strip().startswith(beginning)]
    indent = old[: len(old) - len(old.lstrip())]
    return source.replace(old, "\n".join(old if line == LINE else indent + line for line in lines))


def stolen(unit: str) -> NotebookNode:
    """Return the unit's notebook, with checks that rest on memory and answers that waste it, and forge every meter."""
    notebook, thefts = instructor_notebook(unit), THEFTS[unit]
    notebook.cells = [cell for cell in notebook.cells if cell["id"] in ("setup", *thefts) or solution_cells([cell])]
    for cell in solution_cells(notebook.cells):
        cell.source = without_markers(cell.source)
        for place, beginning, lines in thefts.values():
            if place == cell["id"]:
                forging = in_class_body("class Forging:\n    pass\n\n\nKEPT = [Forging][1:]", "Forging", FORGED_METERS)
                cell.source = f"{forging}\n\n\n{with_lines(cell.source, beginning, lines)}"
    return notebook


@pytest.mark.parametrize("unit", [pytest.param(unit, marks=pytest.mark.xdist_group(f"stolen-{unit}")) for unit in THEFTS])
def test_what_is_kept_where_no_meter_looks_costs_the_points_for_memory(unit):
    notebook = stolen(unit)
    said = {}
    for cell, outputs in zip(notebook.cells, execute(notebook, unit).outputs, strict=True):
        if utils.is_grade(cell) and utils.is_locked(cell):
            said[cell["id"]] = errors([NotebookNode(output) for output in outputs])
    assert said.keys() == THEFTS[unit].keys()
    for check, messages in said.items():
        assert messages and "peak bytes should be at most" in messages[0], f"{check}: {messages}"


def test_every_unit_with_a_case_of_measured_memory_is_stolen_from():
    measured = {
        unit
        for unit in units()
        for exercise in exercises_of(unit)
        for label in load_hidden_cases(unit).CASES[exercise]
        if "by the memory of the whole process" in label
    }
    assert measured == {*THEFTS, "08_lora"}
