"""What a reader has done is kept, counted and compared; nothing that goes wrong there costs a check or a measurement."""

import json
import shutil

import pytest

from autograder.checking.failure import CheckFailedError
from autograder.checking.masters import exercises_of, units
from autograder.checks.lora import check_inject, check_merge
from peftlab import progress
from peftlab.progress import Guessed, Tried, predict


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """A reader's folder 08_lora, with the notebook and its folder of results; checks think that they run in a notebook."""
    folder = tmp_path / "08_lora"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.delenv("PEFTLAB_RESULTS", raising=False)
    monkeypatch.delenv("PEFTLAB_SHORT", raising=False)
    monkeypatch.setattr(progress, "_in_notebook", lambda: True)
    return folder / "results" / "progress.jsonl"


def not_right(layer):
    """Stand for an answer that does nothing."""


def test_a_guess_is_printed_beside_the_measurement_and_the_first_one_counts(kept, capsys):
    predict("parameters", 1_000).compare(4_000)
    predict("parameters", 3_999).compare(4_000)
    predict("MiB", {"first": 3.0, "last": None}).compare({"first": 2.0, "last": 5.5})
    predict("order", ["a", "b"]).compare(["b", "a"])
    predict("names", ["b", "a"]).compare({"a", "b"})
    predict("number", "many").compare(3)
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "parameters: 4,000; you said 1,000, 4 times too little"
    assert said[2:4] == ["MiB, first: 2; you said 3, 1.5 times too much", "MiB, last: 5.5 (no guess)"]
    assert [line.rpartition(", ")[2] for line in said[4:6]] == ["which it is not", "right"]
    rows = progress.load(Guessed)
    assert [(row.what, row.times, row.right) for row in rows] == [
        ("parameters", 0.25, False),
        ("MiB, first", 1.5, True),
        ("order", None, False),
        ("names", None, True),
        ("number", None, False),
    ]
    assert {row.unit for row in rows} == {"08_lora"}
    said = progress.summary(rows)
    assert said == "Of 2 numbers 1 was within a factor of two; half were within 4. Of 3 other guesses 1 was right."


def test_a_short_run_keeps_no_guess_and_says_so(kept, monkeypatch, capsys):
    monkeypatch.setenv("PEFTLAB_SHORT", "1")
    predict("parameters", 1_000).compare(4_000)
    assert not kept.exists()
    progress.show()
    assert "A short run, as here, keeps none" in capsys.readouterr().out


def test_the_third_failed_check_in_a_row_says_where_the_answer_is(kept, capsys):
    for number in range(1, 5):
        with pytest.raises(CheckFailedError) as failed:
            check_merge(not_right, not_right)
        assert ("check_merge.show_answer()" in str(failed.value)) == (number >= 3)
    check_merge(*check_merge.build(""))
    with pytest.raises(CheckFailedError) as failed:
        check_merge(not_right, not_right)
    assert "show_answer" not in str(failed.value)
    check_merge.show_answer()
    assert "def unmerge" in capsys.readouterr().out


def test_what_is_not_written_is_no_try(kept):
    def not_written(*arguments):
        raise NotImplementedError

    for _ in range(4):
        with pytest.raises(CheckFailedError, match="not written yet") as failed:
            check_inject(not_written)
        assert "show_answer" not in str(failed.value)
    assert not progress.load(Tried)


def test_outside_of_a_notebook_nothing_is_kept(kept, monkeypatch):
    monkeypatch.setattr(progress, "_in_notebook", lambda: False)
    check_merge(*check_merge.build(""))
    assert not kept.exists()


def test_the_page_lists_every_check_of_the_units_beside_it(kept, capsys):
    cell = {"cell_type": "code", "metadata": {"nbgrader": {"grade": True}}}
    cells = [cell | {"source": [f"{check}(answer)\n"]} for check in ("check_merge", "check_inject")]
    (kept.parents[1] / "08_lora.ipynb").write_text(json.dumps({"cells": cells}))
    (kept.parents[2] / "09_other").mkdir()
    (kept.parents[2] / "09_other" / "09_other.ipynb").write_text("no notebook")
    check_merge(*check_merge.build(""))
    predict("parameters", 3_000).compare(4_000)
    with kept.open("a") as file:
        file.write('no row\n{"unit": "lora"}\n')
    capsys.readouterr()
    progress.show()
    said = capsys.readouterr().out
    assert "08_lora" in said and "1 of 2   check_inject\n" in said
    assert "08 · parameters" in said and "Of 1 number 1 was within a factor of two" in said
    assert "09_other" not in said


def test_a_folder_that_cannot_be_written_costs_nothing(kept, capsys):
    kept.parent.write_text("a file where the folder belongs")
    check_merge(*check_merge.build(""))
    predict("parameters", 3_000).compare(4_000)
    progress.show()
    assert "No guess yet" in capsys.readouterr().out


def test_a_folder_that_is_gone_costs_nothing(kept, capsys):
    kept.parent.mkdir()
    shutil.rmtree(kept.parents[1])
    check_merge(*check_merge.build(""))
    predict("parameters", 3_000).compare(4_000)
    progress.show()
    assert "you said 3,000" in capsys.readouterr().out


@pytest.mark.parametrize("unit", units())
def test_a_check_knows_its_unit_and_its_name(unit):
    for exercise in exercises_of(unit):
        assert exercise.package == unit.partition("_")[2]
        assert exercise.check_name.startswith("check_")
