"""`DoRALinear.merge`: what the layer computes, in the base's weight."""

from autograder.checking.exercise import Exercise
from autograder.checks.lora_in_practice.dora_linear import (
    ADAPTED,
    COPY,
    MOVED,
    NO_ZERO,
    DoRALinear,
    dora_case,
    read_finite,
    relative_error,
    sizes,
    sum_error,
)


def drive_dora_merge(DoRALinear, weight, bias, lora_A, lora_B, magnitude, alpha, x):
    """Merge a layer with these numbers, twice; return what the layer and others who share its weight see."""
    import torch
    from torch import nn

    base = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=weight.dtype)
    base.load_state_dict({"weight": weight} if bias is None else {"weight": weight, "bias": bias})
    layer = DoRALinear(base, rank=lora_A.shape[0], alpha=alpha)
    parts, values = [layer.lora_A, layer.lora_B, layer.magnitude], [lora_A, lora_B, magnitude]
    seen = {"the list of shapes of lora_A, lora_B and magnitude": [list(part.shape) for part in parts]}
    if seen["the list of shapes of lora_A, lora_B and magnitude"] != [list(value.shape) for value in values]:
        return seen
    with torch.no_grad():
        for part, value in zip(parts, values, strict=True):
            part.copy_(value)
    parameter, shared = layer.base.weight, layer.base.weight.detach()
    layer.merge()
    once = layer.base.weight.detach().clone()
    seen |= {
        "the base's weight after merge": once,
        "`merged` after merge": bool(layer.merged),
        "the output after merge": layer(x).detach().clone(),
        "the base's weight is the same parameter as before": layer.base.weight is parameter,
        "the memory of the weight, which others may share,": shared.clone(),
        "the base's weight requires a gradient": layer.base.weight.requires_grad,
        "lora_A afterwards": layer.lora_A.detach().clone(),
        "lora_B afterwards": layer.lora_B.detach().clone(),
        "magnitude afterwards": layer.magnitude.detach().clone(),
        "the bias afterwards": None if bias is None else layer.base.bias.detach().clone(),
    }
    layer.merge()
    return seen | {
        "a second merge leaves the weight as it is": torch.equal(once, layer.base.weight.detach()),
        "`merged` after a second merge": bool(layer.merged),
    }


def dora_merge_tolerance(case: dict) -> dict[str, float]:
    """Bound the rounding of two right answers' merged weights, and of the output that they give."""
    size, error = sizes(case), relative_error(case)
    merged = size["rescaling"][:, None] * size["moved"]
    over_in = error + sum_error(merged.shape[1], case["weight"].dtype)
    return {
        "the base's weight after merge": error * merged.max().item(),
        "the memory of the weight, which others may share,": error * merged.max().item(),
        "the output after merge": over_in * (size["x"] @ merged.T + size["bias"]).max().item(),
    }


_MERGED = "if not self.merged:\n            " + COPY
_RESCALING = "rescaling = self.magnitude / moved.norm(dim=1).clamp(min=1e-20)"

