"""What students receive comes from the masters, is the same every time, and holds no solution."""

import re
from pathlib import Path

import jupytext
import nbformat
import pytest
from nbconvert import HTMLExporter

from autograder.building import front, index
from autograder.building.build import (
    COURSE,
    course_config,
    drift,
    generate,
    instructor_notebook,
    main,
    write_instructor_notebook,
)
from autograder.checking import hidden
from autograder.checking.masters import cells_of, code_cells, exercises_of, grade_ids, load_reference, master_path, units

pytestmark = pytest.mark.xdist_group("build")


@pytest.fixture(scope="module")
def twice(tmp_path_factory):
    """Every unit, built twice from scratch."""
    built = []
    for attempt in range(2):
        root = tmp_path_factory.mktemp(f"build{attempt}")
        for unit in units():
            write_instructor_notebook(unit, root / "solutions")
            generate(unit, root, root / "release", database=False)
        built.append(root)
    return built


def test_course_equals_its_masters():
    assert drift(units()) == []


def test_the_front_pages_pictures_show_what_is_so():
    assert front.differing() == []
    readme = (front.ROOT / "README.md").read_text()
    for path in front.PICTURES:
        alt = re.search(rf"!\[(.{{40,}})\]\({path}\)", readme)
        assert alt, f"{path} needs a text for those who do not see it"
    peaks = {f"{step.peak / 2**20:,.0f}" for step in front.measured().values()}
    told = set(re.findall(r"\d[\d,]*\d\d", re.search(r"!\[(.+)\]\(docs/images/memory", readme)[1]))
    assert told <= peaks


def test_a_picture_is_drawn_again_when_what_it_shows_has_changed(monkeypatch, tmp_path):
    monkeypatch.setattr(front, "ROOT", tmp_path)
    assert front.differing() == list(front.PICTURES)
    front.write()
    assert front.differing() == []
    monkeypatch.setattr(front, "answer_and_message", lambda: ("an answer", "another message"))
    assert front.differing() == [Path("docs/images/failed_check.png")]


def test_two_builds_are_the_same_bytes(twice):
    first, second = twice
    paths = sorted(path.relative_to(first) for path in first.rglob("*.ipynb"))
    assert len(paths) == 2 * len(units())
    for path in paths:
        assert (first / path).read_bytes() == (second / path).read_bytes()


@pytest.mark.parametrize("unit", units())
def test_a_release_holds_the_notebook_alone_and_no_solution(twice, unit):
    folder = twice[0] / "release" / unit
    assert [path.name for path in folder.iterdir()] == [f"{unit}.ipynb"]
    text = (folder / f"{unit}.ipynb").read_text()
    for leak in ("BEGIN SOLUTION", "END SOLUTION", "HIDDEN", "hidden.check", "Rubric"):
        assert leak not in text


@pytest.mark.parametrize("unit", units())
def test_ids_are_valid_and_unique_and_stay_when_a_cell_is_added(unit):
    notebook = instructor_notebook(unit)
    ids = [cell["id"] for cell in notebook.cells]
    assert len(set(ids)) == len(ids)
    nbformat.validate(notebook)


@pytest.mark.parametrize("unit", units())
def test_a_master_survives_being_opened_and_saved_as_a_notebook(unit, tmp_path):
    """What jupytext's extension does in JupyterLab: read the master, write it back."""
    text = master_path(unit).read_text()
    config = jupytext.config.load_jupytext_config(str(master_path(unit)))
    notebook = jupytext.reads(text, fmt="py:percent", config=config)
    assert jupytext.writes(notebook, fmt="py:percent", config=config) == text


@pytest.mark.parametrize("unit", units())
def test_a_master_is_read_without_jupyter_as_with_it(unit):
    cells = jupytext.read(master_path(unit)).cells
    theirs = [cell for cell in cells if cell.cell_type == "code"]
    prose = [cell.source for cell in cells_of(unit) if cell.cell_type == "markdown"]
    assert prose == [cell.source for cell in cells if cell.cell_type == "markdown"]
    ours = code_cells(unit)
    assert [cell.source for cell in ours] == [cell.source for cell in theirs]
    for key in ("nbgrader", "tags"):
        assert [cell.metadata.get(key) for cell in ours] == [cell.metadata.get(key) for cell in theirs]
    lines = master_path(unit).read_text().splitlines()
    assert all(lines[cell.line - 1] == cell.source.splitlines()[0] for cell in ours)
    assert grade_ids(unit) == [cell.metadata["nbgrader"]["grade_id"] for cell in cells if "nbgrader" in cell.metadata]


