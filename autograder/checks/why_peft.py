"""Checks of unit 01_why_peft."""

from dataclasses import asdict
from functools import cache

import torch
from torch import Tensor, nn

from autograder.cases import between
from autograder.drive import Observation
from autograder.exercise import Exercise
from peftlab.llama import PRESETS, LlamaConfig
from peftlab.simulate import simulate_training_step


def random_config(generator: torch.Generator, grouped: bool, tied: bool) -> dict:
    """Return the sizes of a LLaMA; no two of the numbers that make up its parameter count are equal."""
    heads = 2 * between(generator, 3, 5)
    hidden_size = heads * 2 * between(generator, 3, 5)
    return asdict(
        LlamaConfig(
            vocab_size=between(generator, 300, 400),
            hidden_size=hidden_size,
            intermediate_size=2 * hidden_size + between(generator, 3, 20),
            num_hidden_layers=between(generator, 3, 6),
            num_attention_heads=heads,
            num_key_value_heads=heads // 2 if grouped else heads,
            tie_word_embeddings=tied,
        )
    )


# ======================================================================================================================
# 1. How many parameters
# ======================================================================================================================
def count_parameters(config: LlamaConfig) -> int:
    """Return the number of parameters of a LLaMA (Touvron et al. 2023; its sizes are in table 2)."""
    hidden = config.hidden_size
    key_value = config.num_key_value_heads * config.head_dim
    attention = hidden * hidden + hidden * key_value + hidden * key_value + hidden * hidden
    mlp = 3 * hidden * config.intermediate_size
    norms = 2 * hidden
    embedding = config.vocab_size * hidden
    head = 0 if config.tie_word_embeddings else config.vocab_size * hidden
    return config.num_hidden_layers * (attention + mlp + norms) + hidden + embedding + head


def drive_count(count_parameters, **sizes):
    """Count for one config."""
    from peftlab.llama import LlamaConfig

    count = count_parameters(LlamaConfig(**sizes))
    return {"the type of what it returns": type(count).__name__, "the number of parameters": count}


_ATTENTION = "hidden * hidden + hidden * key_value + hidden * key_value + hidden * hidden"
_HEAD = "0 if config.tie_word_embeddings else config.vocab_size * hidden"

check_count_parameters = Exercise(
    spec=[count_parameters],
    driver=drive_count,
    cases=lambda generator: [
        random_config(generator, grouped=False, tied=False),
        random_config(generator, grouped=True, tied=False),
        random_config(generator, grouped=True, tied=True),
        asdict(PRESETS["Llama-2-70B"]),
    ],
    mistakes={
        "keys and values are counted as wide as queries: with grouped-query attention they have num_key_value_heads heads": {
            "config.num_key_value_heads * config.head_dim": "hidden",
        },
        "a tied head is counted: it is the embedding's own matrix, not another one": {
            _HEAD: "config.vocab_size * hidden",
        },
        "an untied head is not counted: it is a second matrix of the embedding's size": {_HEAD: "0"},
        "tied and untied are mixed up": {_HEAD: "config.vocab_size * hidden if config.tie_word_embeddings else 0"},
        "the norm after the last layer is missing": {"+ hidden + embedding": "+ embedding"},
        "the norms are missing: two in each layer and one after the last": {
            "norms = 2 * hidden": "norms = 0",
            "+ hidden + embedding": "+ embedding",
        },
        "a layer has two norms, one before attention and one before the MLP": {"norms = 2 * hidden": "norms = hidden"},
        "a LLaMA's MLP has three matrices: gate_proj, up_proj and down_proj": {
            "3 * hidden * config.intermediate_size": "2 * hidden * config.intermediate_size"
        },
        "o_proj is missing: attention has four matrices": {
            _ATTENTION: "hidden * hidden + hidden * key_value + hidden * key_value"
        },
        "biases are counted: a LLaMA has none": {
            "norms = 2 * hidden": "norms = 2 * hidden + 2 * hidden + 2 * key_value + 2 * config.intermediate_size + hidden",
        },
        "the embedding is missing": {"+ embedding + head": "+ head"},
        "positions are counted: RoPE computes its angles and learns nothing": {
            "+ embedding + head": "+ embedding + head + config.head_dim // 2",
        },
        "only one layer is counted": {"config.num_hidden_layers * (attention": "1 * (attention"},
        "the count is a float: use // where you divide, for above 2^53 a float cannot hold every whole number": {
            "return config.num_hidden_layers": "return 1.0 * config.num_hidden_layers",
        },
    },
    variants={
        "by building it without numbers": """
            def count_parameters(config):
                from peftlab.llama import Llama
                with torch.device("meta"):
                    return sum(parameter.numel() for parameter in Llama(config).parameters())
        """,
        "matrix by matrix": """
            def count_parameters(config):
                h, i, d = config.hidden_size, config.intermediate_size, config.head_dim
                total = config.vocab_size * h
                if not config.tie_word_embeddings:
                    total += h * config.vocab_size
                for _ in range(config.num_hidden_layers):
                    total += 2 * h
                    for rows, columns in [(h, h), (d * config.num_key_value_heads, h), (config.num_key_value_heads * d, h), (h, h)]:
                        total += rows * columns
                    for rows, columns in [(i, h), (i, h), (h, i)]:
                        total += rows * columns
                total += h
                return total
        """,
        "in units of the hidden size": {
            _ATTENTION: "2 * hidden * (hidden + key_value)",
            _HEAD: "(not config.tie_word_embeddings) * config.vocab_size * hidden",
        },
    },
)


