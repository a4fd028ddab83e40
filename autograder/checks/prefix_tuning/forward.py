"""PrefixAttention: the forward pass."""

import math

import torch

from autograder.checking.cases import between, normal
from autograder.checking.drive import Observation
from autograder.checking.exercise import Exercise
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
from autograder.checks.prefix_tuning.rounding import LOW_PRECISION, cast, mean_error_of, relative_errors, rounding_tolerance


def attention_case(
    generator: torch.Generator,
    dtype: torch.dtype = torch.float32,
    prefix_dtype: torch.dtype | None = None,
    padded: bool = False,
    grouped: bool = True,
    tokens: int | None = None,
) -> dict:
    """Return an attention's weights, a prefix of several layers and a text longer than it; no two sizes are equal."""
    kv_heads, head_dim = 2, 4
    heads = 3 * kv_heads if grouped else kv_heads
    hidden, batch, layers = heads * head_dim, 3, 5
    tokens = tokens or between(generator, 6, 8)
    seq = between(generator, 9, 11)
    mask = None
    if padded:
        padding = torch.tensor([0, between(generator, 1, 2), between(generator, 3, 4)])
        mask = (torch.arange(seq) >= padding[:, None]).long()
    shape = (layers, kv_heads, tokens, head_dim)
    return {
        "weights": normal(generator, 2 * hidden * hidden + 2 * hidden * kv_heads * head_dim) / math.sqrt(hidden),
        "keys": normal(generator, *shape, dtype=prefix_dtype or dtype),
        "values": normal(generator, *shape, dtype=prefix_dtype or dtype),
        "x": normal(generator, batch, seq, hidden, dtype=dtype),
        "output_gradient": normal(generator, batch, seq, hidden, dtype=dtype),
        "attention_mask": mask,
        "heads": heads,
        "layer": between(generator, 1, layers - 2),
    }


def drive_attention(PrefixAttention, weights, keys, values, x, output_gradient, attention_mask, heads, layer):
    """Wrap an attention with these weights; return its output and gradients, and its output once the weights have changed."""
    import torch
    from torch import nn

    from peftlab.llama import LlamaAttention, LlamaConfig, causal_mask, rotary_angles

    _, kv_heads, tokens, _ = keys.shape
    _, seq, hidden = x.shape
    config = LlamaConfig(7, hidden, 9, 1, heads, kv_heads)
    attention = LlamaAttention(config).to(x.dtype).requires_grad_(False)
    nn.utils.vector_to_parameters(weights.to(x.dtype), attention.parameters())
    prefix = make_prefix(keys, values)
    mask, positions = None, torch.arange(tokens, tokens + seq)
    if attention_mask is not None:
        mask, positions = causal_mask(attention_mask), (attention_mask.cumsum(1) - 1).clamp(min=0) + tokens
    cos, sin = (angles.to(x.dtype) for angles in rotary_angles(positions, config.head_dim, config.rope_theta))
    if attention_mask is not None:
        cos, sin = cos[:, None], sin[:, None]
    wrapped = PrefixAttention(attention, prefix, layer)
    x.requires_grad_(True)
    output = wrapped(x, cos, sin, mask)
    if not torch.is_tensor(output):
        return {"what forward returns": repr(output)}
    seen = {"what forward returns": "a tensor", "the output": output.detach().clone()}
    output.backward(output_gradient)
    seen |= {
        "the gradient of the prefix's keys": prefix.keys.grad,
        "the gradient of the prefix's values": prefix.values.grad,
        "the gradient of x": x.grad,
    }
    with torch.no_grad():
        attention.v_proj.weight.neg_()
        seen["the output once the attention's weights have changed"] = wrapped.eval()(x, cos, sin, mask)
    return seen


def read_attention(observation: Observation, case: dict) -> Observation:
    """In 16 bits, compare the tensors with what they are in double precision."""
    return relative_errors(observation, case["exact"]) if case["x"].dtype in LOW_PRECISION else observation


