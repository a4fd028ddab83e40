"""Submissions that try to get marks which they did not earn, or to do harm; and ones that are only unusual.

Each is the right solution with one cell replaced, or with something done to its notebook; `lost` names the checks whose points
it must lose. A check that is not named there is answered rightly, and must keep its points.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import nbformat
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell

from autograder.building.build import instructor_notebook
from autograder.checking.masters import SOLUTIONS, solution_cells, without_markers

UNIT = "08_lora"
SOLUTION = {cell["id"]: without_markers(cell.source) for cell in solution_cells(instructor_notebook(UNIT).cells)}
MERGE = SOLUTION["merge"]
WRONG_MERGE = MERGE.replace("layer.scaling * ", "", 1)
DEFINES = "def merge(layer):\n    {}\n\n\ndef unmerge(layer):\n    {}\n"


@dataclass
class Attack:
    """One submission."""

    answers: dict[str, str] = field(default_factory=dict)
    lost: tuple[str, ...] = ()
    notebook: Callable[[NotebookNode], None] = lambda notebook: None
    said: str = ""
    """Stands in the message of the first lost check, or in the notes of the report if none is lost."""


def first_cell(source: str) -> Callable[[NotebookNode], None]:
    """Run this before everything else."""
    return lambda notebook: notebook.cells.insert(0, new_code_cell(source))


def wrong_and(source: str, lost: tuple[str, ...] = ("check-merge",), said: str = "") -> Attack:
    """A wrong merge, helped by what runs before everything else."""
    return Attack({"merge": WRONG_MERGE}, lost, first_cell(source), said)


def merge_that(body: str, lost: tuple[str, ...] = ("check-merge",), said: str = "") -> Attack:
    """A merge whose functions do this."""
    return Attack({"merge": DEFINES.format(body, body)}, lost, said=said)


def marked(name: str, **marks: object) -> Callable[[NotebookNode], None]:
    """Edit what nbgrader wrote into a cell's metadata."""
    return lambda notebook: notebook.cells[_index(notebook, name)].metadata.nbgrader.update(marks)


def _index(notebook: NotebookNode, name: str) -> int:
    return next(i for i, cell in enumerate(notebook.cells) if cell.metadata.get("nbgrader", {}).get("grade_id") == name)


CHEATS = {
    "redefines-the-check": wrong_and("def check_merge(*answers): pass"),
    "replaces-the-check-later": Attack({"merge": WRONG_MERGE + "\ncheck_merge = lambda *answers: None"}, ("check-merge",)),
    "patches-torch": wrong_and(
        "import torch\ntorch.allclose = torch.equal = lambda *a, **k: True\ntorch.Tensor.__ne__ = lambda *a: False"
    ),
    "equals-everything": Attack(
        {
            "merge": MERGE
            + """
import torch
class Same(torch.Tensor):
    def __eq__(self, other): return True
    def __sub__(self, other): return torch.zeros(())
right = merge
def merge(layer):
    right(layer)
    layer.base.weight.data = layer.base.weight.data.mul(2).as_subclass(Same)
"""
        },
        ("check-merge",),
    ),
    "transforms-its-input": wrong_and(
        "blank = lambda lines: ['pass\\n'] if 'check_merge(' in ''.join(lines) else lines\n"
        "get_ipython().input_transformers_cleanup.append(blank)"
    ),
    "strips-asserts": wrong_and(
        "import ast\nclass Strip(ast.NodeTransformer):\n"
        "    def visit_Assert(self, node): return ast.Pass()\n    def visit_Raise(self, node): return ast.Pass()\n"
        "get_ipython().ast_transformers.append(Strip())",
    ),
    "imports-the-spec": Attack({"merge": "from autograder.checks.lora.merge import merge, unmerge"}, ("check-merge",)),
    "calls-the-library": Attack(
        {
            "merge": "from peft.tuners.lora import LoraLayer\n"
            + MERGE.replace("layer.scaling", "LoraLayer and layer.scaling", 1)
        },
        ("check-merge",),
        said="not defined",
    ),
    "runs-the-master": Attack(
        {
            "merge": f"""
import re, pathlib
text = pathlib.Path({str(SOLUTIONS / UNIT / (UNIT + ".py"))!r}).read_text()
exec(re.search(r"def merge.*?### END", text, re.S)[0])
"""
        },
        ("check-merge",),
        said="not defined",
    ),
    "searches-the-disk": Attack(
        {
            "merge": """
import os
wanted = ("08_lora.py", "hidden_cases.py", "gradebook.db")
found = [os.path.join(folder, file) for folder, _, files in os.walk("/") for file in files if file in wanted]
assert found
exec(open(found[0]).read())
"""
        },
        ("check-merge",),
    ),
    "returns-a-pickle": merge_that(
        "import torch\n    class Evil:\n        def __reduce__(self):\n"
        '            return (exec, (\'open("/tmp/pickled", "w")\',))\n'
        "    save = torch.save\n    torch.save = lambda value, file: save({'stolen': Evil()}, file)",
    ),
    "returns-a-bomb": merge_that(
        "import torch, zipfile\n    def save(value, file):\n"
        "        with zipfile.ZipFile(file, 'w', zipfile.ZIP_DEFLATED) as z:\n"
        "            z.writestr('archive/data.pkl', bytes(2**28))\n    torch.save = save",
    ),
    "forges-replies": wrong_and(
        "from IPython.display import publish_display_data\nimport torch, base64, io\n"
        "publish_display_data({'application/x-observation': base64.b64encode(b'x').decode(), 'text/plain': ''})"
    ),
    "answers-with-nothing": merge_that("raise SystemExit"),
    "raises-the-points": Attack({"merge": WRONG_MERGE}, ("check-merge",), marked("check-merge", points=100)),
    "ungrades-a-cell": Attack(
        {"merge": WRONG_MERGE}, ("check-merge",), marked("check-merge", grade=False, locked=False, solution=True)
    ),
    "fakes-its-memory": Attack(
        {
            "lora-linear": "import resource\nresource.getrusage = lambda *a: None\n"
            + SOLUTION["lora-linear"].replace("self.base = base", "self.spare = [base.weight.detach() + 0]; self.base = base")
        },
        ("check-lora-memory",),
        said="process grows",
    ),
}

