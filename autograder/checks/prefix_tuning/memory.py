"""PrefixAttention: measured memory, with and without gradient checkpointing."""

import math

import torch

from autograder.checking.cases import between, normal, total_bytes
from autograder.checking.drive import Observation
from autograder.checking.exercise import Exercise
from autograder.checks.prefix_tuning.elsewhere import ELSEWHERE, on_meta
from autograder.checks.prefix_tuning.helpers import make_prefix
from autograder.checks.prefix_tuning.prefix_attention import (
    CAST,
    CAT_KEYS,
    CAT_MASK,
    CAT_VALUES,
    CAUSAL,
    SDPA,
    TO_PREFIX,
    PrefixAttention,
)
from autograder.checks.prefix_tuning.rounding import LOW_PRECISION, cast, relative_errors, rounding_tolerance


def memory_case(
    generator: torch.Generator,
    dtype: torch.dtype = torch.float32,
    prefix_dtype: torch.dtype | None = None,
    head_dim: int = 8,
    layers: int = 1,
) -> dict:
    """Return the weights of a base and a prefix, sized so that every copy that need not be kept shows."""
    kv_heads = 2
    heads = 3 * kv_heads
    hidden, tokens = heads * head_dim, between(generator, 6, 8)
    attention = 2 * hidden * hidden + 2 * hidden * kv_heads * head_dim
    count = 7 * hidden + layers * (attention + 3 * hidden * hidden + 2 * hidden) + hidden
    return {
        "weights": normal(generator, count) / math.sqrt(hidden),
        "raw_keys": normal(generator, layers, kv_heads, tokens, head_dim, dtype=prefix_dtype or dtype),
        "raw_values": normal(generator, layers, kv_heads, tokens, head_dim, dtype=prefix_dtype or dtype),
        "x": normal(generator, 3, between(generator, 10, 12), hidden, dtype=dtype),
        "heads": heads,
        "tokens": tokens,
    }


def drive_memory(PrefixAttention, weights, raw_keys, raw_values, x, heads, tokens, large=False):
    """Take a training step with a layer whose prefix is computed, then one with gradient checkpointing, and look elsewhere.

    Of a large batch a sample is returned.
    """
    import torch
    from torch import nn

    from peftlab.llama import LlamaConfig, LlamaModel
    from peftlab.memory import tensors_of_step

    layers, kv_heads, _, head_dim = raw_keys.shape
    base = LlamaModel(LlamaConfig(7, heads * head_dim, heads * head_dim, layers, heads, kv_heads))
    base = base.to(x.dtype).requires_grad_(False)
    nn.utils.vector_to_parameters(weights.to(x.dtype), base.parameters())
    prefix = make_prefix(raw_keys, raw_values, computed=True)
    for number, layer in enumerate(base.layers):
        layer.self_attn = PrefixAttention(layer.self_attn, prefix, number)
    base.train()
    parameters = list(dict.fromkeys([*base.parameters(), *prefix.parameters()]))
    positions = torch.arange(tokens, tokens + x.shape[1])

    def loss():
        return base.run_layers(x, positions=positions).sum()

    if large:
        loss().backward()
        return {"a sample of the outcome": nn.functional.normalize(prefix.keys.grad.flatten(), dim=0)}
    optimizer = torch.optim.AdamW(prefix.parameters(), lr=1e-3)
    seen = tensors_of_step(loss, parameters, optimizer, not_counted=[x])
    seen["kept"] = [tensor.detach() for tensor in [*parameters, *base.buffers()]]
    base.gradient_checkpointing = True
    for name in ("", " with gradient checkpointing"):
        if name:
            base.zero_grad()
            prefix.zero_grad()
            with torch.no_grad():  # where the optimizer's step began
                prefix.keys.copy_(raw_keys)
                prefix.values.copy_(raw_values)
            loss().backward()
        seen[f"the gradient of the prefix's keys{name}"] = prefix.keys.grad
        seen[f"the gradient of the prefix's values{name}"] = prefix.values.grad
    seen["gradients with gradient checkpointing"] = [p.grad for p in parameters if p.grad is not None]
    try:  # "meta" is a device without numbers: mixing it with the CPU is an error, and so is reading a number
        angles = torch.empty(x.shape[1], head_dim, dtype=x.dtype, device="meta")
        base.to("meta").layers[-1].self_attn(x.to("meta"), angles, angles, None)
        seen["elsewhere"] = "it runs"
    except Exception as error:
        seen["elsewhere"] = f"{type(error).__name__}: {error}"
    return seen


