"""The hidden cases of unit 08_lora: for every check, what kind of case it is and how to make one."""

import torch

from autograder.checking.judging import PEAK_ALLOWANCE
from autograder.checks import lora

MIB = 2**20


def _one_sequence(case: dict) -> dict:
    """The same case for a single sequence, shaped (seq, features)."""
    return case | {"x": case["x"][0], "output_gradient": case["output_gradient"][0]}


CASES = {
    lora.check_lora_forward: {
        "in double precision": lambda generator: lora.forward_case(generator, torch.float64),
        "in bfloat16": lambda generator: lora.forward_case(generator, torch.bfloat16),
        "with a bias, in float16": lambda generator: lora.forward_case(generator, torch.float16, bias=True),
        "on an input without a batch dimension": lambda generator: _one_sequence(lora.forward_case(generator)),
    },
    lora.check_lora_start: {
        "on a base in bfloat16": lambda generator: lora.start_case(generator, "bfloat16"),
        "on a base in float64": lambda generator: lora.start_case(generator, "float64"),
    },
    lora.check_lora_memory: {
        "on a wide layer": lambda generator: {"in_features": 48, "out_features": 300, "rank": 6, "rows": 40},
        "on a tall layer": lambda generator: {"in_features": 300, "out_features": 48, "rank": 2, "rows": 40},
        # Eight layers read an x of 8 MiB.
        "by the memory of the whole process, on many tokens": lambda generator: {
            "in_features": 512,
            "out_features": 16,
            "rank": 4,
            "rows": 4096,
            "copies": 8,
            PEAK_ALLOWANCE: 24 * MIB,
        },
    },
    lora.check_inject: {
        "with one target": lambda generator: lora.inject_case(generator, ["aux_q_proj"], ["gate"], width=5),
        "with all targets": lambda generator: lora.inject_case(
            generator, ["embed", "q_proj", "v_proj", "q_proj_gate", "aux_q_proj"], ["norms"], width=7
        ),
    },
    lora.check_merge: {
        "in double precision": lambda generator: lora.merge_case(generator, torch.float64),
        "in bfloat16": lambda generator: lora.merge_case(generator, torch.bfloat16),
    },
    lora.check_adapter_files: {"with other sizes": lora.adapter_case},
    lora.check_merge_into_head: {
        "with a tied head": lambda generator: lora.tied_case(generator, tied=True),
        "with an untied head": lambda generator: lora.tied_case(generator, tied=False),
    },
}

# Automatic mutants that no check rejects (`python -m autograder.proving.prove`), and why they may live.
SURVIVORS = {
    "5  ->  6": "the spread of lora_A's start, 1/sqrt(in) or 0.93/sqrt(in), is a convention: any random start is right",
    "list(model.named_modules())  ->  model.named_modules()": "the walk goes on into the new layer, whose only nn.Linear is "
    "called `base`: the same modules are replaced unless that is a target",
}