check_dora_merge = Exercise(
    spec=[DoRALinear],
    cases=lambda generator: [dora_case(generator), dora_case(generator, bias=True, zero_row=True)],
    driver=drive_dora_merge,
    reading=read_finite,
    tolerance=dora_merge_tolerance,
    mistakes={
        "only the update is merged, as in LoRA: every row is multiplied by magnitude / norm as well": {
            COPY: f"self.base.weight.copy_({MOVED})"
        },
        "only W is rescaled: the update s B A belongs into the weight as well": {
            COPY: f"moved = {MOVED}; {_RESCALING}; self.base.weight *= rescaling[:, None]"
        },
        "the rows are multiplied by the magnitude, but not divided by the norm": {
            COPY: f"self.base.weight.copy_(self.magnitude[:, None] * ({MOVED}))"
        },
        "the rows are divided by the norm, but not multiplied by the magnitude": {
            COPY: f"self.base.weight.copy_(nn.functional.normalize({MOVED}, dim=1))"
        },
        "the norm is taken after W has changed, so the update counts twice in it: take it before you add the update": {
            COPY: (f"self.base.weight.copy_({MOVED}); moved = {MOVED}; {_RESCALING}; self.base.weight *= rescaling[:, None]")
        },
        "the norm is that of the old weight: take that of W + s B A": {
            COPY: (f"moved = self.base.weight; {_RESCALING}; self.base.weight.copy_(rescaling[:, None] * ({MOVED}))")
        },
        "the norm is that of the whole matrix: take one of each row": {
            COPY: (f"moved = {MOVED}; self.base.weight.copy_((self.magnitude / moved.norm())[:, None] * moved)")
        },
        "the update is merged without its scale: add scaling * B A": {
            COPY: (
                "moved = self.base.weight + self.lora_B @ self.lora_A; "
                f"{_RESCALING}; self.base.weight.copy_(rescaling[:, None] * moved)"
            )
        },
        "the update is added after the rescaling, so that it is not rescaled: W + s B A is multiplied by magnitude / norm": {
            COPY: (
                f"moved = {MOVED}; {_RESCALING}; "
                "self.base.weight.copy_(rescaling[:, None] * self.base.weight + (moved - self.base.weight))"
            )
        },
        "magnitude / norm is multiplied onto the columns: make a column of it, `[:, None]`, so that each row has its factor": {
            COPY: f"moved = {MOVED}; {_RESCALING}; self.base.weight.copy_(rescaling * moved)"
        },
        "the layer got a new weight: write into the one that it has, because others may share it": {
            COPY: "self.base.weight = nn.Parameter(self.adapted_weight(), requires_grad=False)"
        },
        "the weight got new memory through `.data`: write into its own, with `copy_`, `+=` or `*=`": {
            COPY: "self.base.weight.data = self.adapted_weight()"
        },
        "the base's weight is trained afterwards: merge under `torch.no_grad()`": {
            COPY: COPY + "; self.base.weight.requires_grad_(True)"
        },
        "`merged` is never set: forward would apply the update again": {
            COPY + "\n            self.merged = True": COPY,
        },
        "a second merge changes the weight again: do nothing if `merged` is True": {_MERGED: "if True:\n            " + COPY},
        "the weight has not changed: write what the layer computes into `base.weight`": {COPY: "pass"},
        "the bias is rescaled: the magnitude belongs to the weight alone": {
            COPY: (
                f"moved = {MOVED}; {_RESCALING}; {COPY}\n"
                "            if self.base.bias is not None:\n"
                "                self.base.bias *= rescaling"
            )
        },
        "the factors are reset by merging: leave them as they are": {COPY: COPY + "; self.lora_B.zero_()"},
        "the magnitude is reset by merging: leave it as it is": {COPY: COPY + "; self.magnitude.fill_(1)"},
        "a row of zeros has become NaN, because its norm is 0: do not divide by 0": {NO_ZERO: "norm"},
        "forward applies the update to the merged weight again: while `merged` is True, return the base's output alone": {
            "        if self.merged:": "        if False:"
        },
    },
    variants={
        "in two steps": {
            COPY: (
                f"norm = ({MOVED}).norm(dim=1).clamp(min=torch.finfo(self.base.weight.dtype).tiny)\n"
                "            self.base.weight += self.scaling * self.lora_B @ self.lora_A\n"
                "            self.base.weight *= (self.magnitude / norm)[:, None]"
            )
        },
        "through .data, in double precision": {
            COPY: (
                "moved = self.base.weight.double() + self.scaling * self.lora_B.double() @ self.lora_A.double()\n"
                "            rows = moved / moved.norm(dim=1, keepdim=True).clamp(min=1e-12)\n"
                "            self.base.weight.data[:] = self.magnitude.double()[:, None] * rows"
            )
        },
        "a loop over the rows": {
            COPY: (
                "update = self.scaling * self.lora_B @ self.lora_A\n"
                "            for o in range(self.base.out_features):\n"
                "                row = self.base.weight[o] + update[o]\n"
                "                self.base.weight[o] = self.magnitude[o] * row / row.norm() if row.any() else 0"
            )
        },
        "something small added to the norm": {ADAPTED: "return (self.magnitude / (norm + 1e-6))[:, None] * moved"},
        "an early return": {
            _MERGED: "if self.merged:\n            return\n        if True:\n            " + COPY,
        },
    },
)
