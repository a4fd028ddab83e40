"""As on Colab: a notebook alone, in an environment without the course, which its first cell installs, runs to its end.

`make fresh` runs this with Colab's own packages, with the oldest releases that pyproject.toml allows, and with the newest.
PyTorch brings CUDA along, gigabytes of it, so `make test` skips it. PEFTLAB_FRESH is `colab`, `oldest`, `newest`, or the folder
of a virtual environment to run in, from which the course is removed first. Colab's packages want Python 3.11 or 3.12.
"""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_core.utils import run_sync
from nbclient import NotebookClient
from nbgrader.preprocessors import ClearHiddenTests

from autograder.building.build import ROOT, instructor_notebook
from autograder.checking.masters import units

WANTED = os.environ.get("PEFTLAB_FRESH", "")
COLAB = Path(__file__).with_name("colab_image.txt")
USUAL = ("ipykernel", "ipywidgets")
"""What a notebook on Colab has besides our dependencies, all of which Colab has in some version or installs."""

pytestmark = [
    pytest.mark.skipif(not WANTED, reason="downloads gigabytes; `make fresh` runs it"),
    pytest.mark.slow,
    pytest.mark.xdist_group("fresh"),
]


def requirements(which: str) -> list[str]:
    """Return what pip is to install: Colab's packages, or our dependencies at their lower bounds or at none."""
    if which == "colab":
        return ["--requirement", str(COLAB)]
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    pairs = [requirement.split(">=") for requirement in declared]
    return [f"{name}=={bound}.*" if which == "oldest" else name for name, bound in pairs]


@pytest.fixture(scope="session")
def python(tmp_path_factory) -> str:
    """The interpreter of an environment that has what Colab has."""
    if WANTED not in ("colab", "oldest", "newest"):
        return str(Path(WANTED) / "bin" / "python")
    folder = tmp_path_factory.mktemp("fresh")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = str(folder / "bin" / "python")
    subprocess.run([python, "-m", "pip", "install", "--quiet", *requirements(WANTED), *USUAL], check=True)
    return python


def versions(python: str) -> dict[str, str]:
    """Return the version of every package in the environment."""
    command = [python, "-m", "pip", "list", "--format=json", "--disable-pip-version-check"]
    listed = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return {package["name"]: package["version"] for package in listed}


@pytest.mark.parametrize("unit", units())
def test_a_notebook_alone_installs_the_course_and_runs(unit, python, tmp_path, monkeypatch):
    monkeypatch.setattr(hosted, "address", lambda: f"file://{ROOT}")
    subprocess.run([python, "-m", "pip", "uninstall", "--quiet", "--yes", "peft-from-scratch"], check=True)
    before = versions(python)
    notebook = instructor_notebook(unit)
    ClearHiddenTests().preprocess(notebook, {})
    kernel = tmp_path / "kernels" / "fresh"
    kernel.mkdir(parents=True)
    start = [python, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (kernel / "kernel.json").write_text(json.dumps({"argv": start, "display_name": "fresh", "language": "python"}))
    specs = KernelSpecManager(kernel_dirs=[str(kernel.parent)])
    manager = AsyncKernelManager(kernel_name="fresh", kernel_spec_manager=specs)
    client = NotebookClient(notebook, km=manager, timeout=3600, resources={"metadata": {"path": str(tmp_path)}})
    alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    try:
        client.execute(env={**alone, "PEFTLAB_SHORT": "1", "PEFTLAB_RESULTS": str(tmp_path / "results")})
    finally:
        run_sync(manager.shutdown_kernel)(now=True)  # a kernel that it did not start nbclient does not stop
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")
    after = versions(python)
    replaced = {name: (found, after.get(name)) for name, found in before.items() if after.get(name) != found}
    assert replaced.keys() <= {"peft"}, f"the set-up cell may add packages, but it replaced {replaced}"
