"""The example in the guide to adding an exercise is a whole one, and what the guide says of it is so."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch

from autograder.proving.prove import said

GUIDE = (Path(__file__).parents[2] / "docs" / "adding_an_exercise.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """The file of the guide's exercise, as a module."""
    path = tmp_path_factory.mktemp("checks") / "fold_scale.py"
    (source,) = re.findall(r"^```python\n(.*?)^```", GUIDE, re.DOTALL | re.MULTILINE)
    path.write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("fold_scale_of_the_guide", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_examples_mistakes_are_named_and_its_variants_pass(example):
    exercise = example.check_fold_scale
    assert len(exercise.mistakes) >= 8 and len(exercise.variants) >= 3
    for sentence, edits in exercise.mistakes.items():
        assert sentence in said(exercise, exercise.build(edits))
    for name, edits in exercise.variants.items():
        assert said(exercise, exercise.build(edits)) == "", name


def test_the_examples_hidden_cases_are_of_other_dtypes(example):
    for dtype in (torch.float64, torch.bfloat16):
        case = example.scale_case(torch.Generator().manual_seed(0), dtype)
        for edits in example.check_fold_scale.variants.values():
            observed = example.check_fold_scale.observe(example.check_fold_scale.build(edits), case)
            expected = example.check_fold_scale.observe(example.check_fold_scale.spec, case)
            assert example.check_fold_scale.difference(expected, observed, case) is None


def test_the_examples_solution_passes(example):
    (cells,) = re.findall(r"^````python\n(.*?)^````", GUIDE, re.DOTALL | re.MULTILINE)
    solution = re.search(r"^def fold_scale.*?(?=^# %%)", cells, re.DOTALL | re.MULTILINE)[0]
    scope = {"Float": dict, "Tensor": torch.Tensor}
    exec(re.sub(r"Float\[Tensor, \"[^\"]*\"\]", "Tensor", solution), scope)
    assert said(example.check_fold_scale, [scope["fold_scale"]]) == ""