_SAVED = "bytes that forward saves for backward (other than x and the weights)"


def read_memory(observation: Observation, case: dict) -> Observation:
    """Count the bytes of the tensors that came back; in 16 bits, compare the gradients with those in double precision."""
    read = {name: value for name, value in observation.items() if name.startswith("the gradient of")}
    if case["x"].dtype in LOW_PRECISION:
        read = relative_errors(read, case["exact"])
    return {
        "gradient bytes": total_bytes(observation["gradients"]),
        "gradient bytes with gradient checkpointing": total_bytes(observation["gradients with gradient checkpointing"]),
        **read,
        "optimizer state bytes": total_bytes(observation["optimizer state"]),
        "bytes of weights and buffers": total_bytes(observation["kept"]),
        _SAVED: total_bytes(observation["saved"]),
        ELSEWHERE: on_meta(observation["elsewhere"]),
    }


def exact_memory(case: dict) -> dict:
    """Return what the driver sees of a right answer in double precision, for cases in 16 bits."""
    if case["x"].dtype not in LOW_PRECISION:
        return {}
    seen = drive_memory(PrefixAttention, **cast(case, torch.float64))
    return {"exact": {name: value for name, value in seen.items() if name.startswith("the gradient of")}}


def memory_tolerance(case: dict) -> dict[str, float]:
    """Allow an answer to keep, in each layer, a mask for every row of the batch instead of one for all."""
    (batch, seq, _), layers = case["x"].shape, len(case["raw_keys"])
    masks = layers * batch * seq * (seq + case["tokens"]) * case["x"].element_size()
    gradients = [f"the gradient of the prefix's {part}" for part in ("keys", "values")]
    gradients += [f"{name} with gradient checkpointing" for name in gradients]
    return rounding_tolerance(case, 6e-7, gradients) | {_SAVED: masks, "bytes of weights and buffers": 64}


_BY_HAND = (
    "group = queries.shape[1] // keys.shape[1]\n"
    "        keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)\n"
)