def exact_attention(case: dict) -> dict:
    """Return what the driver sees of a right answer in double precision, for cases in 16 bits."""
    is_needed = case["x"].dtype in LOW_PRECISION
    return {"exact": drive_attention(PrefixAttention, **cast(case, torch.float64))} if is_needed else {}


ATTENTION_FIELDS = (
    "the output",
    "the gradient of the prefix's keys",
    "the gradient of the prefix's values",
    "the gradient of x",
    "the output once the attention's weights have changed",
)


def attention_tolerance(case: dict) -> dict[str, float]:
    """Allow the gradient of the prefix's keys twice the mean error of the others in 16 bits.

    It comes through the softmax, whose backward, P (dP - sum(P dP)), subtracts numbers of about the same size, both rounded. What is
    left is smaller, by half where the two have a correlation of 7/8, and their errors are not. In 400 random cases a softmax
    by hand, in fp32 or in bf16, was off by up to 1.4 times what the others are allowed.
    """
    allowed = rounding_tolerance(case, 4e-6, ATTENTION_FIELDS)
    through_softmax = mean_error_of("the gradient of the prefix's keys")
    if through_softmax in allowed:
        allowed[through_softmax] *= 2
    return allowed


_WHOLE_MASK = f"if mask is None:\n            {CAUSAL}\n        {TO_PREFIX}\n        {CAT_MASK}"
_ROTATE_KEYS = "        keys = rotate(keys, cos, sin)\n"
_ROTATE_QUERIES = "        queries = rotate(queries, cos, sin)\n"

