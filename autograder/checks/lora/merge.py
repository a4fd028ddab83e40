"""`merge` and `unmerge`: the update in the base weight, and out of it again."""

import torch

from autograder.cases import between, normal
from autograder.checks.lora.lora_linear import LoRALinear
from autograder.exercise import Exercise


@torch.no_grad()
def merge(layer: LoRALinear) -> None:
    """Add the update to the base's weight, in place, unless that has been done."""
    if not layer.merged:
        layer.base.weight += layer.scaling * (layer.lora_B @ layer.lora_A)
        layer.merged = True


@torch.no_grad()
def unmerge(layer: LoRALinear) -> None:
    """Take the update out of the base's weight again, in place, if it is there."""
    if layer.merged:
        layer.base.weight -= layer.scaling * (layer.lora_B @ layer.lora_A)
        layer.merged = False


def merge_case(generator: torch.Generator, dtype: torch.dtype = torch.float32) -> dict:
    """Return a weight and its update, of unequal sizes and about the same magnitude."""
    out_features, rank = between(generator, 9, 12), between(generator, 3, 5)
    in_features = out_features + between(generator, 3, 6)
    return {
        "weight": normal(generator, out_features, in_features, dtype=dtype),
        "lora_A": normal(generator, rank, in_features, dtype=dtype),
        "lora_B": normal(generator, out_features, rank, dtype=dtype),
        "scaling": 1.0 + between(generator, 3, 9) / 4,
    }


def drive_merge(merge, unmerge, weight, lora_A, lora_B, scaling):
    """Merge twice and unmerge twice; return the weight after each call, as someone who shares it sees it."""
    from torch import nn

    layer = nn.Module()
    layer.base = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype).requires_grad_(False)
    layer.base.weight.copy_(weight)
    layer.lora_A, layer.lora_B = nn.Parameter(lora_A.clone()), nn.Parameter(lora_B.clone())
    layer.scaling, layer.merged = scaling, False
    shared = layer.base.weight.detach()
    seen = {}
    for moment, call in (
        ("after merge", merge),
        ("after a second merge", merge),
        ("after unmerge", unmerge),
        ("after a second unmerge", unmerge),
        ("after merging again", merge),
    ):
        call(layer)
        seen[f"the weight {moment}"] = layer.base.weight.detach().clone()
        seen[f"`merged` {moment}"] = bool(layer.merged)
        seen[f"the weight tensor that the layer was given, {moment},"] = shared.clone()
    seen["the base's weight requires a gradient"] = layer.base.weight.requires_grad
    return seen | {"lora_A afterwards": layer.lora_A.detach(), "lora_B afterwards": layer.lora_B.detach()}


def merge_tolerance(case: dict) -> dict[str, float]:
    """Bound the rounding: each entry of s B A sums `rank` products, and every call adds it to the weight once.

    rank + 2 roundings make the update, one the sum; the errors of the three calls that change the weight add up.
    """
    rank = case["lora_A"].shape[0]
    update = case["scaling"] * (case["lora_B"].double().abs() @ case["lora_A"].double().abs())
    size = (case["weight"].double().abs() + update).max().item()
    bound = 3 * (rank + 3) * torch.finfo(case["weight"].dtype).eps * size
    moments = ("after merge", "after a second merge", "after unmerge", "after a second unmerge", "after merging again")
    return {
        name: bound
        for moment in moments
        for name in (f"the weight {moment}", f"the weight tensor that the layer was given, {moment},")
    }


_ADD = "layer.base.weight += layer.scaling * (layer.lora_B @ layer.lora_A)"
_SUBTRACT = "layer.base.weight -= layer.scaling * (layer.lora_B @ layer.lora_A)"

