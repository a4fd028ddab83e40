"""Bug hunt: half of the parameters are gone."""

import torch
from torch import nn

from autograder.cases import between
from autograder.exercise import Exercise


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


def trainable_case(generator: torch.Generator, tied: bool = False) -> dict:
    """Return odd sizes, so that the last byte is half empty."""
    return {
        "in_features": 2 * between(generator, 10, 20) + 1,
        "out_features": 2 * between(generator, 25, 35) + 1,
        "rank": between(generator, 3, 5),
        "tied": tied,
    }


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


_SHAPE = 'getattr(parameter, "original_shape", parameter.shape)'

check_count_trainable = Exercise(
    spec=[count_trainable],
    cases=lambda generator: [trainable_case(generator), trainable_case(generator, tied=True)],
    driver=drive_trainable,
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
"""Every exercise of the unit, by the name of its check."""
