"""What an author of checks is told of one exercise."""

from dataclasses import replace

import pytest

from autograder.proving import trying
from autograder.proving.trying import answers_in, by_name, main

UNIT = "02_rank_decomposition"


def test_an_exercise_is_tried_with_an_answer_of_ones_own(tmp_path, capsys):
    mine = tmp_path / "mine.py"
    mine.write_text("def energy_rank(singular_values, share):\n    return 1\n")
    assert main([UNIT, "energy_rank", str(mine)]) == 0
    told = capsys.readouterr().out
    assert "the master's solution: passes" in told and "MISSED" not in told and "REFUSED" not in told
    assert told.count("  named   ") == len(by_name(UNIT)["energy_rank"].mistakes)
    assert f"{mine}: energy_rank: the rank that holds" in told


def test_a_mistake_that_passes_and_a_variant_that_does_not_are_told(capsys, monkeypatch):
    monkeypatch.setattr(trying, "said_of_hidden_cases", lambda unit, exercise, answers: "")
    wrong = {"mistakes": {"nothing is wrong": {}}, "variants": {"one": {"return rank": "return 1"}}}
    assert not trying.try_all(UNIT, replace(by_name(UNIT)["energy_rank"], **wrong))
    told = capsys.readouterr().out
    assert "MISSED  nothing is wrong\n          heard: passes" in told and "REFUSED one\n          heard: energy_rank:" in told


def test_a_file_without_the_answer_is_told_so(tmp_path):
    (tmp_path / "mine.py").write_text("def energy_ranks(): pass")
    with pytest.raises(NameError, match="does not define energy_rank"):
        answers_in(tmp_path / "mine.py", UNIT, by_name(UNIT)["energy_rank"])


def test_an_unknown_exercise_is_named_with_those_there_are(capsys):
    with pytest.raises(SystemExit):
        main([UNIT, "energy"])
    assert "has no exercise 'energy'; it has truncated_svd, truncation_error" in capsys.readouterr().err
