"""Right answers keep all of their points, whatever else their authors have done to their notebooks.

Every unit's solutions, behind the cells of forty odd but honest students at once.
"""

import builtins
import re

import pytest
import torch
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell
from nbgrader import utils

from autograder.building.build import instructor_notebook
from autograder.checking.masters import exercises_of, solution_cells, units, without_markers
from autograder.grading.execute import execute
from autograder.sandbox.enclosure import sandbox_problem

pytestmark = pytest.mark.skipif(sandbox_problem() is not None, reason=f"no sandbox: {sandbox_problem()}")

BEFORE = {
    "double precision": "import torch\ntorch.set_default_dtype(torch.float64)",
    "seeds": "import random\nimport numpy as np\nimport torch\nrandom.seed(0)\nnp.random.seed(0)\ntorch.manual_seed(0)",
    "a plotting style": "import matplotlib.pyplot as plt\nplt.style.use('dark_background')\nplt.rcParams['figure.dpi'] = 300",
    "inline plots": "%matplotlib inline\n%config InlineBackend.figure_format = 'svg'",
    "autoreload": "%load_ext autoreload\n%autoreload 2",
    "loggers": "import logging\nlogging.basicConfig(level=logging.DEBUG, force=True)\nlogger = logging.getLogger('peftlab')",
    "print options": (
        "import numpy as np\nimport torch\ntorch.set_printoptions(precision=1, sci_mode=True)\nnp.set_printoptions(precision=1)"
    ),
    "tensors that print their shapes": "import torch\ntorch.Tensor.__repr__ = lambda self: str(tuple(self.shape))",
    "threads": "import os\nimport torch\ntorch.set_num_threads(3)\nos.environ['OMP_NUM_THREADS'] = '7'",
    "determinism": "import torch\ntorch.use_deterministic_algorithms(True)\ntorch.backends.mkldnn.enabled = False",
    "fast products": "import torch\ntorch.set_float32_matmul_precision('medium')",
    "every value shown": (
        "from IPython.core.interactiveshell import InteractiveShell\nInteractiveShell.ast_node_interactivity = 'all'"
    ),
    "a timer in a thread": (
        "import threading\nimport time\nthreading.Thread(target=lambda: time.sleep(30), daemon=True).start()"
    ),
    "a handler of interrupts": "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)",
    "no garbage collection": "import gc\ngc.disable()",
    "deep recursion": "import sys\nsys.setrecursionlimit(100_000)",
    "numpy that raises": "import numpy as np\nnp.seterr(all='raise')",
    "few decimals": "import decimal\ndecimal.getcontext().prec = 3",
    "a locale": "import locale\nlocale.setlocale(locale.LC_ALL, 'C')",
    "paths": "import sys\nsys.path.insert(0, '/content/drive/MyDrive')\nsys.path.remove('') if '' in sys.path else None",
    "Colab's habits": "!ls\ntry:\n    from google.colab import drive\nexcept ImportError:\n    drive = None",
    "names of ours": "helpers = tasks = results = memory = plots = hidden = exercise = driver = case = []",
    "functions of ours": (
        "def fill(model): return model\n\ndef seeing(x): return x\n\nclass Exercise: pass\n\ndef drive(*x): return None"
    ),
    "a module of ours, replaced": "import types\npeftlab = types.SimpleNamespace(memory=3)\nautograder = 'mine'",
    "constants of mathematics": "from math import *\nfrom fractions import Fraction",
    "no more builtins than needed": (
        "import builtins\nold_print = print\nbuiltins.print = lambda *a, **k: old_print('>', *a, **k)"
    ),
    "IPython's names": "In = Out = _ = __ = exit = quit = display = 3",
    "an error": "1 / 0",
    "no Python": "this is a note to myself: (",
    "environment": "import os\nos.environ['HOME'] = '/nowhere'\nos.environ.pop('PATH', None)",
    "temporary files elsewhere": "import tempfile\ntempfile.tempdir = '/nowhere'",
    "a folder that is gone": (
        "import os\nimport tempfile\nwith tempfile.TemporaryDirectory(dir='/tmp') as folder:\n    os.chdir(folder)"
    ),
    "memory profiling": "import tracemalloc\ntracemalloc.start()",
    "at the end": "import atexit\natexit.register(lambda: 1 / 0)",
    "arguments": "import sys\nsys.argv = ['train.py', '--lr', '1e-3']\n__name__ = 'train'",
}
AFTER = {
    "warnings as errors": "import warnings\nwarnings.simplefilter('error')",
    "anomaly detection": "torch.autograd.set_detect_anomaly(True)",
    "no gradients": "torch.set_grad_enabled(False)\ntorch.inference_mode().__enter__()",
    "tensors without numbers": "torch.set_default_device('meta')",
    "an optimizer of one's own": "torch.optim.AdamW = torch.optim.SGD",
    "other weights at the start": "torch.nn.init.normal_ = torch.nn.init.zeros_\ntorch.manual_seed = lambda seed: None",
    "a decorator": (
        "import functools\n\n\ndef remembered(answer):\n    if isinstance(answer, type):\n        return answer\n\n"
        "    @functools.wraps(answer)\n    "
        "def called(*args, **kwargs):\n        CALLS[answer.__name__] = CALLS.get(answer.__name__, 0) + 1\n"
        "        return answer(*args, **kwargs)\n    return called\n\n\nCALLS = {}"
    ),
    "no more output": "import sys\nsys.stdout.close()",
}  # fmt: skip


def odd(unit: str) -> NotebookNode:
    """Return the unit's notebook, without what no mark depends on, with its solutions and all of these cells."""
    notebook = instructor_notebook(unit)
    kept = [cell for cell in notebook.cells if utils.is_grade(cell) or utils.is_solution(cell) or cell["id"] == "setup"]
    place = next(place for place, cell in enumerate(kept) if cell["id"] == "setup")
    for number, cell in enumerate(solution_cells(kept)):
        source = re.sub(r"^(?=def |class )", "@remembered\n", without_markers(cell.source), flags=re.MULTILINE)
        cell.source = ("%%time\n", "%%capture captured\n", "")[number % 3] + source
    before = [new_code_cell(source) for source in [*BEFORE.values(), _shadowing(kept)]]
    after = [new_code_cell(source) for source in AFTER.values()]
    notebook.cells = [*kept[:place], *before, kept[place], *after, *kept[place + 1 :]]
    return notebook


def _shadowing(cells: list[NotebookNode]) -> str:
    """Give variables the names of builtins, and import everything from torch, as far as the unit's own code does not mind."""
    used = set(re.findall(r"\w+", " ".join([*(cell.source for cell in cells), *AFTER.values()])))
    names = [name for name in dir(builtins) if name not in used and not name.startswith("_") and name.islower()]
    everything = "" if used & set(torch.__all__) & set(dir(builtins)) else "\nfrom torch import *"
    return f"{' = '.join(names)} = 'mine'{everything}"


@pytest.mark.parametrize("unit", [unit for unit in units() if exercises_of(unit)])
def test_odd_notebooks_have_full_marks(unit):
    notebook = odd(unit)
    execution = execute(notebook, unit)
    failures = {}
    for cell, outputs in zip(notebook.cells, execution.outputs, strict=True):
        if utils.is_grade(cell) and utils.is_locked(cell):
            said = [output["evalue"] for output in outputs if output["output_type"] == "error"]
            failures |= {cell["id"]: said} if said else {}
    assert failures == {}
