"""`rank_for`: the largest rank that a number of parameters pays for."""

from collections.abc import Sequence

import torch
from torch import nn

from autograder.checking.cases import between
from autograder.checking.exercise import Exercise


def rank_for(model: nn.Module, target_modules: Sequence[str], parameters: int) -> int:
    """Return the largest rank at which LoRA on the targets trains at most so many parameters."""
    per_rank = 0
    for name, module in model.named_modules():
        own_name = name.split(".")[-1]
        if own_name in target_modules and isinstance(module, nn.Linear):
            per_rank += module.in_features + module.out_features
    if per_rank == 0:
        raise ValueError("no nn.Linear has such a name")
    if per_rank > parameters:
        raise ValueError("rank 1 is too much")
    return parameters // per_rank


def rank_case(generator: torch.Generator, layers: int = 3, low: int = 5) -> dict:
    """Return the sizes of a small model, and questions about it: of every rank, budgets just enough and just not.

    The last two have no right answer: the targets match no linear layer, or the budget is less than rank 1 needs.
    """
    width, q_size, v_size = low + 14, low + between(generator, 8, 11), low + between(generator, 0, 3)
    of_q = layers * (width + q_size) + v_size + q_size  # in each block, and once at the top
    of_v = layers * (q_size + v_size)
    rank = between(generator, 30, 40)
    questions = [
        (["q_proj"], rank * of_q),  # LoRA of this rank takes all of it
        (("q_proj",), rank * of_q - 1),
        (["v_proj", "q_proj"], rank * (of_q + of_v) + between(generator, of_v // 2, of_v)),
        (("q_proj", "v_proj", "k_proj"), of_q + of_v),
        (["v_proj"], 60 * of_v + 1),  # more than any side of the layers
        (["k_proj", "proj"], 10**6),
        (["q_proj", "v_proj"], of_q + of_v - 1),
    ]
    return {"layers": layers, "width": width, "q_size": q_size, "v_size": v_size, "questions": questions}


def drive_rank_for(rank_for, layers, width, q_size, v_size, questions):
    """Ask about a model with misleading names; return each rank, or "a ValueError", and whether the model is as it was."""
    import operator

    import torch
    from torch import nn

    class Packed(nn.Module):
        def __init__(self, in_features, out_features):
            super().__init__()
            self.in_features, self.out_features = in_features, out_features
            self.weight = nn.Parameter(torch.zeros(out_features, in_features))

    def block():
        parts = {
            "q_proj": nn.Linear(width, q_size),
            "v_proj": nn.Linear(q_size, v_size, bias=False),
            "aux_q_proj": nn.Linear(width, 2 * width),
            "q_proj_gate": nn.Linear(width, 3 * width),
            "norms": nn.ModuleDict({"q_proj": nn.LayerNorm(width), "v_proj": nn.Embedding(7, width)}),
            "packed": nn.ModuleDict({"q_proj": Packed(width, q_size)}),
            "shrunk": nn.ModuleDict({"v_proj": nn.ModuleDict({"down": nn.Linear(width, 2)})}),
        }
        return nn.ModuleDict(parts)

    def state():
        kept = [(name, parameter.requires_grad, parameter.tolist()) for name, parameter in model.named_parameters()]
        return kept, [(name, type(module)) for name, module in model.named_modules()]

    blocks = nn.ModuleList(block() for _ in range(layers))
    model = nn.ModuleDict({"embed": nn.Embedding(9, width), "blocks": blocks, "q_proj": nn.Linear(v_size, q_size)})
    before, seen = state(), {}
    for target_modules, parameters in questions:
        try:
            outcome = rank_for(model, target_modules, parameters)
        except (ValueError, ArithmeticError) as error:  # any other is reported with its line
            outcome = "a ValueError" if isinstance(error, ValueError) else f"a {type(error).__name__}"
        else:
            try:
                outcome = operator.index(outcome)
            except TypeError:
                outcome = repr(outcome)[:100]
        seen[f"rank_for(model, {target_modules}, {parameters})"] = outcome
    return seen | {"the model is as it was": state() == before}


_MATCH = "own_name in target_modules and isinstance(module, nn.Linear)"
_ADD = "per_rank += module.in_features + module.out_features"
_NO_LAYER = 'if per_rank == 0:\n        raise ValueError("no nn.Linear has such a name")\n    '
_TOO_MUCH = 'if per_rank > parameters:\n        raise ValueError("rank 1 is too much")\n    '
_RETURN = "return parameters // per_rank"

check_rank_for = Exercise(
    spec=[rank_for],
    cases=lambda generator: [rank_case(generator)],
    driver=drive_rank_for,
    mistakes={
        "a layer counts if its full name contains a target: compare the last part of the name, whole": {
            _MATCH: "any(target in name for target in target_modules) and isinstance(module, nn.Linear)"
        },
        "a layer counts if its own name contains a target: compare the own name whole": {
            _MATCH: "any(target in own_name for target in target_modules) and isinstance(module, nn.Linear)"
        },
        "a layer counts if its name ends with a target's letters: `aux_q_proj` is not `q_proj`": {
            _MATCH: "name.endswith(tuple(target_modules)) and isinstance(module, nn.Linear)"
        },
        "a layer counts if its own name begins with a target's letters: `q_proj_gate` is not `q_proj`": {
            _MATCH: "own_name.startswith(tuple(target_modules)) and isinstance(module, nn.Linear)"
        },
        "every module with in_features and out_features counts: ask `isinstance(module, nn.Linear)`": {
            _MATCH: "own_name in target_modules and hasattr(module, 'in_features')"
        },
        "every linear layer counts: count those that `target_modules` names": {_MATCH: "isinstance(module, nn.Linear)"},
        "only the model's direct children are looked at: `named_modules` goes all the way down": {
            "model.named_modules()": "model.named_children()"
        },
        "only one layer counts: add up all those that match": {_ADD: _ADD.replace("+=", "=")},
        "the weight's own numbers are counted, in_features * out_features: LoRA trains their sum for each rank": {
            _ADD: "per_rank += module.in_features * module.out_features"
        },
        "only lora_A is counted: lora_B has out_features numbers a rank": {_ADD: "per_rank += module.in_features"},
        "only lora_B is counted: lora_A has in_features numbers a rank": {_ADD: "per_rank += module.out_features"},
        "biases are counted: LoRA does not train them": {_ADD: _ADD + " + (0 if module.bias is None else module.out_features)"},
        "the rank is rounded up: then LoRA trains more than `parameters`": {_RETURN: "return -(-parameters // per_rank)"},
        "a rank that takes exactly `parameters` is refused: at most so many are allowed": {
            _TOO_MUCH: _TOO_MUCH.replace(">", ">="),
            _RETURN: "return (parameters - 1) // per_rank",
        },
        "the rank is no whole number: round it down": {_RETURN: "return parameters / per_rank"},
        "the rank is a float: use // on whole numbers, or int()": {_RETURN: "return float(parameters // per_rank)"},
        "the rank stops at the smaller side of a layer: nothing but `parameters` limits it here": {
            "per_rank = 0\n": "per_rank, most = 0, 10**9\n",
            _ADD: _ADD + "\n            most = min(module.in_features, module.out_features, most)",
            _RETURN: "return min(most, parameters // per_rank)",
        },
        "targets that match no linear layer divide by zero: raise a ValueError that says so": {_NO_LAYER: ""},
        "targets that match no linear layer give rank 0: raise a ValueError": {
            _NO_LAYER: "if per_rank == 0:\n        return 0\n    "
        },
        "a budget that is too small for rank 1 gives rank 0: raise a ValueError": {_TOO_MUCH: ""},
        "a budget that is too small for rank 1 gives rank 1: raise a ValueError": {
            _TOO_MUCH: "",
            _RETURN: "return max(1, parameters // per_rank)",
        },
        "nothing is returned: write `return` in front of the result": {_RETURN: "parameters // per_rank"},
        "the model was frozen: only count, and leave it as it is": {
            "per_rank = 0\n": "per_rank = 0\n    model.requires_grad_(False)\n"
        },
    },
    variants={
        "a sum": """
            def rank_for(model, target_modules, parameters):
                named = [(n.rpartition(".")[2], m) for n, m in model.named_modules() if type(m) is nn.Linear]
                linears = [m for own, m in named if own in target_modules]
                rank = parameters // sum(sum(m.weight.shape) for m in linears) if linears else 0
                if not rank:
                    raise ValueError(target_modules)
                return rank
        """,
        "rank by rank": """
            def rank_for(model, target_modules, parameters):
                sizes = [
                    child.in_features + child.out_features
                    for parent in model.modules()
                    for name, child in parent.named_children()
                    if name in set(target_modules) and isinstance(child, nn.Linear)
                ]
                if not sizes:
                    raise ValueError("nothing matches")
                rank = 0
                while sum((rank + 1) * size for size in sizes) <= parameters:
                    rank += 1
                if rank < 1:
                    raise ValueError("not enough")
                return rank
        """,
        "a tensor": {
            _ADD: "per_rank += torch.tensor(module.weight.shape).sum()",
            _RETURN: "return int(parameters // per_rank)",
        },
    },
)