check_prefix_memory = Exercise(
    spec=[PrefixAttention],
    cases=lambda generator: [
        memory_case(generator),
        memory_case(generator, torch.bfloat16, prefix_dtype=torch.float32),
    ],
    driver=drive_memory,
    helpers=[make_prefix],
    reading=read_memory,
    exact=exact_memory,
    tolerance=memory_tolerance,
    at_most=frozenset({"optimizer state bytes", "bytes of weights and buffers", _SAVED}),
    mistakes={
        "keys and values are repeated for all query heads, and kept so: leave them as they are, with `enable_gqa=True`": {
            SDPA: _BY_HAND + "        mixed = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)",
        },
        "the probabilities of all queries and keys are kept for backward: `scaled_dot_product_attention` computes them again": {
            SDPA: (
                _BY_HAND + "        scores = queries @ keys.transpose(2, 3) / self.attention.head_dim**0.5\n"
                "        mixed = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ values"
            ),
        },
        "the mask is as large as the scores, one for each head: it broadcasts over heads, (batch or 1, 1, seq, keys)": {
            SDPA: "mask = mask.expand(batch, queries.shape[1], -1, -1).contiguous()\n        " + SDPA,
        },
        "the attention runs in fp64, and its tensors are kept so": {
            SDPA: (
                SDPA.replace("queries, keys, values", "queries.double(), keys.double(), values.double()")
                + "\n        mixed = mixed.to(x.dtype)"
            ),
        },
        "queries, keys and values are raised to the prefix's dtype, and kept so: convert the prefix to x's dtype instead": {
            CAST: "",
            SDPA: (
                "queries, keys, values = (part.to(prefix_keys.dtype) for part in (queries, keys, values))\n"
                f"        {SDPA}\n        mixed = mixed.to(x.dtype)"
            ),
        },
        "a mask is kept in every layer, as a buffer: the text's own length is enough, and the mask is needed for a moment only": {
            "self.layer = layer": (
                'self.layer = layer\n        self.register_buffer("causal", torch.ones(128, 128, dtype=torch.bool).tril())'
            ),
            CAUSAL: "mask = self.causal[None, None, :seq, :seq]",
        },
        "the prefix is a copy, so that the one to be trained gets no gradient: keep the one that was given": {
            "self.prefix = prefix": "import copy; self.prefix = copy.deepcopy(prefix)",
        },
        "the attention's weights are trained again: freezing is undone": {
            "self.attention = attention": "self.attention = attention.requires_grad_(True)",
        },
        "the prefix was asked for its keys and values once, when the layer was made: ask in every forward pass": {
            "self.layer = layer": "self.layer = layer\n        self.pair = prefix(layer)",
            "self.prefix(self.layer)": "self.pair",
        },
        "the keys grow from call to call: checkpointing runs a layer again in backward, so forward may change nothing (peft issue 869)": {
            "self.layer = layer": "self.layer = layer\n        self.kept = None",
            CAT_MASK: (
                "if self.kept is not None and torch.is_grad_enabled():\n"
                "            keys, values = torch.cat([self.kept[0], keys], 2), torch.cat([self.kept[1], values], 2)\n"
                "            mask = torch.cat([mask.new_ones(mask.shape[0], 1, seq, keys.shape[2] - seq - tokens), mask], 3)\n"
                "        self.kept = keys.detach(), values.detach()\n        " + CAT_MASK
            ),
        },
        "the mask is made on the CPU, wherever x is: make it with `device=x.device`, or no GPU can run it": {
            CAUSAL: CAUSAL.replace(", device=x.device", ""),
        },
        "a number is read out of a tensor (int, .item, .tolist, if): on a GPU that waits, so compute with tensors": {
            TO_PREFIX: TO_PREFIX + "\n        mask.sum().item()",
        },
        "forward returns nothing: write `return` in front of what `o_proj` gives": {
            "return self.attention.o_proj(mixed": "self.attention.o_proj(mixed",
        },
        "the prefix is left out while the model trains: nothing would ever be learned": {
            "batch, seq, _ = x.shape": (
                "batch, seq, _ = x.shape\n        if self.training:\n            return self.attention(x, cos, sin, mask)"
            ),
        },
    },
    variants={
        "a mask for every row": {CAT_MASK: CAT_MASK + ".repeat(batch, 1, 1, 1)"},
        "with type_as": {
            CAST: "prefix_keys, prefix_values = prefix_keys.type_as(x), prefix_values.type_as(x)",
        },
        "an additive mask": {
            SDPA: "bias = torch.zeros(mask.shape, dtype=x.dtype, device=x.device).masked_fill(~mask, float('-inf'))\n        "
            + SDPA.replace("attn_mask=mask", "attn_mask=bias")
        },
        "the prefix repeated, not expanded": {
            CAT_KEYS: "keys = torch.cat([prefix_keys[None].repeat(batch, 1, 1, 1), keys], dim=-2)",
            CAT_VALUES: "values = torch.cat([torch.stack([prefix_values] * batch), values], dim=-2)",
        },
        "the prefix written into an empty tensor": {
            CAT_KEYS: (
                "both = keys.new_empty(2, batch, keys.shape[1], tokens + seq, keys.shape[3])\n"
                "        both[0, :, :, :tokens], both[0, :, :, tokens:] = prefix_keys, keys\n"
                "        both[1, :, :, :tokens], both[1, :, :, tokens:] = prefix_values, values\n"
                "        keys, values = both"
            ),
            CAT_VALUES: "pass",
        },
    },
)
