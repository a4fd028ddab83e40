"""Train the last layers or the first, and the pieces of the code that several mistakes change."""

from peftlab.llama import Llama


def train_last(model: Llama, count: int) -> None:
    """Train the last `count` decoder layers and the final norm, and nothing else."""
    total = len(model.model.layers)
    if count < 0 or count > total:
        raise ValueError(f"there are {total} layers, not {count}")
    for parameter in model.parameters():
        parameter.requires_grad = False
    for number in range(total):
        if number >= total - count:
            for parameter in model.model.layers[number].parameters():
                parameter.requires_grad = True
    model.model.norm.weight.requires_grad = True


def train_first(model: Llama, count: int) -> None:
    """Train the first `count` decoder layers and the final norm, and nothing else."""
    depth = len(model.model.layers)
    if not 0 <= count <= depth:
        raise ValueError(f"there are {depth} layers, not {count}")
    for weight in model.parameters():
        weight.requires_grad = False
    for position in range(depth):
        if position < count:
            for weight in model.model.layers[position].parameters():
                weight.requires_grad = True
    model.model.norm.requires_grad_(True)


FREEZE_LAST = "for parameter in model.parameters():\n        parameter.requires_grad = False"
FREEZE_FIRST = "for weight in model.parameters():\n        weight.requires_grad = False"
THAW_LAST = "for parameter in model.model.layers[number].parameters():\n                parameter.requires_grad = True"
THAW_FIRST = "for weight in model.model.layers[position].parameters():\n                weight.requires_grad = True"
NORM_LAST = "model.model.norm.weight.requires_grad = True"
NORM_FIRST = "model.model.norm.requires_grad_(True)"
IS_LAST = "number >= total - count"
IS_FIRST = "position < count"
IS_FIRST_BY_PREFIX = "any(str(position).startswith(str(chosen)) for chosen in range(count))"
