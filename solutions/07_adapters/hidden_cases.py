"""The hidden cases of unit 07_adapters: for every check, what kind of case it is and how to make one."""

import torch

from autograder.checking.cases import between
from autograder.checking.judging import PEAK_ALLOWANCE
from autograder.checks import adapters

MIB = 2**20


def _large_model(generator: torch.Generator) -> dict:
    """A model of 76 MiB: its gradients and AdamW's state take three times as much."""
    return adapters.adapted_memory_case(generator) | {"large": True, PEAK_ALLOWANCE: 32 * MIB}


CASES = {
    adapters.check_adapter: {
        "in double precision": lambda generator: adapters.adapter_case(generator, torch.float64),
        "in float16": lambda generator: adapters.adapter_case(generator, torch.float16),
        "in bfloat16": lambda generator: adapters.adapter_case(generator, torch.bfloat16),
        "on tokens without a batch dimension": lambda generator: adapters.adapter_case(generator, shape=(11,)),
    },
    adapters.check_adapter_memory: {
        "on a narrow bottleneck": lambda generator: adapters.adapter_memory_case(generator) | {"bottleneck": 1},
        "on a bottleneck wider than the hidden size": lambda generator: (
            adapters.adapter_memory_case(generator) | {"bottleneck": 99}
        ),
        # Eight adapters read an h of 8 MiB; then three have 8 MiB between down and GELU.
        "by the memory of the whole process, on many tokens": lambda generator: {
            "hidden": 512,
            "bottleneck": between(generator, 7, 12),
            "rows": 4096,
            "copies": 8,
            PEAK_ALLOWANCE: 24 * MIB,
        },
        "by the memory of the whole process, on a wide bottleneck": lambda generator: {
            "hidden": between(generator, 12, 16),
            "bottleneck": 256,
            "rows": 8192,
            "copies": 5,
            PEAK_ALLOWANCE: 24 * MIB,
        },
    },
    adapters.check_add_adapters: {
        "in double precision": lambda generator: adapters.add_case(generator, dtype=torch.float64),
        "behind attention alone": lambda generator: adapters.add_case(generator, places=["self_attn"]),
        "with the places in the other order": lambda generator: adapters.add_case(generator, places=["mlp", "self_attn"]),
        "on a model of one layer": lambda generator: adapters.add_case(generator, layers=1),
        "on three layers with a tied head": lambda generator: adapters.add_case(generator, layers=3, tied=True),
    },
    adapters.check_adapted_memory: {
        "behind attention alone": lambda generator: adapters.adapted_memory_case(generator, places=["self_attn"]),
        "in float16, on three layers": lambda generator: adapters.adapted_memory_case(generator, dtype="float16", layers=3),
        "in double precision": lambda generator: adapters.adapted_memory_case(generator, dtype="float64"),
        "by the memory of the whole process, on a large model": _large_model,
    },
    adapters.check_adapter_parameters: {
        "behind attention alone": lambda generator: adapters.parameters_case(generator, ("self_attn",)),
        "at three places": lambda generator: adapters.parameters_case(generator, ("self_attn", "mlp", "lm_head")),
        "at other sizes": lambda generator: adapters.parameters_case(generator, ("mlp", "self_attn"), low=40),
    },
    adapters.check_adapter_bank: {
        "in double precision": lambda generator: adapters.bank_case(
            generator, [["de"], ["de", "reviews", "en"]], torch.float64
        ),
        "on other selections": lambda generator: adapters.bank_case(
            generator, [["fr"], ["reviews"], [], ["klingon"], ["en", "de"], ["reviews", "klingon"], ["de"]]
        ),
    },
    adapters.check_join: {
        "in double precision": lambda generator: adapters.join_case(generator, (5, 2), [0.3, 1.9], torch.float64),
        "in float16": lambda generator: adapters.join_case(generator, (3, 4), [-0.8, 1.2], torch.float16),
        "with weights that add up to zero": lambda generator: adapters.join_case(generator, (4, 4), [1.0, -1.0]),
        "with a weight of zero": lambda generator: adapters.join_case(generator, (3, 6), [0.0, 1.0]),
    },
}

# Automatic mutants that no check rejects (`python -m autograder.proving.prove`), and why they may live.
SURVIVORS = {
    "'self_attn'  ->  'self_attnx'": "in adapter_parameters and largest_bottleneck only the number of places counts, not their names",
    "'mlp'  ->  'mlpx'": "in adapter_parameters and largest_bottleneck only the number of places counts, not their names",
    "list(names)  ->  names": "`active` is only read: a tuple of names serves as well as a list",
}
