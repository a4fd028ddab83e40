"""Bug hunt: folding the value bias."""

import torch

from autograder.cases import between, normal
from autograder.drive import Observation
from autograder.exercise import Exercise
from autograder.helpers import fill
from peftlab.llama import LlamaAttention


@torch.no_grad()
def fold_value_bias(attention: LlamaAttention) -> None:
    """Add what the values' bias gives at the output to the output's bias, head by head, and set the values' bias to zero."""
    head_dim = attention.head_dim
    heads = attention.q_proj.out_features // head_dim
    group = attention.q_proj.out_features // attention.v_proj.out_features
    for head in range(heads):
        shared = head // group
        features = slice(head * head_dim, (head + 1) * head_dim)
        from_values = attention.v_proj.bias[shared * head_dim : (shared + 1) * head_dim]
        attention.o_proj.bias += attention.o_proj.weight[:, features] @ from_values
    attention.v_proj.bias.zero_()


def fold_case(generator: torch.Generator, heads: int, kv_heads: int, head_dim: int = 4, dtype: str = "float32") -> dict:
    """Return weights and an input for an attention with this many heads.

    In half precision the weights are whole numbers between -2 and 2, so that the new bias, at most 2 + 24 * 2 * 2 = 98, is exact in
    any order of summation: bf16 has all whole numbers up to 256.
    """
    hidden = heads * head_dim
    count = 2 * hidden * hidden + 2 * hidden + 2 * kv_heads * head_dim * (hidden + 1)
    whole = torch.randint(-2, 3, (count,), generator=generator).float()
    return {
        "sizes": [30, hidden, 20, 1, heads, kv_heads],
        "weights": whole if dtype != "float32" else normal(generator, count),
        "x": normal(generator, 2, between(generator, 5, 7), hidden),
        "dtype": dtype,
    }


def drive_fold(fold_value_bias, sizes, weights, x, dtype):
    """Fold the value bias of an attention with biases; return its output and its parameters, before and after."""
    import torch
    from torch import nn

    from peftlab.llama import LlamaAttention, LlamaConfig, rotary_angles

    attention = LlamaAttention(LlamaConfig(*sizes))
    for projection in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj):
        projection.bias = nn.Parameter(torch.zeros(projection.out_features))
    fill(attention, weights)
    attention.to(getattr(torch, dtype)).requires_grad_(False)
    attention.o_proj.bias.requires_grad_(True)
    x = x.to(getattr(torch, dtype))
    cos, sin = (angles.to(x.dtype) for angles in rotary_angles(torch.arange(x.shape[1]), attention.head_dim, 1e4))
    held = dict(attention.named_parameters())
    before = {name: parameter.detach().clone() for name, parameter in held.items()}
    output_before = attention(x, cos, sin, None).detach()
    fold_value_bias(attention)
    now = dict(attention.named_parameters())
    after = {name: parameter.detach().clone() for name, parameter in now.items()}
    once = attention(x, cos, sin, None).detach()
    fold_value_bias(attention)  # there is nothing left to fold
    return {
        "before": output_before,
        "output": once,
        "parameters": sorted(after),
        "v": after.get("v_proj.bias"),
        "o": after.get("o_proj.bias"),
        "others": [n for n in before if n not in ("v_proj.bias", "o_proj.bias") and not torch.equal(before[n], after[n])],
        "same objects": all(now.get(name) is parameter for name, parameter in held.items()),
        "trainable": sorted(name for name, p in attention.named_parameters() if p.requires_grad),
        "again": attention.o_proj.bias.detach().clone(),
    }


def read_fold(observation: Observation, case: dict) -> Observation:
    """Name what came back as in a sentence, and leave out what only the driver needs."""
    return {
        "the list of parameters": observation["parameters"],
        "o_proj.bias after folding": observation["o"],
        "v_proj.bias after folding": observation["v"],
        "the output after folding": observation["output"],
        "the list of other parameters that have changed": observation["others"],
        "the parameters are the same objects still": observation["same objects"],
        "the list of trainable parameters": observation["trainable"],
        "o_proj.bias after folding twice": observation["again"],
    }


def fold_tolerance(case: dict) -> dict[str, float]:
    """Bound the rounding of two right answers.

    Each entry of the new bias sums hidden_size products and the old bias: at most (hidden_size + 2) * eps * (sum of |terms|). The
    output is computed by the same operations from then on, and takes that difference over, and a rounding of its own. In half
    precision the bias is exact (see `fold_case`).
    """
    heads, hidden = case["sizes"][4], case["sizes"][1]
    largest = case["weights"].abs().max().item()
    exact = case["dtype"] != "float32"
    bias = 0.0 if exact else (hidden + 2) * torch.finfo(torch.float32).eps * (hidden * largest**2 + largest)
    values = case["x"].abs().max().item() * hidden * largest + largest
    output = 0.0 if exact else bias + heads * torch.finfo(torch.float32).eps * hidden * values * largest
    return {"o_proj.bias after folding": bias, "o_proj.bias after folding twice": bias, "the output after folding": output}


