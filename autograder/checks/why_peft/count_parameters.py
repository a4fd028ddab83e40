"""`count_parameters`: how many parameters a LLaMA has."""

from dataclasses import asdict

import torch

from autograder.checking.cases import between
from autograder.checking.exercise import Exercise
from peftlab.llama import PRESETS, LlamaConfig


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


def drive_count(count_parameters, **sizes):
    """Count for one config."""
    from peftlab.llama import LlamaConfig

    config = LlamaConfig(**sizes)
    count = count_parameters(config)
    return {"the type of what it returns": type(count).__name__, f"the number of parameters of {config}": count}


_ATTENTION = "hidden * hidden + hidden * key_value + hidden * key_value + hidden * hidden"
_HEAD = "0 if config.tie_word_embeddings else config.vocab_size * hidden"

check_count_parameters = Exercise(
    spec=[count_parameters],
    cases=lambda generator: [
        random_config(generator, grouped=False, tied=False),
        random_config(generator, grouped=True, tied=False),
        random_config(generator, grouped=True, tied=True),
        asdict(PRESETS["Llama-2-70B"]),
    ],
    driver=drive_count,
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