check_prefix_attention = Exercise(
    spec=[PrefixAttention],
    cases=lambda generator: [
        attention_case(generator),
        # In fp64 and fp32, so that no conversion and one to fp32 are told apart.
        attention_case(generator, prefix_dtype=torch.float64, padded=True),
        attention_case(generator, torch.bfloat16, prefix_dtype=torch.float32, padded=True),
    ],
    driver=drive_attention,
    helpers=[make_prefix],
    reading=read_attention,
    exact=exact_attention,
    tolerance=attention_tolerance,
    mistakes={
        "the prefix's keys are rotated: they are learned as they are to be used, and only the text's keys are turned": {
            CAT_KEYS: (
                "prefix_keys = rotate(prefix_keys.expand(batch, -1, -1, -1), cos[..., :tokens, :], sin[..., :tokens, :])\n"
                "        keys = torch.cat([prefix_keys, keys], dim=2)"
            ),
        },
        "the prefix's keys are rotated, by positions 0, 1, 2 and so on: they are learned as they are to be used": {
            CAST: CAST
            + "\n        turns = rotary_angles(torch.arange(prefix_keys.shape[1]), self.attention.head_dim, 10_000.0)"
            + "\n        prefix_keys = rotate(prefix_keys, *(angles.to(x.dtype) for angles in turns))",
        },
        "keys of prefix and text are put together before they are rotated, and there are more of them than angles: rotate first": {
            _ROTATE_KEYS: "",
            CAT_KEYS: CAT_KEYS + "\n        keys = rotate(keys, cos, sin)",
        },
        "the text's keys are not rotated": {_ROTATE_KEYS: ""},
        "the queries are not rotated": {_ROTATE_QUERIES: ""},
        "the values are rotated, too: RoPE turns queries and keys only": {
            _ROTATE_KEYS: _ROTATE_KEYS + "        values = rotate(values, cos, sin)\n",
        },
        "neither queries nor keys are rotated: RoPE is part of the attention that this one replaces": {
            _ROTATE_KEYS: "",
            _ROTATE_QUERIES: "",
        },
        "heads and tokens are mixed up: view the projections' outputs as (batch, seq, heads, head_dim), then transpose": {
            "shape = (batch, seq, -1, self.attention.head_dim)": "shape = (batch, -1, seq, self.attention.head_dim)",
            "queries = self.attention.q_proj(x).view(shape).transpose(1, 2)": "queries = self.attention.q_proj(x).view(shape)",
            "keys = self.attention.k_proj(x).view(shape).transpose(1, 2)": "keys = self.attention.k_proj(x).view(shape)",
            "values = self.attention.v_proj(x).view(shape).transpose(1, 2)": "values = self.attention.v_proj(x).view(shape)",
        },
        "the heads are not side by side again: transpose back before you reshape": {
            "mixed.transpose(1, 2).reshape(batch, seq, -1)": "mixed.reshape(batch, seq, -1)",
        },
        "o_proj is missing: the heads' outputs go through it in the end": {
            "return self.attention.o_proj(mixed.transpose(1, 2).reshape(batch, seq, -1))": (
                "return mixed.transpose(1, 2).reshape(batch, seq, -1)"
            ),
        },
        "the prefix's keys stand behind the text's, but the mask has their columns in front: use the same order in both": {
            CAT_KEYS: "keys = torch.cat([keys, prefix_keys.expand(batch, -1, -1, -1)], dim=2)",
            CAT_VALUES: "values = torch.cat([values, prefix_values.expand(batch, -1, -1, -1)], dim=2)",
        },
        "the mask's columns for the prefix stand behind those for the text: the prefix's keys are in front, so `F.pad(mask, (tokens, 0))`": {
            CAT_MASK: "mask = torch.cat([mask, to_prefix], dim=3)",
        },
        "no query may look at the prefix: its columns of the mask are False (`F.pad` needs `value=True`)": {
            CAT_MASK: "mask = torch.cat([~to_prefix, mask], dim=3)",
        },
        "is_causal with more keys than queries: PyTorch lines that mask up at the top left, so that the first query sees one key": {
            _WHOLE_MASK: (
                "if mask is not None:\n"
                "            mask = torch.cat([mask.new_ones(mask.shape[0], 1, seq, tokens), mask], dim=3)"
            ),
            SDPA: SDPA.replace("attn_mask=mask", "attn_mask=mask, is_causal=mask is None"),
        },
        "the prefix's tokens are counted along the wrong axis: its keys are (kv_heads, tokens, head_dim)": {
            "tokens = prefix_keys.shape[1]": "tokens = prefix_keys.shape[0]",
        },
        "the mask is not extended to the prefix's keys: it needs as many columns as there are keys": {
            TO_PREFIX: "pass",
            CAT_MASK: "pass",
        },
        "without a mask the text is no longer causal: a token sees those that follow it": {
            CAUSAL: CAUSAL.removesuffix(".tril()")
        },
        "a mask that is given is replaced by the causal one: padding is looked at": {"if mask is None:": "if True:"},
        "the values lack the prefix: each of its keys has a value": {CAT_VALUES: "pass"},
        "the prefix has no batch dimension: expand it to the batch before it is put in front": {
            CAT_KEYS: "keys = torch.cat([prefix_keys, keys], dim=2)",
            CAT_VALUES: "values = torch.cat([prefix_values, values], dim=2)",
        },
        "keys and values of the prefix have changed places: `self.prefix(self.layer)` returns keys first": {
            "prefix_keys, prefix_values = self.prefix(self.layer)": "prefix_values, prefix_keys = self.prefix(self.layer)",
        },
        "every layer gets the first layer's prefix: ask for `self.layer`": {"self.prefix(self.layer)": "self.prefix(0)"},
        "the prefix gets no gradient: it is detached, or computed without gradients": {
            CAST: "prefix_keys, prefix_values = prefix_keys.detach().to(x.dtype), prefix_values.detach().to(x.dtype)",
        },
        "the text's keys and values are detached: the base is frozen, but its input has gradients, for the layers below": {
            "self.attention.k_proj(x)": "self.attention.k_proj(x.detach())",
            "self.attention.v_proj(x)": "self.attention.v_proj(x.detach())",
        },
        "the prefix is not in x's dtype: convert it (many keep it in fp32 beside a base in 16 bits)": {CAST: "pass"},
        "the prefix is converted to fp32, whatever x is in: beside a base in 16 bits that fails, so `.to(x.dtype)`": {
            CAST: "prefix_keys, prefix_values = prefix_keys.float(), prefix_values.float()",
        },
        "key-value heads are shared by the wrong queries: heads 0, 1, 2 share the first one, so repeat_interleave, not repeat": {
            SDPA: (
                "group = queries.shape[1] // keys.shape[1]\n"
                "        keys, values = keys.repeat(1, group, 1, 1), values.repeat(1, group, 1, 1)\n"
                "        mixed = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)"
            ),
        },
        "prefix and text have a softmax each, and the two are added: there is one softmax, over all keys": {
            SDPA: (
                "mixed = F.scaled_dot_product_attention(\n"
                "            queries, keys[:, :, tokens:], values[:, :, tokens:], attn_mask=mask[..., tokens:], enable_gqa=True)\n"
                "        mixed = mixed + F.scaled_dot_product_attention(\n"
                "            queries, keys[:, :, :tokens], values[:, :, :tokens], enable_gqa=True)"
            ),
        },
        "the attention is a copy: keep the one that was given, or its weights are in memory twice": {
            "self.attention = attention": "import copy; self.attention = copy.deepcopy(attention)",
        },
    },
    variants={
        "scores and softmax by hand, in fp32": {
            SDPA: (
                "group = queries.shape[1] // keys.shape[1]\n"
                "        keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)\n"
                "        scores = queries @ keys.transpose(2, 3) / self.attention.head_dim**0.5\n"
                "        share = scores.masked_fill(~mask, -torch.inf).softmax(-1, dtype=torch.float32)\n"
                "        mixed = share.to(x.dtype) @ values"
            ),
        },
        "scores and softmax by hand, in x's dtype": {
            SDPA: (
                "group = queries.shape[1] // keys.shape[1]\n"
                "        keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)\n"
                "        scores = queries @ keys.transpose(2, 3) / self.attention.head_dim**0.5\n"
                "        mixed = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ values"
            ),
        },
        "the prefix behind the text, in keys and mask": {
            CAT_KEYS: "keys = torch.cat([keys, prefix_keys.expand(batch, -1, -1, -1)], dim=2)",
            CAT_VALUES: "values = torch.cat([values, prefix_values.expand(batch, -1, -1, -1)], dim=2)",
            CAT_MASK: "mask = torch.cat([mask, to_prefix], dim=3)",
        },
        "a causal mask that begins further right": {
            _WHOLE_MASK: (
                "if mask is None:\n"
                "            mask = torch.ones(seq, tokens + seq, dtype=torch.bool).tril(diagonal=tokens)\n"
                "        else:\n"
                "            mask = F.pad(mask, (tokens, 0), value=True)"
            ),
        },
        "the projections kept, not the attention": """
            class PrefixAttention(nn.Module):
                def __init__(self, attention, prefix, layer):
                    super().__init__()
                    self.projections = nn.ModuleList([attention.q_proj, attention.k_proj, attention.v_proj])
                    self.o_proj, self.head_dim, self.prefix, self.layer = attention.o_proj, attention.head_dim, prefix, layer

                def forward(self, x, cos, sin, mask):
                    batch, seq = x.shape[:2]
                    q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for p in self.projections)
                    parts = []
                    for own, text in zip(self.prefix(self.layer), (rotate(k, cos, sin), v)):
                        parts.append(torch.cat([own.type_as(x).unsqueeze(0).repeat(batch, 1, 1, 1), text], -2))
                    rows = torch.arange(seq)[:, None] >= torch.arange(seq)
                    seen = rows[None, None] if mask is None else mask
                    seen = torch.cat([torch.ones_like(seen[..., :1]).expand(-1, -1, -1, parts[0].shape[2] - seq), seen], -1)
                    out = F.scaled_dot_product_attention(rotate(q, cos, sin), *parts, seen, enable_gqa=True)
                    return self.o_proj(out.permute(0, 2, 1, 3).flatten(2))
        """,
    },
)