check_merge = Exercise(
    spec=[merge, unmerge],
    cases=lambda generator: [merge_case(generator), merge_case(generator)],
    driver=drive_merge,
    tolerance=merge_tolerance,
    mistakes={
        "the update is not scaled: what is merged is scaling * B A, as in forward": {
            _ADD: _ADD.replace("layer.scaling * ", ""),
            _SUBTRACT: _SUBTRACT.replace("layer.scaling * ", ""),
        },
        "merge scales the update and unmerge does not: both must use scaling * B A": {
            _SUBTRACT: _SUBTRACT.replace("layer.scaling * ", ""),
        },
        "the product is A B: the update is lora_B @ lora_A, (out, rank) by (rank, in)": {
            _ADD: _ADD.replace("layer.lora_B @ layer.lora_A", "layer.lora_A @ layer.lora_B"),
            _SUBTRACT: _SUBTRACT.replace("layer.lora_B @ layer.lora_A", "layer.lora_A @ layer.lora_B"),
        },
        "the update is transposed: nn.Linear keeps (out_features, in_features), just as B A": {
            _ADD: _ADD.replace("(layer.lora_B @ layer.lora_A)", "(layer.lora_B @ layer.lora_A).T"),
            _SUBTRACT: _SUBTRACT.replace("(layer.lora_B @ layer.lora_A)", "(layer.lora_B @ layer.lora_A).T"),
        },
        "merge subtracts and unmerge adds: it is the other way round": {
            _ADD: _ADD.replace("+=", "-="),
            _SUBTRACT: _SUBTRACT.replace("-=", "+="),
        },
        "merging twice adds the update twice: do nothing if `layer.merged` is already True": {
            "if not layer.merged:": "if True:",
        },
        "unmerging twice subtracts the update twice: do nothing if `layer.merged` is False": {
            "    if layer.merged:": "    if True:",
        },
        "`layer.merged` is never set: forward would add the update a second time": {
            _ADD + "\n        layer.merged = True": _ADD,
            _SUBTRACT + "\n        layer.merged = False": _SUBTRACT,
        },
        "`layer.merged` stays True after unmerge: forward would leave the update out": {
            _SUBTRACT + "\n        layer.merged = False": _SUBTRACT,
        },
        "the weight is replaced by the update: it is added to the weight": {
            _ADD: "layer.base.weight.copy_(layer.scaling * (layer.lora_B @ layer.lora_A))",
        },
        "the layer got a new weight tensor: change the weight in place, for others may share it": {
            _ADD: "layer.base.weight = nn.Parameter(layer.base.weight + layer.scaling * (layer.lora_B @ layer.lora_A), False)",
            _SUBTRACT: (
                "layer.base.weight = nn.Parameter(layer.base.weight - layer.scaling * (layer.lora_B @ layer.lora_A), False)"
            ),
        },
        "the base's weight became trainable: merge without gradients, under `torch.no_grad()`": {
            _ADD: _ADD + "\n        layer.base.weight.requires_grad_(True)",
        },
        "the factors were reset by merging: unmerge needs them": {
            _ADD: _ADD + "\n        layer.lora_B.zero_()",
        },
    },
    variants={
        "einsum": {
            _ADD: 'layer.base.weight.add_(torch.einsum("or,ri->oi", layer.lora_B, layer.lora_A), alpha=layer.scaling)',
        },
        "through .data": """
            def merge(layer):
                if layer.merged:
                    return
                layer.base.weight.data.addmm_(layer.lora_B.data, layer.lora_A.data, alpha=layer.scaling)
                layer.merged = True

            def unmerge(layer):
                if not layer.merged:
                    return
                layer.base.weight.data.addmm_(layer.lora_B.data, layer.lora_A.data, alpha=-layer.scaling)
                layer.merged = False
        """,
        "one helper, in fp64": """
            @torch.no_grad()
            def add_update(layer, sign):
                update = layer.lora_B.double() @ layer.lora_A.double()
                layer.base.weight.copy_(layer.base.weight.double() + sign * layer.scaling * update)
                layer.merged = sign > 0

            def merge(layer):
                if layer.merged is False:
                    add_update(layer, +1)

            def unmerge(layer):
                if layer.merged is True:
                    add_update(layer, -1)
        """,
        "a loop over the rank": {
            _ADD: (
                "for r in range(layer.lora_A.shape[0]):\n"
                "            layer.base.weight += layer.scaling * torch.outer(layer.lora_B[:, r], layer.lora_A[r])"
            ),
        },
    },
)