HARM = {
    "loops": merge_that("while True: pass", said="processor time"),
    "loops-in-a-cell": Attack({"merge": "while True: pass"}, ("check-merge",), said="not defined"),
    "ignores-interrupts": merge_that(
        "import signal\n    [signal.signal(s, signal.SIG_IGN) for s in (2, 15)]\n    while True:\n"
        "        try:\n            while True: pass\n        except BaseException: pass",
        said="processor time",
    ),
    "sleeps": merge_that("import time; time.sleep(10**6)", said="did not end"),
    "stops-itself": merge_that("import os, signal; os.kill(os.getpid(), signal.SIGSTOP)", said="did not end"),
    "exits": merge_that("import os; os._exit(0)", said="ended its own process"),
    "crashes": merge_that("import ctypes; ctypes.string_at(0)", said="ended its own process"),
    "kills-everyone": merge_that("import os; os.kill(-1, 9); os.kill(1, 9); os.killpg(0, 9)"),
    "eats-memory": merge_that("x = []\n    while True: x.append(bytearray(2**28))", said="emory"),
    "eats-memory-in-children": merge_that(
        "import os, time\n    for _ in range(8):\n        if os.fork() == 0:\n            x = bytearray(2**30)\n"
        "            for i in range(0, 2**30, 4096): x[i] = 1\n            time.sleep(100)\n    time.sleep(100)",
        said="GiB of memory",
    ),
    "forks": merge_that("import os\n    while True: os.fork()"),
    "fills-the-disk": merge_that("f = open('/tmp/full', 'wb')\n    while True: f.write(bytes(2**24))"),
    "floods-the-output": Attack(
        {"merge": "for _ in range(50): print('x' * 2**20)\n" + MERGE}, (), first_cell("print('y' * 2**24)")
    ),
    "leaves-a-process": Attack(
        {"merge": MERGE}, (), first_cell("import subprocess; subprocess.Popen(['sleep', '4242'])"), "left processes running"
    ),
    "calls-home": wrong_and("import urllib.request\nurllib.request.urlopen('http://127.0.0.1:{port}/', timeout=5)"),
    "writes-the-gradebook": wrong_and(
        "import sqlite3\nsqlite3.connect('{root}/gradebook.db').execute('update grade set auto_score = 100')"
    ),
    "overwrites-others": wrong_and("open('{root}/submitted/right/08_lora/08_lora.ipynb', 'w').write('')"),
    "prints-a-script": Attack(
        {},
        (),
        first_cell(
            "from IPython.display import HTML, display\nprint('<script>alert(1)</script>')\n"
            "display(HTML('<script>alert(2)</script><b onclick=alert(3)>bold</b>'))"
        ),
    ),
}


