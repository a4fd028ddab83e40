"""What a class is given holds no answer, and its checks say what the others say."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from answers import answers_left_in, solution_lines
from autograder.building import class_kit
from autograder.building.record import LeakError, record, saved, standalone
from autograder.checking.exercise import Exercise
from autograder.checking.failure import CheckFailedError
from autograder.checking.masters import units
from autograder.checking.recorded import RecordedCheck
from every_exercise import EXERCISES

SAID = 3
"""Of so many mistakes of each exercise the sentences are compared; of all with `EVERY_ANSWER=1`."""


@pytest.fixture(scope="module")
def kit(tmp_path_factory) -> Path:
    """The whole kit, but for the recordings, which take minutes: they are numbers and sentences."""
    folder = tmp_path_factory.mktemp("kit") / "class"
    class_kit.make(folder, units(), seeds=0)
    return folder


def recorded(exercise: Exercise) -> RecordedCheck:
    """Return an exercise's check, recorded for one seed and read back."""
    check = RecordedCheck(
        exercise.answer_names, exercise.driver, Path("nowhere"), exercise.helpers, exercise.reading, exercise.at_most
    )
    check.__dict__["_recorded"] = torch.load(io.BytesIO(saved(record(exercise, 1))), weights_only=True)
    return check


def said(check: object, answers: list[object]) -> str:
    """Return the sentence with which a check refuses answers, or nothing."""
    try:
        check(*answers, seed=0)
    except CheckFailedError as failed:
        return str(failed).splitlines()[0]
    return ""


@pytest.mark.parametrize("name", EXERCISES)
def test_a_recorded_check_says_what_the_live_one_says(name):
    exercise = EXERCISES[name]
    check = recorded(exercise)
    assert said(check, exercise.spec) == ""
    for variant, edits in exercise.variants.items():
        assert said(check, exercise.build(edits)) == "", variant
    mistakes = list(exercise.mistakes.items())
    for sentence, edits in mistakes if os.environ.get("EVERY_ANSWER") else mistakes[:SAID]:
        wrong = exercise.build(edits)
        assert said(check, wrong) == said(exercise, wrong) != "", sentence


def test_nothing_in_it_is_an_answer(kit):
    assert answers_left_in(kit / "autograder") == []
    assert answers_left_in(kit / "course" / "peftlab") == []


def test_the_proof_sees_a_spec_that_was_left_in_under_other_names(kit, tmp_path):
    spec = EXERCISES["check_merge"].source().replace("layer", "module").replace("def merge", "def fold")
    (tmp_path / "harmless.py").write_text(f"import torch\n\n\n{spec}")
    assert any("harmless.py: fold is merge and unmerge, spec" in line for line in answers_left_in(tmp_path, ["08_lora"]))


LINES = (
    "for ",
    "with ",
    "model.model.layers[",
    "model.model.norm.",
    "attention_mask = torch.ones_like(",
    "parent, _, own_name = ",
)
"""How lines of solutions begin that stand in drivers and in the lab bench too, and give nothing away."""
ELSEWHERE = {
    "cos, sin = (angles.to(x.dtype) for angles in rotary_angles(positions, config.head_dim, config.rope_theta))",
    "mixed = F.scaled_dot_product_attention(",
}
"""Likewise, whole: they are in `peftlab.llama`, which students read."""


def test_no_line_of_a_solution_stands_in_it(kit):
    lines = {line for line in solution_lines() if not line.startswith(LINES)} - ELSEWHERE
    for path in [*(kit / "autograder").rglob("*"), *(kit / "course" / "peftlab").rglob("*")]:
        if path.is_file():
            text = path.read_bytes().decode(errors="replace")
            found = [line for line in lines if line in text]
            assert not found, f"{path.relative_to(kit)}: {found}"


def test_code_that_needs_an_answer_is_refused():
    exercise = EXERCISES["check_prefix_attention"]
    with pytest.raises(LeakError, match="PrefixAttention is a part of an answer"):
        standalone([exercise.exact], {id(part) for part in exercise.spec})


def test_a_units_notebook_finds_its_checks_and_nothing_else_of_the_project(tmp_path):
    """In a process that has the kit alone."""
    folder = tmp_path / "class"
    class_kit.make(folder, ["08_lora"], seeds=1)
    archive = class_kit.pack(folder)
    assert archive.stat().st_size < 20 * 2**20
    cells = json.loads((folder / "course" / "08_lora" / "08_lora.ipynb").read_text())["cells"]
    setup = next("".join(cell["source"]) for cell in cells if cell["id"] == "setup")
    exercise = EXERCISES["check_merge"]
    wrong = exercise.source(next(iter(exercise.mistakes.values())))
    program = (
        f"{setup}\nimport autograder, sys\nassert autograder.__file__.startswith({str(folder)!r})\n"
        f"LoRALinear = None\n{exercise.source()}\ncheck_merge(merge, unmerge)\n{wrong}\n"
        "try:\n    check_merge(merge, unmerge)\nexcept AssertionError as failed:\n    print(failed)\n"
    )
    path = os.pathsep.join([str(folder), str(folder / "course")])
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": path})
    assert done.returncode == 0, done.stderr
    assert "passed, on 2 fresh random cases" in done.stdout and next(iter(exercise.mistakes)) in done.stdout


def test_a_folder_that_is_no_kit_is_left_alone(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    assert class_kit.main(["08_lora", "--to", str(tmp_path)]) == 1
    assert (tmp_path / "mine.txt").read_text() == "mine" and "no kit" in capsys.readouterr().err


def test_another_pytorch_is_named_when_an_answer_is_refused(monkeypatch):
    exercise = EXERCISES["check_merge"]
    check = recorded(exercise)
    monkeypatch.setitem(check._recorded, "torch", "1.0")
    with pytest.raises(CheckFailedError, match=r"made with PyTorch 1\.0"):
        check(*exercise.build(next(iter(exercise.mistakes.values()))), seed=0)


def test_every_package_of_checks_can_be_imported_from_the_kit(kit):
    modules = [f"autograder.checks.{path.name}" for path in sorted((kit / "autograder" / "checks").iterdir()) if path.is_dir()]
    path = os.pathsep.join([str(kit), str(kit / "course")])
    program = "import importlib\nfor name in " + repr(modules) + ":\n    importlib.import_module(name)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}
    )
    assert done.returncode == 0, done.stderr
    assert len(modules) == len({exercise.driver.__module__.split(".")[2] for exercise in EXERCISES.values()})
