"""The hidden cases of unit 06_prefix_tuning: for every check, what kind of case it is and how to make one."""

import torch

from autograder.checking.judging import PEAK_ALLOWANCE
from autograder.checks import prefix_tuning

MIB = 2**20


def _long_texts(generator: torch.Generator) -> dict:
    """Three layers whose probabilities take 24 MiB each."""
    x = torch.randn(4, 512, 48, generator=generator)
    return prefix_tuning.memory_case(generator, layers=3) | {"x": x, "large": True, PEAK_ALLOWANCE: 32 * MIB}


def _large_base(generator: torch.Generator) -> dict:
    """Four layers of 9 MiB: their gradients and AdamW's state take three times as much."""
    keys, values = torch.randn(2, 4, 2, 6, 128, generator=generator)
    return prefix_tuning.model_case(generator) | {"weights": None, "keys": keys, "values": values, PEAK_ALLOWANCE: 24 * MIB}


CASES = {
    prefix_tuning.check_prefix_attention: {
        "in double precision": lambda generator: prefix_tuning.attention_case(generator, torch.float64),
        "in bfloat16, with padding and a prefix in float32": lambda generator: prefix_tuning.attention_case(
            generator, torch.bfloat16, prefix_dtype=torch.float32, padded=True
        ),
        "in float16": lambda generator: prefix_tuning.attention_case(generator, torch.float16),
        "in single precision, with padding": lambda generator: prefix_tuning.attention_case(generator, padded=True),
        "where every query head has its own keys": lambda generator: prefix_tuning.attention_case(generator, grouped=False),
        "with a prefix of one token": lambda generator: prefix_tuning.attention_case(generator, tokens=1, padded=True),
    },
    prefix_tuning.check_prefix_memory: {
        "by the memory of the whole process, on long texts": _long_texts,
        "with wider heads": lambda generator: prefix_tuning.memory_case(generator, head_dim=16),
        "in double precision": lambda generator: prefix_tuning.memory_case(generator, torch.float64),
    },
    prefix_tuning.check_prefix_model: {
        "by the memory of the whole process, on a large base": _large_base,
        "in double precision": lambda generator: prefix_tuning.model_case(generator, torch.float64),
        "with padding on the right": lambda generator: prefix_tuning.model_case(generator, left=False),
        "with four layers and a prefix of one token": lambda generator: prefix_tuning.model_case(generator, tokens=1, layers=4),
        "with a single layer": lambda generator: prefix_tuning.model_case(generator, layers=1),
    },
    prefix_tuning.check_prefix_from_tokens: {
        "in double precision": lambda generator: prefix_tuning.tokens_case(generator, torch.float64),
        "in float16, with one layer": lambda generator: prefix_tuning.tokens_case(generator, torch.float16, layers=1),
        "with four layers and three key-value heads": lambda generator: prefix_tuning.tokens_case(
            generator, kv_heads=3, layers=4
        ),
        "on a single token": lambda generator: prefix_tuning.tokens_case(generator, tokens=1),
        "on another device": lambda generator: prefix_tuning.tokens_case(generator) | {"elsewhere": True},
    },
    prefix_tuning.check_reparameterized: {
        "in double precision": lambda generator: prefix_tuning.reparameterized_case(generator, torch.float64),
        "with one layer": lambda generator: prefix_tuning.reparameterized_case(generator, layers=1),
        "with seven layers": lambda generator: prefix_tuning.reparameterized_case(generator, layers=7),
    },
    prefix_tuning.check_prefix_cache: {
        "in double precision": lambda generator: prefix_tuning.cache_case(generator, torch.float64),
        "with three layers": lambda generator: prefix_tuning.cache_case(generator, layers=3),
    },
}

# Automatic mutants that no check rejects (`python -m autograder.proving.prove`), and why they may live.
SURVIVORS = {
    "wrap = wrap or PrefixAttention  ->  pass": "this line is given, not written by the student; the check passes a `wrap` of its "
    "own, so that it does not depend on another exercise",
    "0  ->  1": "the number of tokens may be read from the values as well, which are as many as the keys",
}
