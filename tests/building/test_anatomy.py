"""Every unit has the parts that docs/anatomy.md gives it, in their order."""

import re

import pytest

from autograder.building import index
from autograder.building.build import instructor_notebook
from autograder.checking.masters import code_cells, master_path, units

UNITS = [unit for unit in units() if unit != "00_start_here"]


def headings(unit: str) -> list[str]:
    """Return the headings below a unit's title, each with its `##` or `###`."""
    cells = [cell.source for cell in instructor_notebook(unit).cells if cell.cell_type == "markdown"]
    found = re.findall(r"^#{2,3} .*$", "\n".join(cells), re.MULTILINE)
    return [heading for heading in found if not re.match(r"### (BEGIN|END) ", heading)]


def sections(unit: str) -> list[str]:
    return [heading.removeprefix("## ") for heading in headings(unit) if heading.startswith("## ")]


@pytest.mark.parametrize("unit", units())
def test_a_header_has_a_title_a_table_and_three_objectives(unit):
    header = next(cell.source for cell in instructor_notebook(unit).cells if cell.source.startswith("# "))
    assert re.match(rf"# {unit[:2]} · ", header)
    assert "| minutes | difficulty | points | before this unit |" in header
    assert "**When you have finished, you" in header
    assert re.findall(r"^(\d)\. ", header, re.MULTILINE) == ["1", "2", "3"]


@pytest.mark.parametrize("unit", UNITS)
def test_one_set_up_cell_has_the_imports_and_the_units_name(unit):
    (setup,) = (cell for cell in code_cells(unit) if cell.metadata.get("nbgrader", {}).get("grade_id") == "setup")
    assert "from autograder.checks." in setup.source
    named = master_path(unit).read_text(encoding="utf-8").count(f'"{unit}"')
    assert named == setup.source.count(f'\nUNIT = "{unit}"'), "the set-up cell names the unit, as UNIT, and no other cell does"


@pytest.mark.parametrize("unit", UNITS)
def test_sections_stand_in_their_order(unit):
    first, *numbered, now, sources = sections(unit)
    assert first in ("The idea", "The claim")
    assert [section.split(". ")[0] for section in numbered] == [str(number + 1) for number in range(len(numbered))]
    assert (now, sources) == ("What you have now", "Sources")
    assert numbered[-1].endswith(", marked by hand")
    bug_hunts = [section for section in numbered if re.match(r"\d+\. Bug hunt\b", section)]
    assert bug_hunts == numbered[-2:-1] or (unit == "05_prompt_tuning" and len(bug_hunts) == 1)


@pytest.mark.parametrize("unit", UNITS)
def test_headings_say_points_and_minutes_in_one_way_and_add_up(unit):
    marked = [heading for heading in headings(unit) if re.search(r"point|minute|optional|  ·|·  ", heading)]
    form = (
        r"#{2,3} [^·]*\S  ·  ((\d+) points?, (about \d+ minutes, (?:●○○|●●○|●●●)|marked by hand)|optional, about \d+ minutes)"
    )
    found = [re.fullmatch(form, heading) for heading in marked]
    assert all(found), [heading for heading, match in zip(marked, found) if not match]
    assert str(sum(int(match[2] or 0) for match in found)) == index.header(unit).points


@pytest.mark.parametrize("unit", UNITS)
def test_a_check_stands_right_below_its_answer(unit):
    above = None
    for cell in code_cells(unit):
        mark = cell.metadata.get("nbgrader", {})
        if mark.get("grade"):
            assert above is not None and (above.get("solution") or above.get("grade")), mark["grade_id"]
        above = mark


@pytest.mark.parametrize("unit", UNITS)
def test_something_is_predicted(unit):
    text = master_path(unit).read_text(encoding="utf-8")
    assert "Predict" in text
    guesses = [cell.source for cell in code_cells(unit) if re.search(r"= predict\(", cell.source)]
    assert guesses, "a prediction is a cell that calls `predict`"
    for name in re.findall(r"^(\w+) = predict\(", "\n".join(guesses), re.MULTILINE):
        assert f"{name}.compare(" in text, f"{name} is never compared with what was measured"
    assert "you said" not in text, "`compare` says what was guessed"


PROSE = 128
UNBREAKABLE = ("# %%", "# |", "# $$", "# <details>")


@pytest.mark.parametrize("unit", units())
def test_prose_is_wrapped(unit):
    lines = master_path(unit).read_text(encoding="utf-8").splitlines()
    prose = [line for line in lines if line.startswith("# ") and not line.startswith(UNBREAKABLE)]
    assert not [line for line in prose if len(line) > PROSE]
