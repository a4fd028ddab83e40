"""The hidden cases of unit 12_lora_in_practice: for every check, what kind of case it is and how to make one."""

import torch

from autograder.checks import lora_in_practice as unit


def _full_rank(case: dict) -> dict:
    """The same case with the largest rank there is, which leaves nothing of the weight."""
    return case | {"rank": min(case["weight"].shape)}


def _one_token(case: dict) -> dict:
    """The same case for the features of a single token, without a batch or sequence axis."""
    return case | {"x": case["x"][0, 0], "output_gradient": case["output_gradient"][0, 0]}


def _transposed_in_memory(case: dict, *names: str) -> dict:
    """The same numbers, but with these tensors laid out in memory as their transposes are."""
    return case | {name: case[name].transpose(0, 1).contiguous().transpose(0, 1) for name in names}


CASES = {
    unit.check_rslora_alpha: {
        "with large ranks": lambda generator: unit.pairs_case(generator, [96, 200, 1000]),
        "with an alpha below 1": lambda generator: unit.pairs_case(generator, [3, 14, 15], low=0.1),
    },
    unit.check_loraplus_groups: {
        "with more layers": lambda generator: unit.groups_case(generator, layers=5),
        "with a ratio below 1": lambda generator: unit.groups_case(generator, ratio=0.2),
        "where every lora_B is frozen": lambda generator: unit.groups_case(generator, frozen=["lora_B"]),
        "where lora_B is trained, and little else": lambda generator: unit.groups_case(
            generator, frozen=["lora_A", "weight", "bias", "magnitude"]
        ),
    },
    unit.check_pissa: {
        "in double precision": lambda generator: unit.pissa_case(generator, wide=False, dtype=torch.float64),
        "on a wide weight in float16": lambda generator: unit.pissa_case(generator, wide=True, dtype=torch.float16),
        "with rank 1 and a scaling below 1": lambda generator: unit.pissa_case(generator, wide=True, rank=1, scaling=0.3),
        "with the full rank": lambda generator: _full_rank(unit.pissa_case(generator, wide=False)),
        "on a weight that is transposed in memory": lambda generator: _transposed_in_memory(
            unit.pissa_case(generator, wide=True), "weight"
        ),
    },
    unit.check_pissa_to_lora: {
        "in double precision": lambda generator: unit.converted_case(generator, torch.float64),
        "in float16": lambda generator: unit.converted_case(generator, torch.float16),
        "with rank 1 and a whole alpha": lambda generator: unit.converted_case(generator, rank=1, alpha=3),
        "on factors that are transposed in memory": lambda generator: _transposed_in_memory(
            unit.converted_case(generator), "lora_A", "lora_B", "start_A", "start_B"
        ),
    },
    unit.check_dora_forward: {
        "in double precision": lambda generator: unit.dora_forward_case(generator, torch.float64, zero_row=True),
        "with a bias, in bfloat16": lambda generator: unit.dora_forward_case(
            generator, torch.bfloat16, bias=True, zero_row=True
        ),
        # Without a row of zeros: in float16 what is added to its norm, such as 1e-8, is 0 itself.
        "in float16": lambda generator: unit.dora_forward_case(generator, torch.float16),
        "with rank 1": lambda generator: unit.dora_forward_case(generator, bias=True, rank=1),
        "on an input without a batch dimension": lambda generator: _one_token(
            unit.dora_forward_case(generator, bias=True, zero_row=True)
        ),
        "on an input that is transposed in memory": lambda generator: _transposed_in_memory(
            unit.dora_forward_case(generator), "x"
        ),
    },
    unit.check_dora_merge: {
        "in double precision": lambda generator: unit.dora_case(generator, torch.float64, bias=True, zero_row=True),
        "in bfloat16": lambda generator: unit.dora_case(generator, torch.bfloat16, zero_row=True),
        "in float16": lambda generator: unit.dora_case(generator, torch.float16, bias=True),
        "with rank 1": lambda generator: unit.dora_case(generator, rank=1),
    },
    unit.check_rank_for: {
        "with more layers": lambda generator: unit.rank_case(generator, layers=5),
        "with a layer that has one output": lambda generator: unit.rank_case(generator, layers=2, low=1),
        "with wide layers": lambda generator: unit.rank_case(generator, layers=1, low=60),
    },
    unit.check_answer_labels: {
        "where the assistant begins": lambda generator: unit.chat_case(
            generator, "end", [["assistant", "user", "assistant"], ["user", "assistant"]]
        ),
        "with turns of one token": lambda generator: unit.chat_case(
            generator, "end", [["user", "assistant", "user", "assistant"], ["tool", "assistant"]], fewest=1
        ),
        "with a single answer": lambda generator: unit.chat_case(generator, "unused", [["assistant"]], fewest=1),
        "without an answer": lambda generator: unit.chat_case(generator, "end", [["user"], ["system", "user"]]),
        "with the tokens of a large vocabulary": lambda generator: unit.chat_case(generator, "inside", top=128_255),
    },
}

_FULL = "of the whole U and Vh the first columns and rows are the same"
_SPREAD = "the spread of lora_A's start is a convention: any random start is right"

# Automatic mutants that no check rejects (`python -m autograder.proving.prove`), and why they may live.
SURVIVORS = {
    "torch.linalg.svd(weight.float(), full_matrices=False)  ->  torch.linalg.svd(weight.float())": _FULL,
    "False  ->  True": _FULL,
    "nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  ->  nn.init.kaiming_uniform_(self.lora_A)": _SPREAD,
    "math.sqrt(5)  ->  5": _SPREAD,
    "5  ->  6": _SPREAD,
    "1.0  ->  2.0": "what a row of zeros is divided by does not matter, as long as it is not zero",
}
