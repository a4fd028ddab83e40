"""The rendered course: all pages are there, links inside lead somewhere, solutions are folded, hidden tests not shown."""

import re

import pytest

from autograder.building import site as rendering
from autograder.building.build import instructor_notebook
from autograder.building.site import build, execute, page
from autograder.checking.masters import SOLUTIONS, solution_cells, units

pytestmark = pytest.mark.xdist_group("site")  # built once for all


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, of notebooks that have not been run; Sphinx stops at any warning, such as a link that leads nowhere."""
    folder = tmp_path_factory.mktemp("site")
    assert build({unit: instructor_notebook(unit) for unit in units()}, folder) == 0
    return folder


@pytest.mark.slow
def test_every_unit_has_its_page_and_can_be_found(site):
    front = (site / "index.html").read_text()
    for unit in units():
        assert f'href="{unit}/{unit}.html"' in front
        folded = len(re.findall(r'class="[^"]*tag_hide-input', (site / unit / f"{unit}.html").read_text()))
        assert folded == len(solution_cells(instructor_notebook(unit).cells))
    guides = [path.stem for path in (SOLUTIONS.parent / "docs").glob("*.md")]
    for name in ("results", "GLOSSARY", "SOURCES", "CHANGELOG", *(f"docs/{guide}" for guide in guides), "search"):
        assert (site / f"{name}.html").is_file()
    index = (site / "searchindex.js").read_text()
    assert all(f'"{unit}/{unit}"' in index for unit in units())


@pytest.mark.slow
def test_formulas_need_no_network(site):
    text = (site / "08_lora" / "08_lora.html").read_text()
    assert 'src="../_static/mathjax/' in text and (site / "_static" / "mathjax" / "tex-chtml.js").is_file()
    assert not re.findall(r'<(?:script|link)[^>]+(?:src|href)="https?:', text)


@pytest.mark.parametrize("unit", units())
def test_a_page_shows_no_hidden_test_and_no_marker(unit):
    shown = page(instructor_notebook(unit))
    for cell in shown.cells:
        for marker in ("BEGIN", "END HIDDEN", "hidden.check", "%pip"):
            assert marker not in cell.source


def test_a_master_that_has_not_changed_is_not_run_again(tmp_path, monkeypatch):
    runs = []
    monkeypatch.setattr(rendering, "run", lambda notebook, folder, short: runs.append(notebook) or notebook)
    for _ in range(2):
        assert execute("08_lora", tmp_path).cells
    assert len(runs) == 1
    changed = instructor_notebook("08_lora")
    changed.cells[0].source += " "
    monkeypatch.setattr(rendering, "instructor_notebook", lambda unit: changed)
    execute("08_lora", tmp_path)
    assert len(runs) == 2 and len(list(tmp_path.iterdir())) == 1