def _copy_a_graded_cell(notebook: NotebookNode) -> None:
    for name in ("check-merge", "merge"):
        notebook.cells.append(nbformat.from_dict(notebook.cells[_index(notebook, name)]))


def _reverse(notebook: NotebookNode) -> None:
    """The graded cells before the answers."""
    graded = [cell for cell in notebook.cells if cell.metadata.get("nbgrader", {}).get("points")]
    others = [cell for cell in notebook.cells if cell not in graded]
    notebook.cells = [*graded, *others]


def _delete(*names: str) -> Callable[[NotebookNode], None]:
    def edit(notebook: NotebookNode) -> None:
        for name in names:
            del notebook.cells[_index(notebook, name)]

    return edit


def _retype(notebook: NotebookNode) -> None:
    for name in ("check-merge", "merge"):
        index = _index(notebook, name)
        cell = notebook.cells[index]
        notebook.cells[index] = new_markdown_cell(cell.source, id=cell["id"], metadata=cell.metadata)


def _colab(notebook: NotebookNode) -> None:
    """As Colab saves it: other kernelspec, ids in the metadata, nothing that nbgrader put there."""
    notebook.metadata = nbformat.from_dict(
        {"colab": {"provenance": []}, "kernelspec": {"name": "ir", "display_name": "R"}, "accelerator": "GPU"}
    )
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict({"id": cell["id"], "outputId": "1", "colab": {"base_uri": "https://localhost"}})
        del cell["id"]
    notebook.nbformat_minor = 0


def _vs_code(notebook: NotebookNode) -> None:
    for cell in notebook.cells:
        cell.metadata["vscode"] = {"languageId": "python"}
    notebook.metadata.language_info = nbformat.from_dict({"name": "python", "version": "3.12.1"})


def _older_release(notebook: NotebookNode) -> None:
    """Other words in a locked cell, a check that is no longer there, an old form of the metadata."""
    notebook.cells[_index(notebook, "check-merge")].source = "check_merge(merge, unmerge)  # 2 points"
    notebook.cells.append(
        new_code_cell(
            "check_gone(merge)", metadata={"nbgrader": {"grade_id": "gone", "grade": True, "locked": True, "points": 3}}
        )
    )
    for cell in notebook.cells:
        cell.metadata.get("nbgrader", {}).pop("schema_version", None)


def _fifty_megabytes(notebook: NotebookNode) -> None:
    cell = next(cell for cell in notebook.cells if cell.cell_type == "code")
    cell.outputs = [nbformat.v4.new_output("stream", name="stdout", text="x" * 50 * 2**20)]


UNUSUAL = {
    "right": Attack(),
    "warns": Attack({"merge": "import warnings, sys\nwarnings.warn('mind the gap'); print('!', file=sys.stderr)\n" + MERGE}),
    "warns-when-called": Attack(
        {"merge": MERGE.replace("    if ", "    import sys; print('here', file=sys.stderr)\n    if ", 1)}
    ),
    "deletes-a-check": Attack({"merge": WRONG_MERGE}, ("check-merge",), _delete("check-merge")),
    "deletes-an-answer": Attack({}, ("check-merge",), _delete("merge"), "not written yet"),
    "deletes-the-set-up": Attack({}, (), _delete("setup"), "setup was missing"),
    "copies-a-check": Attack({}, (), _copy_a_graded_cell, "more than once"),
    "moves-the-checks": Attack({}, (), _reverse, "had been moved"),
    "retypes-cells": Attack({}, (), _retype, "had become a markdown cell"),
    "edits-a-check": Attack({"merge": WRONG_MERGE, "check-merge": "pass"}, ("check-merge",)),
    "colab": Attack({}, (), _colab, "had lost its nbgrader metadata"),
    "vs-code": Attack({}, (), _vs_code),
    "older-release": Attack({}, (), _older_release, "had been edited"),
    "fifty-megabytes": Attack({}, (), _fifty_megabytes),
    "syntax-error": Attack({"merge": MERGE + "\ndef ("}, ("check-merge",), said="not defined"),
}
ALL = CHEATS | HARM | UNUSUAL


def hostile_to(attack: Attack, root: Path, port: int) -> Attack:
    """Tell an attack where to strike."""

    def edit(notebook: NotebookNode) -> None:
        attack.notebook(notebook)
        for cell in notebook.cells:
            cell.source = cell.source.replace("{root}", str(root)).replace("{port}", str(port))

    return Attack(attack.answers, attack.lost, edit, attack.said)
