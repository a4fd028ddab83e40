"""Which of a notebook's statements run again where a check calls an answer."""

import ast

import pytest

from autograder.sandbox.needed import as_python, needed

ANSWER = "def answer(x):\n    return {}\n"


def kept(*cells: str, name: str = "answer", given: tuple[str, ...] = ("torch",)) -> list[str]:
    """Return the first line of every statement that `name` needs."""
    lines = []
    for cell in needed(cells, [name], given):
        body = ast.parse(cell["source"]).body
        lines += [ast.get_source_segment(cell["source"], body[place]).splitlines()[0] for place in cell["needed"]]
    return lines


def test_the_answer_alone_is_kept_if_it_uses_nothing_else():
    assert kept("import os\nos.chdir('/')", "other = 3\nprint(other)", ANSWER.format("x + 1")) == ["def answer(x):"]


def test_a_helper_and_what_the_helper_uses_are_kept():
    cells = ("SCALE = 2\nUNUSED = 3", "def helper(x):\n    return SCALE * x", ANSWER.format("helper(x)"))
    assert kept(*cells) == ["SCALE = 2", "def helper(x):", "def answer(x):"]


@pytest.mark.parametrize(
    "use",
    [
        "class answer(Parent):\n    pass",
        "@Parent\ndef answer(x):\n    return x",
        "def answer(x, wide=Parent):\n    return x",
        "def answer(x: Parent):\n    return x",
        "class answer:\n    class Inner(Parent):\n        pass",
        "class answer:\n    def forward(self):\n        return (lambda: Parent)()",
        "def answer(x):\n    return [Parent for _ in x]",
        "answer = Parent",
    ],
)
def test_a_name_is_found_wherever_it_is_used(use):
    assert "class Parent:" in kept("class Parent:\n    pass", use)


def test_a_local_name_is_not_taken_for_a_global_one():
    assert kept("wide = 3", "def answer(x):\n    wide = 2\n    return wide") == ["def answer(x):"]


def test_a_function_that_is_defined_later_is_kept():
    assert kept(ANSWER.format("helper(x)"), "def helper(x):\n    return x") == ["def answer(x):", "def helper(x):"]


def test_every_version_of_an_answer_is_kept_in_order():
    first, wrapped = ANSWER.format("x"), "plain = answer\ndef answer(x):\n    return plain(x) + 1"
    assert kept(first, wrapped) == ["def answer(x):", "plain = answer", "def answer(x):"]


@pytest.mark.parametrize(
    "change",
    [
        "answer.scale = 2",
        "setattr(answer, 'scale', 2)",
        "del answer.scale",
        "answer.__init__.__defaults__ = (2,)",
        "for name in 'ab':\n    setattr(answer, name, 2)",
        "if True:\n    answer.scale = 2",
    ],
)
def test_what_changes_the_answer_afterwards_is_kept(change):
    assert change.splitlines()[0] in kept("class answer:\n    scale = 1", change)


@pytest.mark.parametrize(
    "change",
    ["RATES['a'] = 1", "RATES.update(a=1)", "RATES |= {'a': 1}", "fill(RATES)", "del RATES['a']", "RATES['a']['b'] += 1"],
)
def test_data_that_is_changed_after_it_was_made_is_kept_with_the_changes(change):
    cells = ("RATES = {}", "def fill(rates):\n    rates['a'] = 1", change, ANSWER.format("RATES['a']"))
    assert change in kept(*cells)


def test_a_plot_or_a_test_of_the_answer_is_not_kept():
    cells = (ANSWER.format("x"), "print(answer(3))", "import matplotlib.pyplot as plt\nplt.plot([answer(x) for x in range(3)])")
    assert kept(*cells) == ["def answer(x):"]


@pytest.mark.parametrize(
    "patch",
    [
        "torch.set_default_dtype(torch.float64)",
        "torch.allclose = lambda *a: True",
        "setattr(torch, 'save', None)",
        "import torch.nn\ntorch.nn.Linear = None",
        "torch.Tensor.__repr__ = lambda self: 'x'",
    ],
)
def test_what_is_done_to_a_module_is_not_kept(patch):
    changed = [line for line in kept(patch, ANSWER.format("torch.ones(x)")) if not line.startswith("import")]
    assert changed == ["def answer(x):"]


def test_an_import_is_kept_if_it_is_used():
    assert kept("import os, math\nimport json", ANSWER.format("math.pi * x")) == ["import os, math", "def answer(x):"]


def test_an_import_of_everything_is_kept():
    assert kept("from math import *", ANSWER.format("pi * x")) == ["from math import *", "def answer(x):"]


@pytest.mark.parametrize("name", ["list", "str", "print", "globals", "id"])
def test_a_variable_that_has_the_name_of_a_builtin_is_kept_only_if_the_answer_uses_it(name):
    assert kept(f"{name} = [1, 2]", ANSWER.format("x")) == ["def answer(x):"]
    assert kept(f"{name} = [1, 2]", ANSWER.format(f"{name}[0] + x")) == [f"{name} = [1, 2]", "def answer(x):"]


def test_a_given_name_that_is_made_anew_is_the_students():
    assert kept("torch = 3", ANSWER.format("torch")) == ["torch = 3", "def answer(x):"]


def test_a_cell_that_is_no_python_is_left_out():
    assert kept("def answer(x)\n    return x", "this is no code", ANSWER.format("x")) == ["def answer(x):"]


def test_a_cell_with_nothing_that_is_needed_is_left_out():
    assert len(needed(["a = 1", ANSWER.format("x"), "b = 2"], ["answer"])) == 1


def test_an_answer_that_is_not_there_needs_nothing():
    assert needed(["a = 1"], ["answer"]) == []


def test_magics_are_turned_into_python():
    assert kept("%matplotlib inline\n!ls", "%load_ext autoreload\nscale = 2", ANSWER.format("scale * x")) == [
        "scale = 2",
        "def answer(x):",
    ]


@pytest.mark.parametrize("magic", ["%%time", "%%capture output", "%%timeit -n 1", "\n\n%%time"])
def test_a_magic_that_runs_a_cell_as_it_is_does_not_hide_the_answer(magic):
    assert kept(f"{magic}\n{ANSWER.format('x')}") == ["def answer(x):"]


def test_a_cell_in_another_language_defines_nothing():
    assert kept(f"%%bash\n{ANSWER.format('x')}") == []


def test_python_stays_as_it_is():
    assert as_python("x = 1\n") == "x = 1\n"


def test_what_is_nested_without_end_is_left_out():
    assert kept("(" * 5000 + ")" * 5000, "x = " + "-" * 20_000 + "1", ANSWER.format("x")) == ["def answer(x):"]