# ======================================================================================================================
# 2. Bytes of weights, gradients and optimizer state
# ======================================================================================================================
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


def drive_bytes(training_bytes, parameters, adapted, trained):
    """Ask for every recipe, then for what there is not."""
    seen = {}
    for recipe in ("fp16", "8-bit Adam", "bf16, fp32 moments", "mixed precision", "LoRA", "QLoRA"):
        answer = training_bytes(parameters, adapted, trained, recipe)
        seen[f"the names of the categories with {recipe!r}"] = sorted(answer)
        for category, size in answer.items():
            seen[f"bytes of {category} with {recipe!r}"] = float(size)
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


def bytes_case(generator: torch.Generator, scale: int = 1) -> dict:
    """Return how many parameters there are, how many of these are adapted, and how many are trained beside them."""
    parameters = scale * between(generator, 9_000, 10_000)
    return {"parameters": parameters, "adapted": parameters * 7 // 8, "trained": scale * between(generator, 200, 300)}


_NF4 = "1 / 2 + 1 / 64 + 4 / (64 * 256)"
_STATE = '{"fp16": 4, "8-bit Adam": 2 + 2 * 4 / 256, "bf16, fp32 moments": 8, "mixed precision": 12}'
_LORA = '{"weights": base + 2 * trained, "gradients": 2 * trained, "optimizer state": 4 * trained}'

check_training_bytes = Exercise(
    spec=[training_bytes],
    driver=drive_bytes,
    cases=lambda generator: [bytes_case(generator), bytes_case(generator, scale=1_000_000)],
    # A sum of a few terms in fp64; a byte is far more than its rounding.
    tolerance=lambda case: {
        f"bytes of {category} with {recipe!r}": 1.0
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


# ======================================================================================================================
# 3. Activations
# ======================================================================================================================
def activation_bytes(config: LlamaConfig, batch_size: int, sequence_length: int, checkpointing: bool) -> float:
    """Return the bytes that forward keeps for backward, in 16 bits (after Korthikanti et al. 2022, section 4)."""
    tokens = batch_size * sequence_length
    hidden = config.hidden_size
    if checkpointing:
        layer = 2 * hidden
    else:
        norms = 2 * (4 + 2 + 2) * hidden
        key_value = config.num_key_value_heads * config.head_dim
        attention = 2 * (hidden + key_value + key_value + hidden) + 4 * config.num_attention_heads
        mlp = 4 * 2 * config.intermediate_size
        layer = norms + attention + mlp
    head = (4 + 2 + 2) * hidden + 4 * config.vocab_size
    return tokens * (config.num_hidden_layers * layer + head)


def drive_activations(activation_bytes, batch_size, sequence_length, checkpointing, **sizes):
    """Estimate for one config."""
    from peftlab.llama import LlamaConfig

    estimate = activation_bytes(LlamaConfig(**sizes), batch_size, sequence_length, checkpointing)
    return {"estimate": float(estimate)}


@cache
def _measured(sizes: tuple, **settings: object) -> int:
    return simulate_training_step(LlamaConfig(**dict(sizes)), **settings).activations


def read_activations(observation: Observation, case: dict) -> Observation:
    """Hold the estimate against a measurement, taken with fake tensors on this side."""
    sizes = dict(case)
    settings = {name: sizes.pop(name) for name in ("batch_size", "sequence_length", "checkpointing")}
    return {
        "your bytes, as a multiple of the measured ones,": observation["estimate"] / _measured(tuple(sizes.items()), **settings)
    }


def activations_case(generator: torch.Generator, checkpointing: bool, grouped: bool = True) -> dict:
    """Return a model that is wide enough for each tensor to count."""
    heads = between(generator, 3, 5)
    return asdict(
        LlamaConfig(
            vocab_size=between(generator, 1_000, 2_000),
            hidden_size=heads * 128,
            intermediate_size=heads * 320 + 64,
            num_hidden_layers=between(generator, 2, 3),
            num_attention_heads=2 * heads,
            num_key_value_heads=heads if grouped else 2 * heads,
        )
    ) | {
        "batch_size": between(generator, 2, 3),
        "sequence_length": 64 * between(generator, 3, 6),
        "checkpointing": checkpointing,
    }


_KEPT_BY_ATTENTION = "2 * (hidden + key_value + key_value + hidden) + 4 * config.num_attention_heads"

check_activation_bytes = Exercise(
    spec=[activation_bytes],
    driver=drive_activations,
    reading=read_activations,
    cases=lambda generator: [activations_case(generator, False), activations_case(generator, True)],
    # The measurement has a few small tensors more: angles, the norms' scales, labels, and one token fewer in the loss.
    tolerance=lambda case: {"your bytes, as a multiple of the measured ones,": 0.02},
    mistakes={
        "the batch is missing: every sequence has its own activations": {"batch_size * sequence_length": "sequence_length"},
        "the layers are missing": {"config.num_hidden_layers * layer": "layer"},
        "the head is missing: its logits, in fp32, are the largest single tensor": {
            "config.num_hidden_layers * layer + head": "config.num_hidden_layers * layer"
        },
        "the logits are counted in 16 bits: the loss is taken in fp32": {"4 * config.vocab_size": "2 * config.vocab_size"},
        "a norm works in fp32: what it keeps of its input has 4 bytes a number": {
            "2 * (4 + 2 + 2) * hidden": "2 * (2 + 2 + 2) * hidden"
        },
        "there are two norms in a layer": {"norms = 2 * (4 + 2 + 2)": "norms = (4 + 2 + 2)"},
        "the MLP keeps four tensors of intermediate_size: gate, its silu, up, and the product that down_proj reads": {
            "4 * 2 * config.intermediate_size": "2 * 2 * config.intermediate_size"
        },
        "the MLP keeps silu(gate) as well as gate: the product needs one and silu's gradient the other": {
            "4 * 2 * config.intermediate_size": "3 * 2 * config.intermediate_size"
        },
        "keys and values are counted as wide as queries": {"config.num_key_value_heads * config.head_dim": "hidden"},
        "attention keeps its keys and values as well as its queries and its output": {
            _KEPT_BY_ATTENTION: "2 * (hidden + hidden)"
        },
        "a matrix of sequence_length x sequence_length is counted for each head: flash attention never stores it": {
            _KEPT_BY_ATTENTION: _KEPT_BY_ATTENTION + " + 2 * config.num_attention_heads * sequence_length",
        },
        "with checkpointing a layer keeps its input alone, in 2 bytes": {"layer = 2 * hidden": "layer = 4 * hidden"},
        "checkpointing is ignored": {"if checkpointing:": "if False:"},
        "with checkpointing the head is still there": {
            "head = (4 + 2 + 2) * hidden + 4 * config.vocab_size": (
                "head = 0 if checkpointing else (4 + 2 + 2) * hidden + 4 * config.vocab_size"
            )
        },
        "every number is counted in fp32": {
            "return tokens * (": "return 2 * tokens * (",
        },
    },
    variants={
        "without the small change": {_KEPT_BY_ATTENTION: "4 * hidden + 4 * key_value"},
        "in units of s b h": """
            def activation_bytes(config, batch_size, sequence_length, checkpointing):
                sbh = sequence_length * batch_size * config.hidden_size
                groups = config.num_key_value_heads / config.num_attention_heads
                ratio = config.intermediate_size / config.hidden_size
                layer = 2 if checkpointing else 20 + 4 * groups + 8 * ratio
                return sbh * (layer * config.num_hidden_layers + 8 + 4 * config.vocab_size / config.hidden_size)
        """,
        "tensor by tensor": """
            def activation_bytes(config, batch_size, sequence_length, checkpointing):
                def norm():
                    return sum(width * config.hidden_size for width in (4, 2, 2))
                kept = 0
                for _ in range(config.num_hidden_layers):
                    if checkpointing:
                        kept += config.hidden_size * 2
                        continue
                    kept += norm() + norm()
                    kept += 2 * config.num_attention_heads * config.head_dim * 2
                    kept += 2 * config.num_key_value_heads * config.head_dim * 2
                    kept += 4 * config.num_attention_heads
                    for _ in ("gate", "silu", "up", "product"):
                        kept += 2 * config.intermediate_size
                kept += norm() + 4 * config.vocab_size
                return kept * batch_size * sequence_length
        """,
    },
)


# ======================================================================================================================
# 4. One step of Adam, in a given precision
# ======================================================================================================================
def adam_step(
    weight: Tensor, gradient: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: int, learning_rate: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the new weight and the two new moments (Kingma and Ba 2015, algorithm 1)."""
    beta1, beta2, eps = 0.9, 0.999, 1e-8
    exp_avg = beta1 * exp_avg + (1 - beta1) * gradient
    exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * (gradient * gradient)
    unbiased = exp_avg / (1 - beta1**step)
    unbiased_sq = exp_avg_sq / (1 - beta2**step)
    weight = weight - learning_rate * unbiased / (unbiased_sq.sqrt() + eps)
    return weight, exp_avg, exp_avg_sq


def drive_adam(adam_step, weight, gradient, exp_avg, exp_avg_sq, step, learning_rate):
    """Take a step, then two from nothing in fp16 and bf16."""
    import torch

    given = [tensor.clone() for tensor in (weight, gradient, exp_avg, exp_avg_sq)]
    new_weight, new_exp_avg, new_exp_avg_sq = adam_step(weight, gradient, exp_avg, exp_avg_sq, step, learning_rate)
    unchanged = all(torch.equal(*pair) for pair in zip(given, (weight, gradient, exp_avg, exp_avg_sq), strict=True))
    half = torch.ones(1, dtype=torch.float16)
    brain = torch.ones(1, dtype=torch.bfloat16)
    fell = adam_step(half, half * 1e-3, half * 0, half * 0, 1, 1e-3)[0]
    stayed = adam_step(brain, brain * 1e-3, brain * 0, brain * 0, 1, 1e-3)[0]
    return {
        "the first moment": new_exp_avg,
        "the second moment": new_exp_avg_sq,
        "the weight": new_weight,
        "the given tensors are unchanged": unchanged,
        "the dtype after a step in fp16": str(fell.dtype),
        "a weight of 1 in fp16 after a gradient of 0.001 is -inf": bool(torch.isneginf(fell).item()),
        "a weight of 1 in bf16 after a step of 0.001 is still 1": bool((stayed == 1).item()),
    }


def adam_case(generator: torch.Generator, dtype: torch.dtype = torch.float64) -> dict:
    """Return a weight, a gradient and moments as they may be in the midst of training."""
    shape = (between(generator, 3, 5), between(generator, 6, 8))

    def normal() -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "weight": normal(),
        "gradient": normal(),
        "exp_avg": normal(),
        "exp_avg_sq": normal() ** 2 + 0.5,
        "step": between(generator, 2, 9),
        "learning_rate": 0.1 + torch.rand((), generator=generator).item(),
    }


def adam_tolerance(case: dict) -> dict[str, float]:
    """Some ten roundings, each of at most eps / 2 of numbers whose size is bounded by those in the case.

    The quotient is at most max|m| / sqrt(min v), and each moment is divided by its bias correction before.
    """
    eps = torch.finfo(case["weight"].dtype).eps
    first = case["exp_avg"].abs().max().item() + case["gradient"].abs().max().item()
    second = case["exp_avg_sq"].max().item() + case["gradient"].abs().max().item() ** 2
    smallest = case["exp_avg_sq"].min().item() * 0.99
    quotient = case["learning_rate"] * first / (1 - 0.9 ** case["step"]) / smallest**0.5
    return {
        "the first moment": 4 * eps * first,
        "the second moment": 4 * eps * second,
        "the weight": 16 * eps * (quotient + case["weight"].abs().max().item()),
    }


_UPDATE = "weight - learning_rate * unbiased / (unbiased_sq.sqrt() + eps)"

check_adam_step = Exercise(
    spec=[adam_step],
    driver=drive_adam,
    cases=lambda generator: [adam_case(generator), adam_case(generator)],
    tolerance=adam_tolerance,
    mistakes={
        "the second moment averages the gradient, not its square": {"(gradient * gradient)": "gradient"},
        "the moments are not corrected for having started at zero: divide by 1 - beta^step": {
            "unbiased = exp_avg / (1 - beta1**step)": "unbiased = exp_avg",
            "unbiased_sq = exp_avg_sq / (1 - beta2**step)": "unbiased_sq = exp_avg_sq",
        },
        "the first moment is not corrected": {"unbiased = exp_avg / (1 - beta1**step)": "unbiased = exp_avg"},
        "the second moment is not corrected": {"unbiased_sq = exp_avg_sq / (1 - beta2**step)": "unbiased_sq = exp_avg_sq"},
        "the correction takes beta once, not to the power of the step": {
            "(1 - beta1**step)": "(1 - beta1)",
            "(1 - beta2**step)": "(1 - beta2)",
        },
        "the root is missing: the update is divided by the root of the second moment": {
            "unbiased_sq.sqrt() + eps": "unbiased_sq + eps"
        },
        "the step goes uphill: subtract it": {"weight - learning_rate": "weight + learning_rate"},
        "the betas are mixed up: 0.9 for the first moment, 0.999 for the second": {
            "beta1, beta2, eps = 0.9, 0.999": "beta1, beta2, eps = 0.999, 0.9"
        },
        "beta and 1 - beta are mixed up: a moment keeps most of what it was": {
            "beta1 * exp_avg + (1 - beta1) * gradient": "(1 - beta1) * exp_avg + beta1 * gradient",
            "beta2 * exp_avg_sq + (1 - beta2)": "(1 - beta2) * exp_avg_sq + beta2",
        },
        "the learning rate is missing": {"learning_rate * unbiased": "unbiased"},
        "the moments that come back are the corrected ones: the next step would correct them again": {
            "return weight, exp_avg, exp_avg_sq": "return weight, unbiased, unbiased_sq"
        },
        "the moments that come back are the old ones": {
            "exp_avg = beta1 * exp_avg": "old = exp_avg, exp_avg_sq\n    exp_avg = beta1 * exp_avg",
            "return weight, exp_avg, exp_avg_sq": "return weight, *old",
        },
        "epsilon is added inside the root: it comes after it": {"unbiased_sq.sqrt() + eps": "(unbiased_sq + eps).sqrt()"},
        "the correction takes the power of the next step: the first step is 1": {
            "(1 - beta1**step)": "(1 - beta1 ** (step + 1))",
            "(1 - beta2**step)": "(1 - beta2 ** (step + 1))",
        },
        "the numbers go through fp32, and the given ones are in fp64: compute in the dtype that is given": {
            "exp_avg = beta1": "weight, gradient, exp_avg, exp_avg_sq = "
            "(t.float().to(t.dtype) for t in (weight, gradient, exp_avg, exp_avg_sq))\n    exp_avg = beta1",
        },
        "the numbers are converted to a wider dtype on the way: compute in the dtype that is given": {
            "exp_avg = beta1": "dtype = weight.dtype\n    weight, gradient, exp_avg, exp_avg_sq = "
            "(t.double() for t in (weight, gradient, exp_avg, exp_avg_sq))\n    exp_avg = beta1",
            "return weight, exp_avg, exp_avg_sq": "return weight.to(dtype), exp_avg.to(dtype), exp_avg_sq.to(dtype)",
        },
        "the tensors that were given have been changed: compute new ones": {
            "exp_avg = beta1 * exp_avg + (1 - beta1) * gradient": "exp_avg.mul_(beta1).add_((1 - beta1) * gradient)",
        },
    },
    variants={
        "with lerp": {
            "beta1 * exp_avg + (1 - beta1) * gradient": "torch.lerp(exp_avg, gradient, 1 - beta1)",
        },
        "as torch.optim orders it": {
            _UPDATE: "weight - (learning_rate / (1 - beta1**step)) * (exp_avg / "
            "(exp_avg_sq.sqrt() / (1 - beta2**step) ** 0.5 + eps))",
        },
        "on clones, in place": {
            "beta2 * exp_avg_sq + (1 - beta2) * (gradient * gradient)": (
                "exp_avg_sq.clone().mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)"
            ),
            _UPDATE: "weight.clone().sub_(learning_rate * unbiased / (unbiased_sq**0.5 + eps))",
        },
    },
)


# ======================================================================================================================
# 5. Which kind of method is it
# ======================================================================================================================
def classify(base: frozenset[str], trained: frozenset[str], deployed: frozenset[str]) -> str:
    """Return the kind of a method (the taxonomy of Lialin et al. 2023, arXiv 2303.15647)."""
    if trained == base:
        return "full"
    if trained <= base:
        return "selective"
    if deployed == base:
        return "reparameterization"
    return "additive"


def drive_classify(classify, evidence):
    """Classify each method from the names of tensors."""
    return {
        f"the kind of {label}": str(classify(frozenset(base), frozenset(trained), frozenset(deployed)))
        for label, base, trained, deployed in evidence
    }


def evidence_case(generator: torch.Generator, layers: int = 2) -> dict:
    """Return what the methods of this course change, in a model of two layers, in random order."""
    base = ["embed_tokens.weight", "norm.weight"]
    for layer in range(layers):
        base += [f"layers.{layer}.{name}" for name in ("q_proj.weight", "q_proj.bias", "down_proj.weight", "down_proj.bias")]
    linear = [name for name in base if "proj.weight" in name]
    factors = [name.replace("weight", factor) for name in linear for factor in ("lora_A", "lora_B")]
    adapters = [f"layers.{layer}.adapter.{name}" for layer in range(layers) for name in ("down", "up")]
    prefix = [f"layers.{layer}.prefix_{name}" for layer in range(layers) for name in ("keys", "values")]
    evidence = [
        ["full fine-tuning", base, base, base],
        ["BitFit", base, [name for name in base if name.endswith("bias")], base],
        ["freezing all layers but the last", base, [name for name in base if f"layers.{layers - 1}." in name], base],
        ["LoRA, merged", base, factors, base],
        ["adapters", base, adapters, [*base, *adapters]],
        ["prompt tuning", base, ["soft_prompt"], [*base, "soft_prompt"]],
        ["prefix tuning", base, prefix, [*base, *prefix]],
        ["LoRA with trained norms, merged", base, [*factors, "norm.weight"], base],
        ["prompt tuning with a trained norm", base, ["soft_prompt", "norm.weight"], [*base, "soft_prompt"]],
    ]
    order = torch.randperm(len(evidence), generator=generator).tolist()
    return {"evidence": [evidence[index] for index in order]}


check_classify = Exercise(
    spec=[classify],
    driver=drive_classify,
    cases=lambda generator: [evidence_case(generator)],
    mistakes={
        "full fine-tuning is called selective: it selects nothing, for it trains all that there is": {
            'if trained == base:\n        return "full"\n    ': ""
        },
        "LoRA is called additive: what it adds while it trains is gone when it is merged": {
            'if deployed == base:\n        return "reparameterization"\n    ': ""
        },
        "a selective method is called a reparameterization: ask first whether anything new is trained": {
            'if trained <= base:\n        return "selective"\n    if deployed == base:\n        return "reparameterization"\n': (
                'if deployed == base:\n        return "reparameterization"\n    if trained <= base:\n        return "selective"\n'
            )
        },
        "every method that trains part of the names is called selective, LoRA and adapters as well": {
            "trained <= base": "len(trained) < len(base)"
        },
        "a method that trains old and new tensors at once is called selective: it is, only if it trains nothing new": {
            "trained <= base": "trained & base"
        },
        "additive and reparameterization are mixed up": {
            '"reparameterization"': '"additive"',
            'return "additive"': 'return "reparameterization"',
        },
        "the names are compared with what is deployed, not with the base": {"trained <= base": "trained <= deployed"},
        "only names that differ from the base's are looked at: LoRA's norms are trained too, and it stays a reparameterization": {
            "deployed == base": "deployed == base and not trained & base"
        },
    },
    variants={
        "by differences": {
            "trained <= base": "not trained - base",
            "deployed == base": "not (deployed ^ base)",
        },
        "from what is new": """
            def classify(base, trained, deployed):
                new = {name for name in trained if name not in base}
                if new:
                    left = [name for name in deployed if name not in base]
                    return "additive" if left else "reparameterization"
                return "full" if len(trained) == len(base) else "selective"
        """,
        "as a match": """
            def classify(base, trained, deployed):
                match (trained.issubset(base), trained.issuperset(base), deployed.issubset(base)):
                    case (True, True, _):
                        return "full"
                    case (True, False, _):
                        return "selective"
                    case (False, _, True):
                        return "reparameterization"
                    case _:
                        return "additive"
        """,
    },
)


# ======================================================================================================================
# 6. Bug hunt: half of the parameters are gone
# ======================================================================================================================
def count_trainable(model: nn.Module) -> tuple[int, int]:
    """Return how many numbers are trained, and how many there are (transformers issue 25978, peft pull request 733)."""
    trained = total = 0
    for parameter in model.parameters():
        count = 1
        for size in getattr(parameter, "original_shape", parameter.shape):
            count *= size
        total += count
        if parameter.requires_grad:
            trained += count
    return trained, total


def drive_trainable(count_trainable, in_features, out_features, rank, tied):
    """Count the numbers of a small model with a packed weight, a trained factor, a buffer, and perhaps a tie."""
    import torch
    from torch import nn

    model = nn.Module()
    model.embedding = nn.Parameter(torch.zeros(out_features, in_features), requires_grad=False)
    packed = nn.Parameter(torch.zeros(-(-in_features * out_features // 2), 1, dtype=torch.uint8), requires_grad=False)
    packed.original_shape = torch.Size((out_features, in_features))
    model.packed = packed
    model.lora_A = nn.Parameter(torch.zeros(rank, in_features))
    model.norm = nn.Parameter(torch.ones(in_features + 1), requires_grad=False)
    model.scale = nn.Parameter(torch.ones(()), requires_grad=True)
    model.bytes = nn.Parameter(torch.zeros(3, dtype=torch.uint8), requires_grad=False)
    model.register_buffer("absmax", torch.zeros(7))
    model.head = model.embedding if tied else nn.Parameter(torch.zeros(out_features, in_features), requires_grad=False)
    trained, total = count_trainable(model)
    return {"how many numbers are trained": trained, "how many numbers there are": total}


def trainable_case(generator: torch.Generator, tied: bool = False) -> dict:
    """Return odd sizes, so that the last byte is half empty."""
    return {
        "in_features": 2 * between(generator, 10, 20) + 1,
        "out_features": 2 * between(generator, 25, 35) + 1,
        "rank": between(generator, 3, 5),
        "tied": tied,
    }


_SHAPE = 'getattr(parameter, "original_shape", parameter.shape)'

check_count_trainable = Exercise(
    spec=[count_trainable],
    driver=drive_trainable,
    cases=lambda generator: [trainable_case(generator), trainable_case(generator, tied=True)],
    mistakes={
        "packed weights are counted by the byte: each byte holds two of them": {_SHAPE: "parameter.shape"},
        "what is trained is counted only in part: count_trainable must halve nothing": {
            "return trained, total": "return trained // 2, total"
        },
        "every parameter is counted twice, not only the packed ones": {
            _SHAPE: "parameter.shape",
            "total += count": "count *= 2\n        total += count",
        },
        "the half byte at the end counts as a number: take the original shape, not two a byte": {
            "total += count": "if hasattr(parameter, 'original_shape'): count = 2 * parameter.numel()\n        total += count",
        },
        "every uint8 tensor is taken for a packed one: only those with an original shape are": {
            "total += count": "if parameter.dtype == torch.uint8: count = 2 * parameter.numel()\n        total += count",
        },
        "buffers are counted: they are no parameters": {
            "return trained, total": "return trained, total + sum(buffer.numel() for buffer in model.buffers())"
        },
        "a tied weight is counted twice": {
            "model.parameters():": "[p for _, p in model.named_parameters(remove_duplicate=False)]:"
        },
        "the two counts are swapped: first what is trained, then all": {"return trained, total": "return total, trained"},
        "what is trained is not part of the whole: count it in both": {
            "total += count\n        if parameter.requires_grad:\n            trained += count": (
                "if parameter.requires_grad:\n            trained += count\n        else:\n            total += count"
            ),
        },
        "frozen numbers are counted as trained": {"if parameter.requires_grad:": "if True:"},
        "a number that is no matrix counts, too: a tensor without dimensions holds one number": {
            "total += count": "count = count if parameter.ndim else 0\n        total += count",
        },
    },
    variants={
        "with numel": """
            def count_trainable(model):
                def numbers(parameter):
                    return parameter.original_shape.numel() if hasattr(parameter, "original_shape") else parameter.numel()
                parameters = list(model.parameters())
                return sum(numbers(p) for p in parameters if p.requires_grad), sum(map(numbers, parameters))
        """,
        "with math.prod": {
            "count = 1\n        for size in "
            + _SHAPE
            + ":\n            count *= size": "import math\n        count = math.prod(" + _SHAPE + ")",
        },
        "ties by identity": """
            def count_trainable(model):
                seen, trained, total = set(), 0, 0
                for module in model.modules():
                    for parameter in module._parameters.values():
                        if parameter is None or id(parameter) in seen:
                            continue
                        seen.add(id(parameter))
                        count = torch.Size(getattr(parameter, "original_shape", parameter.shape)).numel()
                        trained, total = trained + count * parameter.requires_grad, total + count
                return trained, total
        """,
    },
)

EXERCISES = {name: exercise for name, exercise in globals().items() if isinstance(exercise, Exercise)}
"""Every exercise of the unit, by the name of its check."""