@pytest.mark.parametrize("unit", units())
def test_the_reference_is_the_masters_solution(unit):
    reference = load_reference(unit)
    if unit == "08_lora":
        assert {"LoRALinear", "inject", "merge", "unmerge", "save_adapter", "load_adapter", "merge_into_head"} <= vars(
            reference
        ).keys()
        assert "lora_row" not in vars(reference), "the experiments were run"


@pytest.mark.parametrize("unit", units())
def test_the_page_is_written_for_people(unit):
    """Alt text on every picture, hints titled by a symptom, no emoji, no cell too long to read."""
    notebook = instructor_notebook(unit)
    for cell in notebook.cells:
        assert not re.search("[\U0001f300-\U0001faff\u2600-\u27bf]", cell.source)
        assert cell.source.count("plots.show(") == cell.source.count("alt=")
        assert cell.source.count("<details><summary>") == cell.source.count("</details>")
        if cell.cell_type == "code" and not cell.metadata.get("nbgrader"):
            assert len(cell.source.splitlines()) <= 22, cell.source


@pytest.mark.parametrize("unit", units())
def test_hidden_tests_stand_behind_every_check(unit):
    assert "hidden.check" not in master_path(unit).read_text(), "the build writes them"
    graded = [cell.source for cell in instructor_notebook(unit).cells if cell.source.startswith("check_")]
    assert len(graded) == len(exercises_of(unit))
    for source in graded:
        check, _, *lines = source.splitlines()
        assert lines[-2] == check.replace("(", ", ").replace("check_", f'hidden.check("{unit}", check_', 1)


def test_a_graded_cell_that_does_more_than_call_a_check_is_refused():
    mark = {"grade": True, "solution": False, "grade_id": "check-merge"}
    cell = nbformat.v4.new_code_cell("check_merge(merge, unmerge)\nprint('done')", metadata={"nbgrader": mark})
    with pytest.raises(ValueError, match="08_lora: the cell check-merge should call one check"):
        hidden.add_to(nbformat.v4.new_notebook(cells=[cell]), "08_lora")


def test_check_names_a_unit_that_drifted(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("autograder.building.build.COURSE", tmp_path)
    assert main(["--check", "00_start_here"]) == 1
    assert "course/00_start_here differs" in capsys.readouterr().err


def test_an_unknown_unit_is_named(capsys):
    with pytest.raises(SystemExit):
        main(["99_nothing"])
    assert "there is no unit '99_nothing'; there are 00_start_here" in capsys.readouterr().err


def test_every_unit_is_released():
    assert sorted(path.parent.name for path in COURSE.glob("*/*.ipynb")) == units()


def test_the_index_equals_the_masters_headers():
    assert index.differing() == []


@pytest.mark.parametrize("unit", units())
def test_a_header_gives_the_points_that_nbgrader_counts(unit):
    graded = [cell.metadata.get("nbgrader", {}) for cell in instructor_notebook(unit).cells]
    points = sum(mark.get("points", 0) for mark in graded if mark.get("grade"))
    assert index.header(unit).points == (f"{points:g}" if points else "none")


def test_the_glossary_is_sorted_and_its_links_lead_to_units():
    lines = [line for line in (COURSE / "GLOSSARY.md").read_text().splitlines() if line.startswith("- ")]
    terms = [re.match(r"- \*\*(.+?)\*\*: .+\.", line)[1] for line in lines]
    assert terms == sorted(terms, key=lambda term: term.strip("`").lower()) and len(terms) == len(set(terms)) > 40
    for term, line in zip(terms, lines, strict=True):
        links = re.findall(r"\]\(([^)]+)\)", line)
        assert links and all((COURSE / link).is_file() for link in links), term


def test_a_picture_stays_where_html_is_sanitized(tmp_path):
    """A figure is sent as an image and as HTML, for its alt text; feedback cleans HTML of data."""
    outputs = [
        {
            "output_type": "display_data",
            "metadata": {},
            "data": {"image/png": "iVBORw0KGgo=", "text/html": '<img src="data:,x">'},
        },
        {"output_type": "display_data", "metadata": {}, "data": {"text/html": "<b>7</b><script>alert(1)</script>"}},
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("", outputs=[nbformat.from_dict(o) for o in outputs])])
    page, _ = HTMLExporter(config=course_config(tmp_path)).from_notebook_node(notebook)
    assert 'src="data:image/png;base64,iVBORw0KGgo="' in page
    assert "<b>7</b>" in page and "<script>alert" not in page
