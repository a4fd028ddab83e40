"""`training_bytes`: weights, gradients and optimizer state."""

import torch

from autograder.checking.cases import between
from autograder.checking.exercise import Exercise


def training_bytes(parameters: int, adapted: int, trained: int, recipe: str) -> dict[str, float]:
    """Return the bytes of weights, gradients and optimizer state (ZeRO, section 3.1; QLoRA, section 3)."""
    if parameters <= 0 or adapted < 0 or trained < 0:
        raise ValueError("a number of parameters cannot be negative")
    if recipe in ("LoRA", "QLoRA"):
        nf4 = 1 / 2 + 1 / 64 + 4 / (64 * 256)
        base = 2 * parameters if recipe == "LoRA" else 2 * (parameters - adapted) + nf4 * adapted
        return {"weights": base + 2 * trained, "gradients": 2 * trained, "optimizer state": 4 * trained}
    state = {"fp16": 4, "8-bit Adam": 2 + 2 * 4 / 256, "bf16, fp32 moments": 8, "mixed precision": 12}
    if recipe not in state:
        raise ValueError(f"unknown recipe {recipe!r}")
    return {"weights": 2 * parameters, "gradients": 2 * parameters, "optimizer state": state[recipe] * parameters}


def bytes_case(generator: torch.Generator, scale: int = 1) -> dict:
    """Return how many parameters there are, how many of these are adapted, and how many are trained beside them."""
    parameters = scale * between(generator, 9_000, 10_000)
    return {"parameters": parameters, "adapted": parameters * 7 // 8, "trained": scale * between(generator, 200, 300)}


def drive_bytes(training_bytes, parameters, adapted, trained):
    """Ask for every recipe, then for what there is not."""
    seen = {}
    for recipe in ("fp16", "8-bit Adam", "bf16, fp32 moments", "mixed precision", "LoRA", "QLoRA"):
        answer = training_bytes(parameters, adapted, trained, recipe)
        called = f"training_bytes({parameters}, {adapted}, {trained}, {recipe!r})"
        seen[f"the names in {called}"] = sorted(answer)
        for category, size in answer.items():
            seen[f"the bytes of {category} in {called}"] = float(size)
    for label, arguments in (
        ("an unknown recipe", (parameters, adapted, trained, "fp12")),
        ("a negative number of parameters", (-parameters, adapted, trained, "fp16")),
    ):
        try:
            training_bytes(*arguments)
            seen[f"what {label} raises"] = "nothing"
        except Exception as error:
            seen[f"what {label} raises"] = type(error).__name__
    return seen


_NF4 = "1 / 2 + 1 / 64 + 4 / (64 * 256)"
_STATE = '{"fp16": 4, "8-bit Adam": 2 + 2 * 4 / 256, "bf16, fp32 moments": 8, "mixed precision": 12}'
_LORA = '{"weights": base + 2 * trained, "gradients": 2 * trained, "optimizer state": 4 * trained}'

check_training_bytes = Exercise(
    spec=[training_bytes],
    cases=lambda generator: [bytes_case(generator), bytes_case(generator, scale=1_000_000)],
    driver=drive_bytes,
    # A sum of a few terms in fp64; a byte is far more than its rounding.
    tolerance=lambda case: {
        f"the bytes of {category} in training_bytes({case['parameters']}, {case['adapted']}, {case['trained']}, {recipe!r})": 1.0
        for category in ("weights", "gradients", "optimizer state")
        for recipe in ("fp16", "8-bit Adam", "bf16, fp32 moments", "mixed precision", "LoRA", "QLoRA")
    },
    mistakes={
        "Adam keeps two moments for each parameter: with fp16 moments these are 4 bytes": {'"fp16": 4': '"fp16": 2'},
        "fp32 moments are 4 bytes each, 8 for the two": {'moments": 8': 'moments": 4'},
        "mixed precision keeps a master copy of the weights in fp32, another 4 bytes beside the moments": {
            'precision": 12': 'precision": 8'
        },
        "the gradients are counted twice, with the optimizer's state as well: that is how the seed's table has it": {
            _STATE: _STATE.replace("4,", "6,").replace("256,", "256 + 2,").replace("8,", "10,").replace("12}", "14}"),
        },
        "8-bit Adam's scales are missing: an fp32 number for every 256 values of each moment": {"2 + 2 * 4 / 256": "2"},
        "8-bit Adam has two moments, each with its own scales": {"2 + 2 * 4 / 256": "1 + 4 / 256"},
        "LoRA's frozen base gets gradients: only the factors do": {
            _LORA: _LORA.replace('"gradients": 2 * trained', '"gradients": 2 * parameters')
        },
        "LoRA's frozen base gets optimizer state: only the factors do": {
            _LORA: _LORA.replace('"optimizer state": 4 * trained', '"optimizer state": 4 * parameters')
        },
        "LoRA's factors are weights too: 2 bytes for each of their numbers": {
            _LORA: _LORA.replace("base + 2 * trained", "base")
        },
        "with QLoRA all weights are counted in 4 bits: embedding, head and norms stay in 16": {
            "2 * (parameters - adapted) + nf4 * adapted": "nf4 * parameters"
        },
        "the scales of the 4-bit blocks are missing: one number for every 64 weights": {_NF4: "1 / 2"},
        "the scales of the 4-bit blocks are counted in fp32: double quantization stores them in 8 bits": {
            _NF4: "1 / 2 + 4 / 64"
        },
        "double quantization has scales of its own: an fp32 number for every 256 of the 8-bit ones": {_NF4: "1 / 2 + 1 / 64"},
        "four bits are half a byte, not four": {_NF4: "4 + 1 / 64 + 4 / (64 * 256)"},
        "these are bits, not bytes": {
            _LORA: '{"weights": 8 * (base + 2 * trained), "gradients": 16 * trained, "optimizer state": 32 * trained}',
            '"weights": 2 * parameters, "gradients": 2 * parameters, "optimizer state": state[recipe] * parameters': (
                '"weights": 16 * parameters, "gradients": 16 * parameters, "optimizer state": 8 * state[recipe] * parameters'
            ),
        },
        "an unknown recipe goes unnoticed: raise a ValueError that names it": {
            'raise ValueError(f"unknown recipe {recipe!r}")': 'recipe = "fp16"'
        },
        "a negative number of parameters goes unnoticed: raise a ValueError": {
            'raise ValueError("a number of parameters cannot be negative")': "pass"
        },
    },
    variants={
        "from bits": {
            _NF4: "(4 + 8 / 64 + 32 / 64 / 256) / 8",
            "2 + 2 * 4 / 256": "(16 + 2 * 32 / 256) / 8",
        },
        "a branch a recipe": """
            def training_bytes(parameters, adapted, trained, recipe):
                if min(parameters, adapted, trained) < 0:
                    raise ValueError("negative")
                weights = gradients = 2 * parameters
                if recipe == "fp16":
                    state = 2 * parameters + 2 * parameters
                elif recipe == "8-bit Adam":
                    state = 2 * (parameters + 4 * parameters / 256)
                elif recipe == "bf16, fp32 moments":
                    state = 2 * 4 * parameters
                elif recipe == "mixed precision":
                    state = 3 * 4 * parameters
                elif recipe == "LoRA":
                    weights, gradients, state = 2 * (parameters + trained), 2 * trained, 2 * trained * 2
                elif recipe == "QLoRA":
                    scales = adapted / 64
                    weights = adapted / 2 + scales + 4 * scales / 256 + 2 * (parameters - adapted + trained)
                    gradients, state = trained * 2, trained * 4
                else:
                    raise ValueError(recipe)
                return dict(zip(["weights", "gradients", "optimizer state"], [weights, gradients, state]))
        """,
        "in another order": {
            '{"weights": 2 * parameters, "gradients": 2 * parameters, "optimizer state": state[recipe] * parameters}': (
                '{"optimizer state": parameters * state[recipe], "gradients": parameters * 2, "weights": parameters * 2}'
            ),
        },
    },
)
