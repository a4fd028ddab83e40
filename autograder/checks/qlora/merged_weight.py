"""`merged_weight`: base and update as one weight."""

import torch
from torch import Tensor, nn

from autograder.cases import between
from autograder.exercise import Exercise


@torch.no_grad()
def merged_weight(layer: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return W + scaling B A, computed in fp32 and rounded once, at the end."""
    update = torch.einsum("or,ri->oi", layer.lora_B.float(), layer.lora_A.float())
    return (layer.base.dequantized().float() + layer.scaling * update).to(dtype)


def merged_case(
    generator: torch.Generator, dtype: str = "float32", base: torch.dtype = torch.float32, factors: str = "float32"
) -> dict:
    """Return numbers of few digits, so that every sum is exact in fp32 and rounding to 16 bits, at the end, has one outcome.

    The factors are multiples of 2^-6 below 1, which bf16 holds, their products of 2^-12, scaled of 2^-15, and the sum is below 16: 19 bits.
    An fp32 base has multiples of 2^-12, so it cannot be rounded to 16 bits unnoticed.
    """
    out_features, rank = between(generator, 9, 12), between(generator, 3, 5)
    in_features = out_features + between(generator, 3, 6)

    def digits(*shape: int, steps: int = 64) -> Tensor:
        return torch.randint(1 - steps, steps, shape, generator=generator) / steps

    return {
        "weight": digits(out_features, in_features, steps=4096 if base == torch.float32 else 64).to(base),
        "lora_A": digits(rank, in_features).to(getattr(torch, factors)),
        "lora_B": digits(out_features, rank).to(getattr(torch, factors)),
        "scaling": between(generator, 5, 11) / 4 + 1 / 8,
        "dtype": dtype,
    }


def drive_merged_weight(merged_weight, weight, lora_A, lora_B, scaling, dtype):
    """Merge a layer whose base dequantizes to `weight`; see that it is left as it was."""
    import torch
    from torch import nn

    class Base(nn.Module):
        def __init__(self):
            super().__init__()
            self.shape, self.asked = tuple(weight.shape), 0

        def dequantized(self):
            self.asked += 1
            return weight

    layer = nn.Module()
    layer.base, layer.scaling = Base(), scaling
    layer.lora_A, layer.lora_B = nn.Parameter(lora_A), nn.Parameter(lora_B)
    target = () if dtype == "float32" else (getattr(torch, dtype),)
    given = weight.clone()
    merged = merged_weight(layer, *target)
    if not torch.is_tensor(merged):
        return {"what merged_weight returns": repr(merged)}
    return {
        "what merged_weight returns": "a tensor",
        "the merged weight": merged.detach(),
        "the merged weight requires a gradient": merged.requires_grad,
        "what dequantized() had returned is changed": not torch.equal(given, weight),
        "lora_A afterwards": layer.lora_A.detach(),
        "lora_B afterwards": layer.lora_B.detach(),
    }


_MERGED_UPDATE = 'torch.einsum("or,ri->oi", layer.lora_B.float(), layer.lora_A.float())'
_MERGED = "(layer.base.dequantized().float() + layer.scaling * update).to(dtype)"

check_merged_weight = Exercise(
    spec=[merged_weight],
    cases=lambda generator: [
        merged_case(generator),
        merged_case(generator, "bfloat16", torch.bfloat16),
        merged_case(generator, "bfloat16", factors="bfloat16"),
    ],
    driver=drive_merged_weight,
    # All sums are exact in fp32: see `merged_case`.
    mistakes={
        "the update is not scaled: what is merged is scaling * B A": {"layer.scaling * update": "update"},
        "the update was subtracted: merging adds it": {"+ layer.scaling * update": "- layer.scaling * update"},
        "the base is missing: this is the update alone": {_MERGED: "(layer.scaling * update).to(dtype)"},
        "the update is missing: this is the base alone": {_MERGED: "layer.base.dequantized().clone().to(dtype)"},
        "it was computed in the target dtype: add in fp32, and round once, at the end": {
            _MERGED: "layer.base.dequantized().to(dtype) + (layer.scaling * update).to(dtype)",
        },
        "the factors were rounded to the base's dtype before they were multiplied: go to fp32 first": {
            _MERGED_UPDATE: "(layer.lora_B.to(torch.bfloat16) @ layer.lora_A.to(torch.bfloat16)).float()",
        },
        "the factors were multiplied in the target dtype: go to fp32 first, and round once, at the end": {
            _MERGED_UPDATE: "layer.lora_B.to(dtype) @ layer.lora_A.to(dtype)",
        },
        "the factors were multiplied in their own dtype: go to fp32 first": {
            _MERGED_UPDATE: "layer.lora_B @ layer.lora_A",
        },
        "the base was rounded to the target dtype before the sum: add in fp32, and round once, at the end": {
            _MERGED: "(layer.base.dequantized().to(dtype).float() + layer.scaling * update).to(dtype)",
        },
        "the layer is run on an identity matrix: that costs a product and adds the bias; use `dequantized()` and the factors": {
            _MERGED: "layer(torch.eye(layer.base.shape[1])).T.to(dtype)",
        },
        "the result is transposed: nn.Linear keeps (out_features, in_features)": {_MERGED: _MERGED + ".T"},
        "the dtype asked for is ignored": {".to(dtype)": ""},
        "the scale was applied to both factors": {
            _MERGED_UPDATE: "(layer.scaling * layer.lora_B.float()) @ layer.lora_A.float()",
        },
        "the weight that dequantized() returned was changed in place: make a new one": {
            _MERGED: (
                "layer.base.dequantized().add_(layer.scaling * update).to(dtype)"
                " if layer.base.dequantized().dtype == torch.float32 else " + _MERGED
            ),
        },
        "the merged weight carries gradients of the factors: wrap it in torch.no_grad()": {
            "@torch.no_grad()\n": "",
        },
    },
    variants={
        "a matrix product": {_MERGED_UPDATE: "layer.lora_B.float() @ layer.lora_A.float()"},
        "addmm": {
            _MERGED: (
                "torch.addmm(layer.base.dequantized().float(), layer.lora_B.float(), layer.lora_A.float(), alpha=layer.scaling).to(dtype)"
            ),
        },
        "in double precision": {
            _MERGED: "(layer.base.dequantized().double() + layer.scaling * update.double()).to(torch.float32).to(dtype)",
        },
        "detached": """
            def merged_weight(layer, dtype=torch.float32):
                merged = layer.base.dequantized().detach().to(torch.float32, copy=True)
                merged += layer.scaling * (layer.lora_B.detach().float() @ layer.lora_A.detach().float())
                return merged.to(dtype)
        """,
    },
)