_ADD_BIAS = "attention.o_proj.bias += attention.o_proj.weight[:, features] @ from_values"
_CLEAR = "attention.v_proj.bias.zero_()"
_EACH_HEAD = "for head in range(heads):"

check_fold_value_bias = Exercise(
    spec=[fold_value_bias],
    cases=lambda generator: [fold_case(generator, 6, 2)],
    driver=drive_fold,
    helpers=[fill],
    reading=read_fold,
    tolerance=fold_tolerance,
    mistakes={
        "the heads are in the wrong order: neighbouring query heads share a value head, as in a a a b b b, not a b a b a b": {
            "shared = head // group": "shared = head % (heads // group)",
        },
        "single features are repeated, not whole heads: a head's bias is a block of head_dim numbers": {
            "from_values = attention.v_proj.bias[shared * head_dim : (shared + 1) * head_dim]": (
                "from_values = attention.v_proj.bias.repeat_interleave(group)[features]"
            ),
        },
        "each value head counts only once: every query head of its group passes its bias on": {
            _EACH_HEAD: "for head in range(0, heads, group):",
        },
        "the bias is averaged over the query heads of a group: the heads' contributions add up": {
            _ADD_BIAS: _ADD_BIAS.replace("+= ", "+= 1 / group * "),
        },
        "the value bias is added to the output's bias as it is: it has to go through o_proj's weight": {
            _ADD_BIAS: "attention.o_proj.bias[features] += from_values",
        },
        "the weight is transposed: nn.Linear keeps (out_features, in_features), so it is weight @ bias": {
            _ADD_BIAS: _ADD_BIAS.replace("weight[:, features]", "weight.T[:, features]"),
        },
        "the output's own bias is lost: add to it": {
            _EACH_HEAD: "attention.o_proj.bias.zero_()\n    " + _EACH_HEAD,
        },
        "the value bias is subtracted: it is moved, so the output's bias gains what the values' loses": {
            _ADD_BIAS: _ADD_BIAS.replace("+=", "-="),
        },
        "the value bias is there still, so that it counts twice: set it to zero": {_CLEAR: "pass"},
        "nothing has changed: both biases are to be changed in place": {_ADD_BIAS: "pass", _CLEAR: "pass"},
        "the value bias was set to zero before it was used: fold it first": {
            _EACH_HEAD: "attention.v_proj.bias.zero_()\n    " + _EACH_HEAD,
        },
        "the value bias is gone altogether: set its numbers to zero, the parameter stays": {
            _CLEAR: "attention.v_proj.bias = None",
        },
        "the key bias was set to zero as well: with rotary positions it does not cancel": {
            _CLEAR: _CLEAR + "\n    attention.k_proj.bias.zero_()",
        },
        "the biases are new parameters: change the old ones in place, for an optimizer may hold them": {
            _CLEAR: _CLEAR + "\n    attention.o_proj.bias = nn.Parameter(attention.o_proj.bias.clone())",
        },
        "the weight of o_proj has changed: only the two biases do": {
            _CLEAR: _CLEAR + "\n    attention.o_proj.weight += attention.o_proj.bias[:, None] / 100",
        },
        "the output's bias got the value bias through v_proj's weight: it goes through o_proj's": {
            _ADD_BIAS: "attention.o_proj.bias += from_values @ attention.v_proj.weight"
            "[shared * head_dim : (shared + 1) * head_dim]",
        },
    },
    variants={
        "repeat_interleave of whole heads": """
            @torch.no_grad()
            def fold_value_bias(attention):
                groups = attention.o_proj.in_features // attention.v_proj.out_features
                per_head = attention.v_proj.bias.view(-1, attention.head_dim)
                spread = per_head.repeat_interleave(groups, dim=0).flatten()
                attention.o_proj.bias += attention.o_proj.weight @ spread
                attention.v_proj.bias.zero_()
        """,
        "expand, and o_proj itself": """
            def fold_value_bias(attention):
                with torch.no_grad():
                    heads = attention.v_proj.bias.reshape(-1, 1, attention.head_dim)
                    spread = heads.expand(-1, attention.q_proj.out_features // attention.v_proj.out_features, -1)
                    attention.o_proj.bias.copy_(attention.o_proj(spread.reshape(-1)))
                    attention.v_proj.bias.fill_(0)
        """,
        "the weight summed over each group, through .data": """
            def fold_value_bias(attention):
                out, dim = attention.o_proj.out_features, attention.head_dim
                kv_heads = attention.v_proj.out_features // dim
                weight = attention.o_proj.weight.data.view(out, kv_heads, -1, dim).sum(2).reshape(out, -1)
                attention.o_proj.bias.data += weight @ attention.v_proj.bias.data
                attention.v_proj.bias.data = torch.zeros_like(attention.v_proj.bias.data)
        """,
        "in fp64": {
            _ADD_BIAS: (
                "folded = attention.o_proj.weight[:, features].double() @ from_values.double()\n"
                "        attention.o_proj.bias.copy_(attention.o_proj.bias.double() + folded)"
            ),
        },
    },
)
"""Every exercise of the unit, by the name of its check."""
