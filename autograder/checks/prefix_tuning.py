"""Checks of unit 06_prefix_tuning (Li and Liang 2021, arXiv 2101.00190)."""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autograder.cases import between, normal, total_bytes
from autograder.drive import Observation
from autograder.exercise import Exercise
from peftlab.llama import Llama, LlamaAttention, LlamaModel, rotary_angles, rotate

LOW_PRECISION = (torch.bfloat16, torch.float16)


class Prefix(nn.Module):
    """Trainable keys and values, shaped (layers, kv_heads, tokens, head_dim): the class that the notebook's first cell has."""

    def __init__(self, keys: Tensor, values: Tensor):
        super().__init__()
        self.keys = nn.Parameter(keys)
        self.values = nn.Parameter(values)

    def forward(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return the keys and the values of one layer."""
        return self.keys[layer], self.values[layer]


# ======================================================================================================================
# By how much two right answers may differ
# ======================================================================================================================
def cast(case: dict, dtype: torch.dtype) -> dict:
    """Return the case with copies of its tensors, those of floating point in this dtype."""
    return {
        name: value.to(dtype if value.is_floating_point() else value.dtype, copy=True) if isinstance(value, Tensor) else value
        for name, value in case.items()
    }


def rounding_tolerance(case: dict, spread: float, names: Sequence[str]) -> dict[str, float]:
    """Allow each of the named tensors twenty-five times the largest rounding error of the spec, `spread`.

    A right answer does the same sums in another order, or in a few more steps: its errors are as many and as large as the spec's, and
    have nothing else in common with them. The spec's largest error, in fp32 against double precision, was measured over a
    thousand random cases of each kind, the hidden ones too. No right variant was further from the spec than that. Twenty-five
    times is still about a thousandth of the numbers, or less. Double precision is allowed what single is, for RoPE's angles and a
    norm's mean square are computed in single everywhere.

    In 16 bits, where one rounding is a quarter of a percent, no bound on single numbers tells an error of 1% from rounding; the root
    mean square over all of them does (see `relative_errors`). Two right answers round to storage up to three times more or
    less often on the way; each time adds an error with a root mean square of at most u / sqrt(3), u = eps / 2, and three
    independent ones add sqrt(3) times that, u.
    """
    low = [value.dtype for value in case.values() if isinstance(value, Tensor) and value.dtype in LOW_PRECISION]
    if low:
        return {mean_error_of(name): torch.finfo(low[0]).eps / 2 for name in names}
    return dict.fromkeys(names, 25 * spread)


def relative_errors(observation: Observation, truth: Observation) -> Observation:
    """Replace every tensor by its dtype and by its root mean square error, as a share of the truth's root mean square."""
    read = {}
    for name, value in observation.items():
        exact = truth.get(name)
        if isinstance(value, Tensor) and isinstance(exact, Tensor) and value.shape == exact.shape:
            read[f"the dtype of {name}"] = str(value.dtype)
            read[mean_error_of(name)] = ((value.double() - exact).norm() / exact.norm()).item()
        else:
            read[name] = value
    return read


def mean_error_of(name: str) -> str:
    """Return the name of the field that holds a tensor's error."""
    return f"the relative mean error of {name}"


# ======================================================================================================================
# 1. PrefixAttention: the forward pass
# ======================================================================================================================
class PrefixAttention(nn.Module):
    """Attention that looks at a prefix too (section 4.1): its keys are not rotated, and every query sees all of them."""

    def __init__(self, attention: LlamaAttention, prefix: nn.Module, layer: int):
        super().__init__()
        self.attention = attention
        self.prefix = prefix
        self.layer = layer

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
        """Return what the attention returns, shaped as `x`, when there are more keys and values to look at."""
        batch, seq, _ = x.shape
        shape = (batch, seq, -1, self.attention.head_dim)
        queries = self.attention.q_proj(x).view(shape).transpose(1, 2)
        keys = self.attention.k_proj(x).view(shape).transpose(1, 2)
        values = self.attention.v_proj(x).view(shape).transpose(1, 2)
        queries = rotate(queries, cos, sin)
        keys = rotate(keys, cos, sin)
        prefix_keys, prefix_values = self.prefix(self.layer)
        prefix_keys, prefix_values = prefix_keys.to(x.dtype), prefix_values.to(x.dtype)
        tokens = prefix_keys.shape[1]
        keys = torch.cat([prefix_keys.expand(batch, -1, -1, -1), keys], dim=2)
        values = torch.cat([prefix_values.expand(batch, -1, -1, -1), values], dim=2)
        if mask is None:
            mask = torch.ones(1, 1, seq, seq, dtype=torch.bool, device=x.device).tril()
        to_prefix = mask.new_ones(mask.shape[0], 1, seq, tokens)
        mask = torch.cat([to_prefix, mask], dim=3)
        mixed = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, enable_gqa=True)
        return self.attention.o_proj(mixed.transpose(1, 2).reshape(batch, seq, -1))


def drive_attention(PrefixAttention, weights, keys, values, x, output_gradient, attention_mask, heads, layer):
    """Wrap an attention with these weights; return its output and gradients, and its output once the weights have changed."""
    import torch
    from torch import nn

    from peftlab.llama import LlamaAttention, LlamaConfig, causal_mask, rotary_angles

    class Held(nn.Module):
        def __init__(self):
            super().__init__()
            self.keys, self.values = nn.Parameter(keys), nn.Parameter(values)

        def forward(self, layer):
            return self.keys[layer], self.values[layer]

    _, kv_heads, tokens, _ = keys.shape
    _, seq, hidden = x.shape
    config = LlamaConfig(7, hidden, 9, 1, heads, kv_heads)
    attention = LlamaAttention(config).to(x.dtype).requires_grad_(False)
    nn.utils.vector_to_parameters(weights.to(x.dtype), attention.parameters())
    prefix = Held()
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
    """In 16 bits, hold the tensors against what they are in double precision."""
    if case["x"].dtype not in LOW_PRECISION:
        return observation
    return relative_errors(observation, drive_attention(PrefixAttention, **cast(case, torch.float64)))


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


_PREFIX_PAIR = "prefix_keys, prefix_values = self.prefix(self.layer)"
_CAST = "prefix_keys, prefix_values = prefix_keys.to(x.dtype), prefix_values.to(x.dtype)"
_TOKENS_OF_PREFIX = "tokens = prefix_keys.shape[1]"
_CAT_KEYS = "keys = torch.cat([prefix_keys.expand(batch, -1, -1, -1), keys], dim=2)"
_CAT_VALUES = "values = torch.cat([prefix_values.expand(batch, -1, -1, -1), values], dim=2)"
_CAUSAL = "mask = torch.ones(1, 1, seq, seq, dtype=torch.bool, device=x.device).tril()"
_IF_NO_MASK = f"if mask is None:\n            {_CAUSAL}"
_TO_PREFIX = "to_prefix = mask.new_ones(mask.shape[0], 1, seq, tokens)"
_CAT_MASK = "mask = torch.cat([to_prefix, mask], dim=3)"
_WHOLE_MASK = f"{_IF_NO_MASK}\n        {_TO_PREFIX}\n        {_CAT_MASK}"
_SDPA = "mixed = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, enable_gqa=True)"
_ROTATE_KEYS = "        keys = rotate(keys, cos, sin)\n"
_ROTATE_QUERIES = "        queries = rotate(queries, cos, sin)\n"
_HEADS = "shape = (batch, seq, -1, self.attention.head_dim)"
_MERGE_HEADS = "mixed.transpose(1, 2).reshape(batch, seq, -1)"
_ADDITIVE = "bias = torch.zeros(mask.shape, dtype=x.dtype, device=x.device).masked_fill(~mask, float('-inf'))"

check_prefix_attention = Exercise(
    spec=[PrefixAttention],
    driver=drive_attention,
    reading=read_attention,
    cases=lambda generator: [
        attention_case(generator),
        # In fp64 and fp32, so that no conversion and one to fp32 are told apart.
        attention_case(generator, prefix_dtype=torch.float64, padded=True),
        attention_case(generator, torch.bfloat16, prefix_dtype=torch.float32, padded=True),
    ],
    tolerance=attention_tolerance,
    mistakes={
        "the prefix's keys are rotated: they are learned as they are to be used, and only the text's keys are turned": {
            _CAT_KEYS: (
                "prefix_keys = rotate(prefix_keys.expand(batch, -1, -1, -1), cos[..., :tokens, :], sin[..., :tokens, :])\n"
                "        keys = torch.cat([prefix_keys, keys], dim=2)"
            ),
        },
        "the prefix's keys are rotated, by positions 0, 1, 2 and so on: they are learned as they are to be used": {
            _CAST: _CAST
            + "\n        turns = rotary_angles(torch.arange(prefix_keys.shape[1]), self.attention.head_dim, 10_000.0)"
            + "\n        prefix_keys = rotate(prefix_keys, *(angles.to(x.dtype) for angles in turns))",
        },
        "keys of prefix and text are put together before they are rotated, and there are more of them than angles: rotate first": {
            _ROTATE_KEYS: "",
            _CAT_KEYS: _CAT_KEYS + "\n        keys = rotate(keys, cos, sin)",
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
            _HEADS: "shape = (batch, -1, seq, self.attention.head_dim)",
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
            _CAT_KEYS: "keys = torch.cat([keys, prefix_keys.expand(batch, -1, -1, -1)], dim=2)",
            _CAT_VALUES: "values = torch.cat([values, prefix_values.expand(batch, -1, -1, -1)], dim=2)",
        },
        "the mask's columns for the prefix stand behind those for the text: the prefix's keys are in front, so `F.pad(mask, (tokens, 0))`": {
            _CAT_MASK: "mask = torch.cat([mask, to_prefix], dim=3)",
        },
        "no query may look at the prefix: its columns of the mask are False (`F.pad` needs `value=True`)": {
            _CAT_MASK: "mask = torch.cat([~to_prefix, mask], dim=3)",
        },
        "is_causal with more keys than queries: PyTorch lines that mask up at the top left, so that the first query sees one key": {
            _WHOLE_MASK: (
                "if mask is not None:\n"
                "            mask = torch.cat([mask.new_ones(mask.shape[0], 1, seq, tokens), mask], dim=3)"
            ),
            _SDPA: _SDPA.replace("attn_mask=mask", "attn_mask=mask, is_causal=mask is None"),
        },
        "the mask is not extended to the prefix's keys: it needs as many columns as there are keys": {
            _TO_PREFIX: "pass",
            _CAT_MASK: "pass",
        },
        "without a mask the text is no longer causal: a token sees those that follow it": {
            _CAUSAL: _CAUSAL.removesuffix(".tril()")
        },
        "a mask that is given is replaced by the causal one: padding is looked at": {"if mask is None:": "if True:"},
        "the values lack the prefix: each of its keys has a value": {_CAT_VALUES: "pass"},
        "the prefix has no batch dimension: expand it to the batch before it is put in front": {
            _CAT_KEYS: "keys = torch.cat([prefix_keys, keys], dim=2)",
            _CAT_VALUES: "values = torch.cat([prefix_values, values], dim=2)",
        },
        "keys and values of the prefix have changed places: `self.prefix(self.layer)` returns keys first": {
            _PREFIX_PAIR: "prefix_values, prefix_keys = self.prefix(self.layer)",
        },
        "every layer gets the first layer's prefix: ask for `self.layer`": {"self.prefix(self.layer)": "self.prefix(0)"},
        "the prefix gets no gradient: it is detached, or computed without gradients": {
            _CAST: "prefix_keys, prefix_values = prefix_keys.detach().to(x.dtype), prefix_values.detach().to(x.dtype)",
        },
        "the text's keys and values are detached: the base is frozen, but its input has gradients, for the layers below": {
            "self.attention.k_proj(x)": "self.attention.k_proj(x.detach())",
            "self.attention.v_proj(x)": "self.attention.v_proj(x.detach())",
        },
        "the prefix is not in x's dtype: convert it (many keep it in fp32 beside a base in 16 bits)": {_CAST: "pass"},
        "the prefix is converted to fp32, whatever x is in: beside a base in 16 bits that fails, so `.to(x.dtype)`": {
            _CAST: "prefix_keys, prefix_values = prefix_keys.float(), prefix_values.float()",
        },
        "key-value heads are shared by the wrong queries: heads 0, 1, 2 share the first one, so repeat_interleave, not repeat": {
            _SDPA: (
                "group = queries.shape[1] // keys.shape[1]\n"
                "        keys, values = keys.repeat(1, group, 1, 1), values.repeat(1, group, 1, 1)\n"
                "        mixed = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)"
            ),
        },
        "prefix and text have a softmax each, and the two are added: there is one softmax, over all keys": {
            _SDPA: (
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
            _SDPA: (
                "group = queries.shape[1] // keys.shape[1]\n"
                "        keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)\n"
                "        scores = queries @ keys.transpose(2, 3) / self.attention.head_dim**0.5\n"
                "        share = scores.masked_fill(~mask, -torch.inf).softmax(-1, dtype=torch.float32)\n"
                "        mixed = share.to(x.dtype) @ values"
            ),
        },
        "scores and softmax by hand, in x's dtype": {
            _SDPA: (
                "group = queries.shape[1] // keys.shape[1]\n"
                "        keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)\n"
                "        scores = queries @ keys.transpose(2, 3) / self.attention.head_dim**0.5\n"
                "        mixed = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ values"
            ),
        },
        "the prefix behind the text, in keys and mask": {
            _CAT_KEYS: "keys = torch.cat([keys, prefix_keys.expand(batch, -1, -1, -1)], dim=2)",
            _CAT_VALUES: "values = torch.cat([values, prefix_values.expand(batch, -1, -1, -1)], dim=2)",
            _CAT_MASK: "mask = torch.cat([mask, to_prefix], dim=3)",
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


# ======================================================================================================================
# 2. PrefixAttention: measured memory, with and without gradient checkpointing
# ======================================================================================================================
def drive_memory(PrefixAttention, weights, raw_keys, raw_values, x, heads, tokens):
    """Take a training step with a layer whose prefix is computed, then one with gradient checkpointing, and look elsewhere."""
    import torch
    from torch import nn

    from peftlab.llama import LlamaConfig, LlamaModel
    from peftlab.memory import tensors_of_step

    class Computed(nn.Module):
        def __init__(self):
            super().__init__()
            self.raw_keys, self.raw_values = nn.Parameter(raw_keys.clone()), nn.Parameter(raw_values.clone())

        def forward(self, layer):
            return self.raw_keys[layer].sin(), self.raw_values[layer].sin()

    layers, kv_heads, _, head_dim = raw_keys.shape
    base = LlamaModel(LlamaConfig(7, heads * head_dim, heads * head_dim, layers, heads, kv_heads))
    base = base.to(x.dtype).requires_grad_(False)
    nn.utils.vector_to_parameters(weights.to(x.dtype), base.parameters())
    prefix = Computed()
    for number, layer in enumerate(base.layers):
        layer.self_attn = PrefixAttention(layer.self_attn, prefix, number)
    base.train()
    parameters = list(dict.fromkeys([*base.parameters(), *prefix.parameters()]))
    positions = torch.arange(tokens, tokens + x.shape[1])

    def loss():
        return base.decode(x, positions=positions).sum()

    optimizer = torch.optim.AdamW(prefix.parameters(), lr=1e-3)
    seen = tensors_of_step(loss, parameters, optimizer, not_counted=[x])
    seen["kept"] = [tensor.detach() for tensor in [*parameters, *base.buffers()]]
    base.gradient_checkpointing = True
    for name in ("", " with gradient checkpointing"):
        if name:
            base.zero_grad()
            prefix.zero_grad()
            with torch.no_grad():  # where the optimizer's step began
                prefix.raw_keys.copy_(raw_keys)
                prefix.raw_values.copy_(raw_values)
            loss().backward()
        seen[f"the gradient of the prefix's keys{name}"] = prefix.raw_keys.grad
        seen[f"the gradient of the prefix's values{name}"] = prefix.raw_values.grad
    seen["gradients with gradient checkpointing"] = [p.grad for p in parameters if p.grad is not None]
    try:  # "meta" is a device without numbers: mixing it with the CPU is an error, and so is reading a number
        angles = torch.empty(x.shape[1], head_dim, dtype=x.dtype, device="meta")
        base.to("meta").layers[-1].self_attn(x.to("meta"), angles, angles, None)
        seen["elsewhere"] = "it runs"
    except Exception as error:
        seen["elsewhere"] = f"{type(error).__name__}: {error}"
    return seen


_SAVED = "bytes that forward saves for backward (other than x and the weights)"
_ELSEWHERE = "what happens on another device than the CPU"


def on_meta(happened: str) -> str:
    """Say in words what an error on the meta device means; the words of PyTorch's messages differ from release to release."""
    if any(words in happened for words in ("item()", "Cannot copy out of meta", "to numpy", "nonzero", "local_scalar_dense")):
        return "a number is read out of a tensor"
    return "tensors of two devices meet" if "device" in happened else happened


def read_memory(observation: Observation, case: dict) -> Observation:
    """Count the bytes of the tensors that came back; in 16 bits, hold the gradients against what they are in double precision."""
    read = {name: value for name, value in observation.items() if name.startswith("the gradient of")}
    if case["x"].dtype in LOW_PRECISION:
        read = relative_errors(read, drive_memory(PrefixAttention, **cast(case, torch.float64)))
    return {
        "gradient bytes": total_bytes(observation["gradients"]),
        "gradient bytes with gradient checkpointing": total_bytes(observation["gradients with gradient checkpointing"]),
        **read,
        "optimizer state bytes": total_bytes(observation["optimizer state"]),
        "bytes of weights and buffers": total_bytes(observation["kept"]),
        _SAVED: total_bytes(observation["saved"]),
        _ELSEWHERE: on_meta(observation["elsewhere"]),
    }


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
    driver=drive_memory,
    reading=read_memory,
    cases=lambda generator: [
        memory_case(generator),
        memory_case(generator, torch.bfloat16, prefix_dtype=torch.float32),
    ],
    tolerance=memory_tolerance,
    at_most=frozenset({"optimizer state bytes", "bytes of weights and buffers", _SAVED}),
    mistakes={
        "keys and values are repeated for all query heads, and kept so: leave them as they are, with `enable_gqa=True`": {
            _SDPA: _BY_HAND + "        mixed = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)",
        },
        "the probabilities of all queries and keys are kept for backward: `scaled_dot_product_attention` computes them again": {
            _SDPA: (
                _BY_HAND + "        scores = queries @ keys.transpose(2, 3) / self.attention.head_dim**0.5\n"
                "        mixed = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ values"
            ),
        },
        "the mask is as large as the scores, one for each head: it broadcasts over heads, (batch or 1, 1, seq, keys)": {
            _SDPA: "mask = mask.expand(batch, queries.shape[1], -1, -1).contiguous()\n        " + _SDPA,
        },
        "the attention runs in fp64, and its tensors are kept so": {
            _SDPA: (
                _SDPA.replace("queries, keys, values", "queries.double(), keys.double(), values.double()")
                + "\n        mixed = mixed.to(x.dtype)"
            ),
        },
        "queries, keys and values are raised to the prefix's dtype, and kept so: convert the prefix to x's dtype instead": {
            _CAST: "",
            _SDPA: (
                "queries, keys, values = (part.to(prefix_keys.dtype) for part in (queries, keys, values))\n"
                f"        {_SDPA}\n        mixed = mixed.to(x.dtype)"
            ),
        },
        "a mask is kept in every layer, as a buffer: the text's own length is enough, and the mask is needed for a moment only": {
            "self.layer = layer": (
                'self.layer = layer\n        self.register_buffer("causal", torch.ones(128, 128, dtype=torch.bool).tril())'
            ),
            _CAUSAL: "mask = self.causal[None, None, :seq, :seq]",
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
            _CAT_MASK: (
                "if self.kept is not None and torch.is_grad_enabled():\n"
                "            keys, values = torch.cat([self.kept[0], keys], 2), torch.cat([self.kept[1], values], 2)\n"
                "            mask = torch.cat([mask.new_ones(mask.shape[0], 1, seq, keys.shape[2] - seq - tokens), mask], 3)\n"
                "        self.kept = keys.detach(), values.detach()\n        " + _CAT_MASK
            ),
        },
        "the mask is made on the CPU, wherever x is: make it with `device=x.device`, or no GPU can run it": {
            _CAUSAL: _CAUSAL.replace(", device=x.device", ""),
        },
        "a number is read out of a tensor (int, .item, .tolist, if): on a GPU that waits, so compute with tensors": {
            _TO_PREFIX: _TO_PREFIX + "\n        mask.sum().item()",
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
        "a mask for every row": {_CAT_MASK: _CAT_MASK + ".repeat(batch, 1, 1, 1)"},
        "with type_as": {
            _CAST: "prefix_keys, prefix_values = prefix_keys.type_as(x), prefix_values.type_as(x)",
        },
        "an additive mask": {_SDPA: f"{_ADDITIVE}\n        " + _SDPA.replace("attn_mask=mask", "attn_mask=bias")},
        "the prefix repeated, not expanded": {
            _CAT_KEYS: "keys = torch.cat([prefix_keys[None].repeat(batch, 1, 1, 1), keys], dim=-2)",
            _CAT_VALUES: "values = torch.cat([torch.stack([prefix_values] * batch), values], dim=-2)",
        },
        "the prefix written into an empty tensor": {
            _CAT_KEYS: (
                "both = keys.new_empty(2, batch, keys.shape[1], tokens + seq, keys.shape[3])\n"
                "        both[0, :, :, :tokens], both[0, :, :, tokens:] = prefix_keys, keys\n"
                "        both[1, :, :, :tokens], both[1, :, :, tokens:] = prefix_values, values\n"
                "        keys, values = both"
            ),
            _CAT_VALUES: "pass",
        },
    },
)


# ======================================================================================================================
# 3. PrefixModel: every layer, and where the text's positions start
# ======================================================================================================================
class PrefixModel(nn.Module):
    """A frozen `LlamaModel` whose layers all attend to their part of the prefix; positions of the text start behind it."""

    def __init__(self, base: LlamaModel, prefix: nn.Module, wrap: Callable | None = None):
        super().__init__()
        wrap = wrap or PrefixAttention
        for parameter in base.parameters():
            parameter.requires_grad_(False)
        for number in range(len(base.layers)):
            base.layers[number].self_attn = wrap(base.layers[number].self_attn, prefix, number)
        self.base = base
        self.prefix = prefix

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return the text's hidden states; position `tokens` is the first token that is not padding."""
        keys, _ = self.prefix(0)
        tokens = keys.shape[1]
        counted = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        positions = tokens - 1 + counted.cumsum(dim=1)
        return self.base.decode(self.base.embed_tokens(input_ids), attention_mask, positions)


def drive_model(PrefixModel, weights, keys, values, input_ids, padding, heads):
    """Build the model around an attention of the driver's own; return its states, its gradients, and what it is made of."""
    import torch
    from torch import nn

    from peftlab.llama import LlamaConfig, LlamaModel, rotate
    from peftlab.memory import tensors_of_step

    class Held(nn.Module):
        def __init__(self):
            super().__init__()
            self.keys, self.values = nn.Parameter(keys.clone()), nn.Parameter(values.clone())

        def forward(self, layer):
            return self.keys[layer], self.values[layer]

    made = []

    class Attends(nn.Module):
        def __init__(self, attention, prefix, layer):
            super().__init__()
            self.attention, self.prefix, self.layer = attention, prefix, layer
            made.append(self)

        def forward(self, x, cos, sin, mask):
            q, k, v = (
                projection(x).unflatten(-1, (-1, self.attention.head_dim)).transpose(1, 2)
                for projection in (self.attention.q_proj, self.attention.k_proj, self.attention.v_proj)
            )
            own_keys, own_values = (part.expand(len(x), -1, -1, -1) for part in self.prefix(self.layer))
            k, v = torch.cat([own_keys, rotate(k, cos, sin)], 2), torch.cat([own_values, v], 2)
            k, v = (part.repeat_interleave(q.shape[1] // k.shape[1], 1) for part in (k, v))
            text = mask if mask is not None else x.new_ones(x.shape[1], x.shape[1]).tril().bool()[None, None]
            allowed = torch.cat([text.new_ones(*text.shape[:3], own_keys.shape[2]), text], 3)
            scores = rotate(q, cos, sin) @ k.transpose(2, 3) / q.shape[-1] ** 0.5
            mixed = scores.masked_fill(~allowed, float("-inf")).softmax(-1) @ v
            return self.attention.o_proj(mixed.transpose(1, 2).flatten(2))

    layers, kv_heads, _, head_dim = keys.shape
    base = LlamaModel(LlamaConfig(17, heads * head_dim, 2 * heads * head_dim, layers, heads, kv_heads))
    nn.utils.vector_to_parameters(weights, base.parameters())
    base, prefix = base.to(weights.dtype), Held()
    originals = [layer.self_attn for layer in base.layers]
    model = PrefixModel(base, prefix, Attends)
    parameters = list(model.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    seen = {
        "the layer numbers that the layers' new attentions are made with": [one.layer for one in made],
        "each new attention has its own layer's old one": [one.attention is old for one, old in zip(made, originals)],
        "each new attention stands in its layer": [layer.self_attn is one for layer, one in zip(base.layers, made)],
        "the layers' new attentions have the prefix that was given": all(one.prefix is prefix for one in made),
        "the prefix is kept as `prefix`": getattr(model, "prefix", None) is prefix,
        "the base is kept as `base`": getattr(model, "base", None) is base,
        "the list of shapes of what is trained": sorted(list(parameter.shape) for parameter in trained),
    }
    if sorted(parameter.shape for parameter in trained) != sorted([keys.shape, values.shape]):
        return seen
    states = model(input_ids)
    if not torch.is_tensor(states):
        return seen | {"what forward returns": repr(states)}
    seen |= {
        "what forward returns": "a tensor",
        "the hidden states": states.detach(),
        "a gradient can reach the prefix": states.requires_grad,
    }
    if not states.requires_grad:
        return seen
    step = tensors_of_step(lambda: model(input_ids).sum(), parameters, torch.optim.AdamW(trained, lr=1e-3))
    seen |= {"gradients": step["gradients"], "optimizer state": step["optimizer state"]}
    with torch.no_grad():
        prefix.keys.copy_(keys)
        prefix.values.copy_(-values)
        padded = model.eval()(input_ids, padding)
    seen["the hidden states of a padded batch's text after the prefix has changed"] = (
        padded[padding.bool()] if padded.shape[:2] == padding.shape else padded
    )
    base.decode = lambda x, attention_mask=None, positions=None: x[..., 0] + positions
    try:  # "meta" is a device without numbers: mixing it with the CPU is an error, and so is reading a number
        for mask in (None, padding.to("meta")):
            model.to("meta")(input_ids.to("meta"), mask)
        seen["elsewhere"] = "it runs"
    except Exception as error:
        seen["elsewhere"] = f"{type(error).__name__}: {error}"
    return seen


def read_model(observation: Observation, case: dict) -> Observation:
    """Count the bytes of the tensors that came back."""
    counted = ("gradients", "optimizer state", "elsewhere")
    read = {name: value for name, value in observation.items() if name not in counted}
    if "gradients" in observation:
        read |= {
            "gradient bytes": total_bytes(observation["gradients"]),
            "optimizer state bytes": total_bytes(observation["optimizer state"]),
            _ELSEWHERE: on_meta(observation["elsewhere"]),
        }
    return read


def model_case(
    generator: torch.Generator,
    dtype: torch.dtype = torch.float32,
    tokens: int | None = None,
    layers: int = 2,
    left: bool = True,
) -> dict:
    """Return the weights of a base, a prefix, and texts of which one is padded on the left (unless `left` is False), one on the right."""
    kv_heads, head_dim = 2, 4
    heads = 2 * kv_heads
    hidden, seq = heads * head_dim, between(generator, 9, 11)
    attention = 2 * hidden * hidden + 2 * hidden * kv_heads * head_dim
    count = 17 * hidden + layers * (attention + 3 * hidden * 2 * hidden + 2 * hidden) + hidden
    count_of_padding = torch.tensor([0, between(generator, 2, 3), between(generator, 4, 6)])
    padding = (torch.arange(seq) >= count_of_padding[:, None]).long()
    on_the_right = torch.tensor([False, not left, True])
    padding = torch.where(on_the_right[:, None], padding.flip(1), padding)
    shape = (layers, kv_heads, tokens or between(generator, 5, 8), head_dim)
    return {
        "weights": 0.4 * normal(generator, count, dtype=dtype),
        "keys": normal(generator, *shape, dtype=dtype),
        "values": normal(generator, *shape, dtype=dtype),
        "input_ids": torch.randint(0, 17, (3, seq), generator=generator),
        "padding": padding,
        "heads": heads,
    }


_FREEZE = "for parameter in base.parameters():\n            parameter.requires_grad_(False)"
_WRAP = "base.layers[number].self_attn = wrap(base.layers[number].self_attn, prefix, number)"
_KEEP = "self.base = base\n        self.prefix = prefix"
_COUNTED = "counted = torch.ones_like(input_ids) if attention_mask is None else attention_mask"
_POSITIONS = "positions = tokens - 1 + counted.cumsum(dim=1)"
_DECODE = "return self.base.decode(self.base.embed_tokens(input_ids), attention_mask, positions)"

check_prefix_model = Exercise(
    spec=[PrefixModel],
    driver=drive_model,
    reading=read_model,
    cases=lambda generator: [model_case(generator)],
    tolerance=lambda case: rounding_tolerance(
        case,
        4e-6,
        ["the hidden states", "the hidden states of a padded batch's text after the prefix has changed"],
    ),
    at_most=frozenset({"optimizer state bytes"}),
    mistakes={
        "the text's positions start at 0: they start behind the prefix, at `tokens`, as if it were text": {
            _POSITIONS: "positions = counted.cumsum(dim=1) - 1",
        },
        "the first token of the text has position tokens + 1: a running sum of ones starts at 1": {
            _POSITIONS: "positions = tokens + counted.cumsum(dim=1)",
        },
        "with a mask, the first token has position tokens + 1: `cumsum` of the mask starts at 1, so subtract 1": {
            _POSITIONS: (
                "positions = tokens + (torch.arange(input_ids.shape[1], device=input_ids.device)[None]\n"
                "            if attention_mask is None else attention_mask.cumsum(dim=1))"
            ),
        },
        "the positions are those in the row, less all of its padding: padding on the right moves nothing, so count along the mask": {
            _POSITIONS: (
                "positions = torch.arange(input_ids.shape[1], device=input_ids.device) - (counted == 0).sum(1, keepdim=True) + tokens"
            ),
        },
        "padding on the left is counted as text: the first token behind it has position `tokens`, so count along the mask": {
            _COUNTED: "counted = torch.ones_like(input_ids)",
        },
        "the attention mask is not passed on: tokens look at padding": {
            _DECODE: _DECODE.replace("attention_mask, positions", "None, positions"),
        },
        "the attention mask is extended by the prefix, as for prompt tuning: here the prefix is no part of the sequence": {
            _DECODE: (
                "if attention_mask is not None:\n"
                "            attention_mask = torch.cat([attention_mask.new_ones(len(input_ids), tokens), attention_mask], 1)\n"
                "        " + _DECODE
            ),
        },
        "the first hidden states are cut off, as for prompt tuning: here all of them are the text's": {
            _DECODE: _DECODE + "[:, tokens:]",
        },
        "the number of tokens is read from the wrong axis: a layer's keys are (kv_heads, tokens, head_dim)": {
            "keys.shape[1]": "keys.shape[0]",
        },
        "the number of tokens is read from the last axis, which is head_dim: a layer's keys are (kv_heads, tokens, head_dim)": {
            "keys.shape[1]": "keys.shape[-1]",
        },
        "the positions are made on the CPU, wherever the tokens are: make them with `device=input_ids.device`": {
            _COUNTED: "counted = torch.ones(input_ids.shape, dtype=torch.long) if attention_mask is None else attention_mask",
        },
        "a number is read out of a tensor (int, .item, .tolist, if): on a GPU that waits, so compute with tensors": {
            _POSITIONS: (
                "positions = torch.stack([torch.arange(len(row), device=row.device) - int(row.argmax()) + tokens for row in counted])"
            ),
        },
        "no gradient reaches the prefix: forward runs without gradients, or detaches what it returns": {
            _DECODE: f"with torch.no_grad():\n            {_DECODE}",
        },
        "the base is not frozen: only the prefix is trained": {_FREEZE: "pass"},
        "the prefix is frozen with the base: freeze that before the layers hold the prefix": {
            _KEEP: _KEEP + "\n        base.requires_grad_(False)",
        },
        "every layer is told that it is the first: pass its own number": {_WRAP: _WRAP.replace("number)", "0)")},
        "only the first layer gets a prefix: each layer has its own": {"range(len(base.layers))": "range(1)"},
        "the layers' new attentions are made but not put in place": {
            _WRAP: "wrap(base.layers[number].self_attn, prefix, number)",
        },
        "the prefix is a copy: train the one that was given": {
            "wrap = wrap or PrefixAttention": "import copy; wrap = wrap or PrefixAttention; prefix = copy.deepcopy(prefix)",
        },
        "the prefix is not kept as `prefix`: whoever saves or folds it looks for it there": {
            _KEEP: "self.base, self.added = base, prefix",
            "self.prefix(0)": "self.added(0)",
        },
    },
    variants={
        "positions row by row": {
            _POSITIONS: "positions = torch.stack([(row.cumsum(0) + tokens - 1).clamp(min=tokens) for row in counted.long()])",
        },
        "one row of positions where there is no mask": {
            _POSITIONS: (
                "positions = torch.arange(tokens, tokens + input_ids.shape[1], device=input_ids.device)\n"
                "        if attention_mask is not None:\n"
                "            positions = tokens + (attention_mask.long().cumsum(-1) - 1).clamp(min=0)"
            ),
        },
        "enumerate, and requires_grad_ on the module": {
            _FREEZE: "base.requires_grad_(False)",
            "for number in range(len(base.layers)):": "for number, layer in enumerate(base.layers):",
            _WRAP: "setattr(layer, 'self_attn', wrap(layer.self_attn, prefix, number))",
        },
        "the number of tokens from the values": {
            "keys, _ = self.prefix(0)": "_, keys = self.prefix(len(self.base.layers) - 1)"
        },
    },
)


# ======================================================================================================================
# 4. prefix_from_tokens
# ======================================================================================================================
@torch.no_grad()
def prefix_from_tokens(model: Llama, input_ids: Tensor) -> Prefix:
    """Return the keys, rotated, and the values that real tokens leave in every layer; number by number."""
    base, tokens = model.model, input_ids.shape[1]
    kv_heads, head_dim = model.config.num_key_value_heads, model.config.head_dim
    x = base.embed_tokens(input_ids)
    cos, sin = rotary_angles(torch.arange(tokens, device=x.device), head_dim, model.config.rope_theta)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    all_keys = x.new_empty(len(base.layers), kv_heads, tokens, head_dim)
    all_values = torch.empty_like(all_keys)
    for number, layer in enumerate(base.layers):
        seen = layer.input_layernorm(x)
        keys = layer.self_attn.k_proj(seen)[0].view(tokens, kv_heads, head_dim)
        values = layer.self_attn.v_proj(seen)[0].view(tokens, kv_heads, head_dim)
        for head in range(kv_heads):
            for token in range(tokens):
                key, value = keys[token, head], values[token, head]
                first, second = key.chunk(2)
                key = key * cos[token] + torch.cat([-second, first]) * sin[token]
                all_keys[number, head, token] = key
                all_values[number, head, token] = value
        x = layer(x, cos, sin, None)
    return Prefix(all_keys, all_values)


def drive_from_tokens(prefix_from_tokens, weights, input_ids, kv_heads, layers, elsewhere=False):
    """Take the prefix of some tokens of a tiny LLaMA; return it, and whether the model is as it was."""
    import torch
    from torch import nn

    from peftlab.llama import Llama, LlamaConfig

    head_dim, heads = 4, 3 * kv_heads
    model = Llama(LlamaConfig(17, heads * head_dim, 2 * heads * head_dim, layers, heads, kv_heads, rope_theta=50.0))
    nn.utils.vector_to_parameters(weights[: sum(parameter.numel() for parameter in model.parameters())], model.parameters())
    model = model.to(weights.dtype).train()
    model.model.embed_tokens.weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    prefix = prefix_from_tokens(model, input_ids)
    pair = [getattr(prefix, name, None) for name in ("keys", "values")]
    if not all(torch.is_tensor(part) for part in pair):
        returned = "None" if prefix is None else f"a {type(prefix).__name__}, without keys and values"
        return {"what prefix_from_tokens returns": returned}
    trained = [name for name, parameter in prefix.named_parameters() if parameter.requires_grad]
    seen = {
        "what prefix_from_tokens returns": "a prefix with keys and values",
        "the values": pair[1].detach(),
        "the keys": pair[0].detach(),
        "the list of what is trainable in the prefix": sorted(trained),
        "the model's weights are as they were": all(torch.equal(before[name], now) for name, now in model.state_dict().items()),
        "the list of what is frozen in the model": [name for name, p in model.named_parameters() if not p.requires_grad],
        "the model is in train mode as it was": model.training and all(module.training for module in model.modules()),
        "hooks that are left in the model": sum(
            len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()
        ),
    }
    if elsewhere:  # "meta" has no numbers: mixing it with the CPU is an error
        device = prefix_from_tokens(model.to("meta"), input_ids.to("meta")).keys.device
        seen["the device of the prefix of a model that is not on the CPU"] = device.type
    return seen


def read_from_tokens(observation: Observation, case: dict) -> Observation:
    """In 16 bits, hold the tensors against what they are in double precision."""
    if case["weights"].dtype not in LOW_PRECISION:
        return observation
    return relative_errors(observation, drive_from_tokens(prefix_from_tokens, **cast(case, torch.float64)))


def tokens_case(
    generator: torch.Generator,
    dtype: torch.dtype = torch.float32,
    kv_heads: int = 2,
    layers: int = 2,
    tokens: int | None = None,
) -> dict:
    """Return a tiny LLaMA's weights, more than it has, and some tokens."""
    hidden = 3 * kv_heads * 4
    count = 17 * 2 * hidden + layers * (2 * hidden * hidden + 2 * hidden * kv_heads * 4 + 6 * hidden * hidden + 2 * hidden)
    return {
        "weights": 0.5 * normal(generator, count + hidden, dtype=dtype),
        "input_ids": torch.randint(0, 17, (1, tokens or between(generator, 5, 7)), generator=generator),
        "kv_heads": kv_heads,
        "layers": layers,
    }


_TURN = "key = key * cos[token] + torch.cat([-second, first]) * sin[token]"
_NEXT = "x = layer(x, cos, sin, None)"
_VIEW_KEYS = "k_proj(seen)[0].view(tokens, kv_heads, head_dim)"
_VIEW_VALUES = "v_proj(seen)[0].view(tokens, kv_heads, head_dim)"
_MIXED_UP = "[0].view(kv_heads, tokens, head_dim).transpose(0, 1)"
_RETURN_PREFIX = "return Prefix(all_keys, all_values)"

check_prefix_from_tokens = Exercise(
    spec=[prefix_from_tokens],
    driver=drive_from_tokens,
    reading=read_from_tokens,
    cases=lambda generator: [tokens_case(generator)],
    tolerance=lambda case: rounding_tolerance(case, 2e-5, ["the keys", "the values"]),
    mistakes={
        "the keys are not rotated: those of real tokens are, before any query looks at them": {_TURN: "pass"},
        "the values are rotated as well: RoPE turns queries and keys only": {
            _TURN: _TURN
            + "\n                value = value * cos[token] + torch.cat([-value.chunk(2)[1], value.chunk(2)[0]]) * sin[token]",
        },
        "the tokens' positions start at 1: the first token of a text has position 0": {
            "torch.arange(tokens, device=x.device)": "torch.arange(1, tokens + 1)",
        },
        "RoPE's base is 10,000 whatever the model's is: take it from `model.config.rope_theta`": {
            "model.config.rope_theta": "10_000.0",
        },
        "keys and values are made of the layer's input as it is: it goes through `input_layernorm` first": {
            "seen = layer.input_layernorm(x)": "seen = x",
        },
        "keys and values are made behind the wrong norm: `post_attention_layernorm` is the MLP's": {
            "seen = layer.input_layernorm(x)": "seen = layer.post_attention_layernorm(x)",
        },
        "every layer sees the embeddings: each layer's input is the output of the one below": {_NEXT: "pass"},
        "every layer's keys are made of that layer's output: they are made of its input": {
            "seen = layer.input_layernorm(x)": "x = layer(x, cos, sin, None)\n        seen = layer.input_layernorm(x)",
            _NEXT: "pass",
        },
        "the MLP is left out on the way up: call the whole layer": {
            _NEXT: "x = x + layer.self_attn(layer.input_layernorm(x), cos, sin, None)",
        },
        "the tokens see those that follow them: pass no mask, and the layer is causal": {
            _NEXT: "x = layer(x, cos, sin, torch.ones(1, 1, tokens, tokens, dtype=torch.bool))",
        },
        "keys and values have changed places": {_RETURN_PREFIX: "return Prefix(all_values, all_keys)"},
        "heads and tokens are mixed up: a projection's output is (tokens, kv_heads * head_dim), so view it so, then transpose": {
            _VIEW_KEYS: "k_proj(seen)" + _MIXED_UP,
            _VIEW_VALUES: "v_proj(seen)" + _MIXED_UP,
        },
        "tokens and heads are in the wrong order: the shape is (layers, kv_heads, tokens, head_dim)": {
            _RETURN_PREFIX: "return Prefix(all_keys.transpose(1, 2).contiguous(), all_values.transpose(1, 2).contiguous())",
        },
        "the prefix is frozen: it is there to be trained": {
            _RETURN_PREFIX: "return Prefix(all_keys, all_values).requires_grad_(False)",
        },
        "the model is frozen by it: leave the model as it was": {
            _RETURN_PREFIX: f"model.requires_grad_(False)\n    {_RETURN_PREFIX}",
        },
    },
    variants={
        "with `rotate`, head by head no more": {
            "seen = layer.input_layernorm(x)": """seen = layer.input_layernorm(x)
        parts = [p(seen).view(1, tokens, -1, head_dim).transpose(1, 2) for p in (layer.self_attn.k_proj, layer.self_attn.v_proj)]
        all_keys[number], all_values[number] = rotate(parts[0], cos, sin)[0], parts[1][0]
        x = layer(x, cos, sin, None)
        continue""",
        },
        "hooks on the projections": """
            def prefix_from_tokens(model, input_ids):
                caught = {"k_proj": [], "v_proj": []}
                hooks = [
                    getattr(layer.self_attn, name).register_forward_hook(
                        lambda module, inputs, output, name=name: caught[name].append(output.detach()[0])
                    )
                    for layer in model.model.layers for name in caught
                ]
                with torch.no_grad():
                    model(input_ids)
                for hook in hooks:
                    hook.remove()
                keys, values = (
                    torch.stack(outputs).unflatten(-1, (-1, model.config.head_dim)).transpose(1, 2) for outputs in caught.values()
                )
                positions = torch.arange(input_ids.shape[1], device=keys.device)
                cos, sin = rotary_angles(positions, model.config.head_dim, model.config.rope_theta)
                return Prefix(rotate(keys, cos.to(keys.dtype), sin.to(keys.dtype)), values.contiguous())
        """,
        "a model of the lower layers for each": """
            def prefix_from_tokens(model, input_ids):
                base, found = model.model, []
                positions = torch.arange(input_ids.shape[1], device=input_ids.device)
                cos, sin = (a.to(base.norm.weight.dtype) for a in rotary_angles(positions, model.config.head_dim, model.config.rope_theta))
                for number, layer in enumerate(base.layers):
                    x = base.embed_tokens(input_ids)
                    for below in base.layers[:number]:
                        x = below(x, cos, sin, None)
                    h = layer.input_layernorm(x)
                    heads = lambda t: t.reshape(len(positions), -1, model.config.head_dim).permute(1, 0, 2)
                    found.append((rotate(heads(layer.self_attn.k_proj(h)), cos, sin).detach(), heads(layer.self_attn.v_proj(h)).detach()))
                return Prefix(*(torch.stack(part) for part in zip(*found)))
        """,
    },
)


# ======================================================================================================================
# 5. ReparameterizedPrefix and fold
# ======================================================================================================================
class ReparameterizedPrefix(nn.Module):
    """Keys and values made by an MLP of two layers from one embedding a token (section 4.3)."""

    def __init__(self, layers: int, kv_heads: int, tokens: int, head_dim: int, width: int, mlp_width: int):
        super().__init__()
        self.layers, self.kv_heads, self.tokens, self.head_dim = layers, kv_heads, tokens, head_dim
        self.embedding = nn.Parameter(torch.randn(tokens, width))
        self.down = nn.Linear(width, mlp_width)
        self.up = nn.Linear(mlp_width, layers * 2 * kv_heads * head_dim)

    def forward(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return the keys and the values of one layer, each (kv_heads, tokens, head_dim)."""
        made = self.up(torch.tanh(self.down(self.embedding)))
        size = self.kv_heads * self.head_dim
        start = 2 * layer * size
        keys = made[:, start : start + size].reshape(self.tokens, self.kv_heads, self.head_dim)
        values = made[:, start + size : start + 2 * size].reshape(self.tokens, self.kv_heads, self.head_dim)
        return keys.transpose(0, 1), values.transpose(0, 1)


def fold(prefix: ReparameterizedPrefix) -> Prefix:
    """Return the keys and values that the MLP makes, as a prefix without it."""
    keys, values = [], []
    for layer in range(prefix.layers):
        layer_keys, layer_values = prefix(layer)
        keys.append(layer_keys.detach())
        values.append(layer_values.detach())
    return Prefix(torch.stack(keys), torch.stack(values))


def drive_reparameterized(ReparameterizedPrefix, fold, weights, sizes, gradients):
    """Fill the MLP with these weights; return what it makes, its gradients, and what is left when it is folded."""
    import torch
    from torch import nn

    from peftlab.memory import tensor_bytes

    fresh = ReparameterizedPrefix(*sizes)
    layers, kv_heads, tokens, head_dim, width, mlp_width = sizes
    shapes = {name: list(parameter.shape) for name, parameter in fresh.named_parameters()}
    seen = {"the shapes of the parameters by name": dict(sorted(shapes.items()))}
    if set(shapes) != {"embedding", "down.weight", "down.bias", "up.weight", "up.bias"}:
        return seen
    expected = [[tokens, width], [mlp_width, width], [mlp_width], [2 * layers * kv_heads * head_dim, mlp_width]]
    names = ["embedding", "down.weight", "down.bias", "up.weight", "up.bias"]
    if [shapes[name] for name in names[:4]] != expected:
        return seen
    larger = ReparameterizedPrefix(3, 2, 64, 16, 128, 96)
    seen["start"] = {name: larger.get_parameter(name).detach().clone() for name in names}
    prefix = fresh.to(weights.dtype)
    parameters = [prefix.get_parameter(name) for name in names]
    nn.utils.vector_to_parameters(weights.clone(), parameters)
    pairs = [prefix(layer) for layer in range(layers)]
    keys, values = (torch.stack(part) for part in zip(*pairs))
    seen |= {"the keys": keys.detach(), "the values": values.detach()}
    if keys.shape != gradients[0].shape or values.shape != gradients[1].shape or not keys.requires_grad:
        return seen
    ((keys * gradients[0]).sum() + (values * gradients[1]).sum()).backward()
    seen |= {f"the gradient of {name}": parameter.grad for name, parameter in zip(names, parameters)}
    before = {name: tensor.clone() for name, tensor in prefix.state_dict().items()}
    folded = fold(prefix)
    if not isinstance(folded, nn.Module):
        return seen | {"what fold returns": "None" if folded is None else f"a {type(folded).__name__}"}
    trained = sorted(name for name, parameter in folded.named_parameters() if parameter.requires_grad)
    seen |= {
        "what fold returns": "a module",
        "what fold returns holds keys and values and nothing else": set(folded.state_dict()) == {"keys", "values"},
        "the list of what is trainable in the folded prefix": trained,
        "bytes of the folded prefix": tensor_bytes([*folded.parameters(), *folded.buffers()]),
    }
    if trained == ["keys", "values"]:
        seen |= {"the folded keys": folded.keys.detach().clone(), "the folded values": folded.values.detach().clone()}
    with torch.no_grad():
        for parameter in folded.parameters():
            parameter.zero_()
    now = prefix.state_dict()
    return seen | {
        "folding leaves the MLP as it was": list(now) == list(before)
        and all(torch.equal(before[name], now[name]) for name in before),
        "the list of what is frozen in the prefix that was folded": [
            name for name, parameter in prefix.named_parameters() if not parameter.requires_grad
        ],
    }


def start_of_embedding(embedding: Tensor) -> str:
    """Say how an embedding of n = 8,192 numbers starts.

    Of so many standard normal numbers the mean is off by 1 / sqrt(n) = 1.1%, the standard deviation by 1 / sqrt(2 n) = 0.78%, and the
    share beyond two standard deviations, 4.55%, by sqrt(0.0455 * 0.9545 / n) = 0.23%; nine of each are allowed. Uniform numbers of
    the same mean and standard deviation have none out there.
    """
    numbers = embedding.double()
    count, mean, deviation = numbers.numel(), numbers.mean().item(), numbers.std().item()
    if torch.equal(numbers, numbers[:1].expand_as(numbers)):
        return "every row alike"
    if abs(mean) > 9 * deviation / math.sqrt(count):
        return "at random, with a mean other than 0"
    if abs(deviation - 1) > 9 / math.sqrt(2 * count):
        return f"at random, with a standard deviation {'above' if deviation > 1 else 'below'} 1"
    beyond = (numbers.abs() > 2 * deviation).double().mean().item()
    if abs(beyond - 0.0455) > 9 * math.sqrt(0.0455 * 0.9545 / count):
        return "at random, with another distribution than the normal one"
    return "standard normal"


def starts_as_linear(weight: Tensor, bias: Tensor) -> bool:
    """Whether a layer starts as nn.Linear does: weight and bias uniform between plus and minus b = 1 / sqrt(in_features).

    Of n uniform numbers the standard deviation, b / sqrt(3), is off by a share of sqrt(0.2 / n): 0.4% for the smaller weight
    (96 x 128), 4.6% for its bias; nine of each are allowed.
    """
    bound = 1 / math.sqrt(weight.shape[1])
    return all(
        part.abs().max().item() <= bound * (1 + 1e-6)
        and abs(part.double().std().item() * math.sqrt(3) / bound - 1) <= 9 * math.sqrt(0.2 / part.numel())
        for part in (weight, bias)
    )


def read_reparameterized(observation: Observation, case: dict) -> Observation:
    """Put into words how embedding and MLP start."""
    read = {}
    for name, value in observation.items():
        if name == "start":
            linear = {layer: [value[f"{layer}.weight"], value[f"{layer}.bias"]] for layer in ("down", "up")}
            read["how the embedding starts"] = start_of_embedding(value["embedding"])
            read["down and up start as PyTorch makes them"] = all(starts_as_linear(*pair) for pair in linear.values())
        else:
            read[name] = value
    return read


def reparameterized_case(generator: torch.Generator, dtype: torch.dtype = torch.float32, layers: int = 3) -> dict:
    """Return sizes of which no two are equal, weights for all of the MLP, and gradients of keys and values."""
    kv_heads, tokens, head_dim = 2, between(generator, 4, 5), 6
    width, mlp_width = between(generator, 7, 8), between(generator, 9, 11)
    out = layers * 2 * kv_heads * head_dim
    shape = (2, layers, kv_heads, tokens, head_dim)
    return {
        "weights": normal(generator, tokens * width + mlp_width * (width + 1) + out * (mlp_width + 1), dtype=dtype) / 3,
        "sizes": [layers, kv_heads, tokens, head_dim, width, mlp_width],
        "gradients": normal(generator, *shape, dtype=dtype),
    }


_MADE = "made = self.up(torch.tanh(self.down(self.embedding)))"
_UP = "self.up = nn.Linear(mlp_width, layers * 2 * kv_heads * head_dim)"
_EMBEDDING = "self.embedding = nn.Parameter(torch.randn(tokens, width))"
_KEYS_OF = "keys = made[:, start : start + size].reshape(self.tokens, self.kv_heads, self.head_dim)"
_VALUES_OF = "values = made[:, start + size : start + 2 * size].reshape(self.tokens, self.kv_heads, self.head_dim)"
_FOLDED = "return Prefix(torch.stack(keys), torch.stack(values))"

check_reparameterized = Exercise(
    spec=[ReparameterizedPrefix, fold],
    driver=drive_reparameterized,
    reading=read_reparameterized,
    cases=lambda generator: [reparameterized_case(generator)],
    tolerance=lambda case: rounding_tolerance(
        case,
        5e-6,
        ["the keys", "the values", "the folded keys", "the folded values"]
        + [f"the gradient of {name}" for name in ("embedding", "down.weight", "down.bias", "up.weight", "up.bias")],
    ),
    at_most=frozenset({"bytes of the folded prefix"}),
    mistakes={
        "there is no tanh between the two layers": {_MADE: "made = self.up(self.down(self.embedding))"},
        "there is a ReLU where the tanh should be": {"torch.tanh(": "torch.relu("},
        "the tanh comes after the second layer: keys and values could be no larger than 1": {
            _MADE: "made = torch.tanh(self.up(self.down(self.embedding)))",
        },
        "the layers of the MLP have no biases": {
            "nn.Linear(width, mlp_width)": "nn.Linear(width, mlp_width, bias=False)",
            _UP: _UP.removesuffix(")") + ", bias=False)",
        },
        "all layers' keys come first, then all values: in peft's layout each layer's keys are followed by its values": {
            "start = 2 * layer * size": "start = layer * size",
            "made[:, start + size : start + 2 * size]": (
                "made[:, self.layers * size + start : self.layers * size + start + size]"
            ),
        },
        "keys and values have changed places: a layer's keys come first": {
            "return keys.transpose(0, 1), values.transpose(0, 1)": "return values.transpose(0, 1), keys.transpose(0, 1)",
        },
        "heads and tokens are mixed up: a row of the MLP's output is one token, so view it so, then transpose": {
            _KEYS_OF: _KEYS_OF.replace("self.tokens, self.kv_heads", "self.kv_heads, self.tokens"),
            _VALUES_OF: _VALUES_OF.replace("self.tokens, self.kv_heads", "self.kv_heads, self.tokens"),
            "return keys.transpose(0, 1), values.transpose(0, 1)": "return keys, values",
        },
        "heads and tokens are mixed up, and layers too: `tokens` is the first axis of the MLP's output, and of its view; then permute": {
            _KEYS_OF: "whole = made.view(2 * self.layers, self.kv_heads, self.tokens, self.head_dim)\n        keys = whole[2 * layer]",
            _VALUES_OF: "values = whole[2 * layer + 1]",
            "return keys.transpose(0, 1), values.transpose(0, 1)": "return keys, values",
        },
        "the heads of a token are read in the wrong order: a head's features stand side by side": {
            _KEYS_OF: _KEYS_OF.replace("self.kv_heads, self.head_dim)", "self.head_dim, self.kv_heads).transpose(1, 2)"),
            _VALUES_OF: _VALUES_OF.replace("self.kv_heads, self.head_dim)", "self.head_dim, self.kv_heads).transpose(1, 2)"),
        },
        "all rows of the embedding start alike: the tokens get the same gradient and stay alike for ever": {
            "torch.randn(tokens, width)": "torch.zeros(tokens, width)",
        },
        "the embedding starts with a standard deviation below 1: draw it from the standard normal distribution, `torch.randn`": {
            "torch.randn(tokens, width)": "0.02 * torch.randn(tokens, width)",
        },
        "the embedding starts between 0 and 1, as `torch.rand` gives it: draw it with `torch.randn`": {
            "torch.randn(tokens, width)": "torch.rand(tokens, width)",
        },
        "the embedding starts from another distribution than the normal one: draw it with `torch.randn`": {
            "torch.randn(tokens, width)": "(torch.rand(tokens, width) - 0.5) * 12**0.5",
        },
        "down and up start from other numbers than nn.Linear gives them: leave them as PyTorch makes them": {
            _UP: _UP + "\n        nn.init.normal_(self.up.weight, std=0.02)\n        nn.init.zeros_(self.up.bias)",
        },
        "the embedding is no parameter: it would not be trained": {
            _EMBEDDING: "self.embedding = torch.randn(tokens, width)",
        },
        "what the MLP makes is detached: nothing in it gets a gradient": {_MADE: _MADE + ".detach()"},
        "fold keeps the MLP: what it returns holds keys and values and nothing else": {
            _FOLDED: "folded = Prefix(torch.stack(keys), torch.stack(values))\n    folded.made_by = prefix\n    return folded",
        },
        "fold takes every layer's keys and values from the first layer": {"prefix(layer)\n": "prefix(0)\n"},
        "fold freezes the prefix: it may be trained on": {_FOLDED: _FOLDED + ".requires_grad_(False)"},
        "fold freezes the prefix that it is given: leave it as it is": {
            _FOLDED: f"prefix.requires_grad_(False)\n    {_FOLDED}",
        },
    },
    variants={
        "view and permute, everything at once": """
            class ReparameterizedPrefix(nn.Module):
                def __init__(self, layers, kv_heads, tokens, head_dim, width, mlp_width):
                    super().__init__()
                    self.shape = (tokens, layers, 2, kv_heads, head_dim)
                    self.embedding = nn.Parameter(torch.empty(tokens, width))
                    nn.init.normal_(self.embedding)
                    self.down, self.up = nn.Linear(width, mlp_width), nn.Linear(mlp_width, 2 * layers * kv_heads * head_dim)

                def everything(self):
                    return self.up(self.down(self.embedding).tanh()).view(self.shape).permute(1, 2, 3, 0, 4)

                def forward(self, layer):
                    keys, values = self.everything()[layer]
                    return keys, values

            def fold(prefix):
                with torch.no_grad():
                    made = prefix.everything()
                return Prefix(made[:, 0].clone(), made[:, 1].clone())
        """,
        "only the rows of one layer": {
            _MADE: (
                "size = 2 * self.kv_heads * self.head_dim\n"
                "        rows = slice(layer * size, (layer + 1) * size)\n"
                "        hidden = torch.tanh(self.down(self.embedding))\n"
                "        made = F.linear(hidden, self.up.weight[rows], self.up.bias[rows])\n"
                "        layer = 0"
            ),
        },
        "einsum, and split": {
            _KEYS_OF: (
                "made = torch.einsum('tm,om->to', torch.tanh(self.down(self.embedding)), self.up.weight) + self.up.bias\n"
                "        keys = made.split(size, dim=1)[2 * layer].unflatten(1, (self.kv_heads, self.head_dim))"
            ),
            _VALUES_OF: "values = made.split(size, dim=1)[2 * layer + 1].unflatten(1, (self.kv_heads, self.head_dim))",
        },
    },
)


# ======================================================================================================================
# 6. bug hunt: a cache that may be asked again
# ======================================================================================================================
class PrefixCache:
    """Puts the prefix in front of a layer's keys and values, and keeps nothing of what it is given."""

    def __init__(self, prefix: nn.Module):
        self.prefix = prefix

    def update(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Return keys and values, each (batch, kv_heads, tokens + seq, head_dim)."""
        prefix_keys, prefix_values = self.prefix(layer)
        shape = (keys.shape[0], -1, -1, -1)
        prefix_keys = prefix_keys.to(keys.dtype).expand(shape)
        prefix_values = prefix_values.to(values.dtype).expand(shape)
        return torch.cat([prefix_keys, keys], dim=2), torch.cat([prefix_values, values], dim=2)


def drive_cache(PrefixCache, raw_keys, raw_values, x):
    """Use one cache for two passes through two small layers, the second with gradient checkpointing and half of the batch."""
    import torch
    import torch.nn.functional as F
    from torch import nn
    from torch.utils.checkpoint import checkpoint

    class Computed(nn.Module):
        def __init__(self):
            super().__init__()
            self.keys, self.values = nn.Parameter(raw_keys.clone()), nn.Parameter(raw_values.clone())

        def forward(self, layer):
            return self.keys[layer].sin(), self.values[layer].sin()

    prefix = Computed()
    cache = PrefixCache(prefix)

    def run(x, layer):
        keys, values = cache.update(x.roll(1, -1), x.roll(2, -1), layer)
        return x + F.scaled_dot_product_attention(x, keys, values)

    seen = {}
    for name, given, checkpointing in (("", x, False), (" with gradient checkpointing", x[:2], True)):
        prefix.zero_grad()
        h = given.clone().requires_grad_(True)
        start = h
        for layer in range(len(raw_keys)):
            h = checkpoint(run, h, layer, use_reentrant=False) if checkpointing else run(h, layer)
        if checkpointing:
            seen["the output with gradient checkpointing"] = h.detach().clone()
        try:
            h.sum().backward()
        except RuntimeError as error:  # CheckpointError is one, with numbers in it that differ from answer to answer
            return seen | {f"what backward does{name}": type(error).__name__}
        seen |= {
            f"what backward does{name}": "it runs",
            f"the gradient of the prefix's keys{name}": prefix.keys.grad,
            f"the gradient of the prefix's values{name}": prefix.values.grad,
            f"the gradient of x{name}": start.grad,
        }
    with torch.no_grad():
        last = len(raw_keys) - 1
        for name, dtype in (("a text in the prefix's dtype", x.dtype), ("a text in bfloat16", torch.bfloat16)):
            keys, values = cache.update(x.roll(1, -1).to(dtype), x.roll(2, -1).to(dtype), last)
            seen |= {f"the keys for {name}": keys, f"the values for {name}": values}
    return seen


def read_cache(observation: Observation, case: dict) -> Observation:
    """Put what `update` returns first."""
    returned = {name: value for name, value in observation.items() if " for " in name}
    return returned | {name: value for name, value in observation.items() if " for " not in name}


def cache_case(generator: torch.Generator, dtype: torch.dtype = torch.float32, layers: int = 2) -> dict:
    """Return a prefix and a text's states, already split into heads; no two sizes are equal."""
    kv_heads, head_dim = 2, 6
    shape = (layers, kv_heads, between(generator, 4, 5), head_dim)
    return {
        "raw_keys": normal(generator, *shape, dtype=dtype),
        "raw_values": normal(generator, *shape, dtype=dtype),
        "x": normal(generator, 3, kv_heads, between(generator, 7, 8), head_dim, dtype=dtype) / 2,
    }


_UPDATE_PAIR = "prefix_keys, prefix_values = self.prefix(layer)"
_CACHED = "return torch.cat([prefix_keys, keys], dim=2), torch.cat([prefix_values, values], dim=2)"
_HOLD = "self.prefix = prefix"

check_prefix_cache = Exercise(
    spec=[PrefixCache],
    driver=drive_cache,
    reading=read_cache,
    cases=lambda generator: [cache_case(generator)],
    tolerance=lambda case: rounding_tolerance(
        case,
        1e-5,
        ["the output with gradient checkpointing"]
        + [
            f"the gradient of {part}{name}"
            for part in ("the prefix's keys", "the prefix's values", "x")
            for name in ("", " with gradient checkpointing")
        ],
    ),
    mistakes={
        "the cache grows: it keeps the text's keys and values, and when a layer is run again it has them twice": {
            _HOLD: _HOLD + "\n        self.held = {}",
            _CACHED: (
                "if layer in self.held:\n"
                "            prefix_keys, prefix_values = self.held[layer]\n"
                "        keys, values = torch.cat([prefix_keys, keys], dim=2), torch.cat([prefix_values, values], dim=2)\n"
                "        self.held[layer] = keys, values\n"
                "        return keys, values"
            ),
        },
        "the cache is emptied at the first layer: backward starts at the last, and finds there what forward left": {
            _HOLD: _HOLD + "\n        self.held = {}",
            _CACHED: (
                "if layer == 0:\n"
                "            self.held = {}\n"
                "        if layer in self.held:\n"
                "            prefix_keys, prefix_values = self.held[layer]\n"
                "        keys, values = torch.cat([prefix_keys, keys], dim=2), torch.cat([prefix_values, values], dim=2)\n"
                "        self.held[layer] = keys, values\n"
                "        return keys, values"
            ),
        },
        "what it returned at first it returns ever after, whatever it is given": {
            _HOLD: _HOLD + "\n        self.held = {}",
            _CACHED: (
                "if layer not in self.held:\n"
                "            self.held[layer] = torch.cat([prefix_keys, keys], dim=2), torch.cat([prefix_values, values], dim=2)\n"
                "        return self.held[layer]"
            ),
        },
        "the prefix is left out when there are gradients to compute, so that it gets none": {
            _UPDATE_PAIR: "if torch.is_grad_enabled(): return keys, values\n        " + _UPDATE_PAIR,
        },
        "the prefix was asked for its keys and values once, when the cache was made: ask in every update": {
            _HOLD: _HOLD + "\n        self.pairs = [prefix(layer) for layer in range(2)]",
            "self.prefix(layer)": "self.pairs[layer]",
        },
        "the prefix is detached, so that it gets no gradient": {
            "prefix_keys.to(keys.dtype)": "prefix_keys.detach().to(keys.dtype)",
            "prefix_values.to(values.dtype)": "prefix_values.detach().to(values.dtype)",
        },
        "the prefix stands behind the text: it goes in front, where the mask has it": {
            _CACHED: "return torch.cat([keys, prefix_keys], dim=2), torch.cat([values, prefix_values], dim=2)",
        },
        "the prefix is joined along the wrong axis: tokens are axis 2 of (batch, kv_heads, tokens, head_dim)": {
            _CACHED: _CACHED.replace("dim=2", "dim=1"),
        },
        "the values lack the prefix: each of its keys has a value": {
            _CACHED: "return torch.cat([prefix_keys, keys], dim=2), values",
        },
        "the prefix has no batch dimension: expand it to the batch of what is given": {
            "prefix_keys.to(keys.dtype).expand(shape)": "prefix_keys.to(keys.dtype)",
            "prefix_values.to(values.dtype).expand(shape)": "prefix_values.to(values.dtype)",
        },
        "every layer gets the first layer's prefix": {"self.prefix(layer)": "self.prefix(0)"},
        "keys and values of the prefix have changed places": {_UPDATE_PAIR: "prefix_values, prefix_keys = self.prefix(layer)"},
        "the prefix is not in the text's dtype: convert it": {
            "prefix_keys.to(keys.dtype)": "prefix_keys",
            "prefix_values.to(values.dtype)": "prefix_values",
        },
    },
    variants={
        "repeat, in a loop": {
            _CACHED: (
                "both = []\n"
                "        for own, text in zip(self.prefix(layer), (keys, values)):\n"
                "            both.append(torch.cat([own.type_as(text)[None].repeat(len(text), 1, 1, 1), text], dim=-2))\n"
                "        return tuple(both)"
            ),
        },
        "a cache that begins anew at each update": {
            _HOLD: _HOLD + "\n        self.held = {}",
            _CACHED: (
                "self.held[layer] = [prefix_keys, prefix_values]\n"
                "        self.held[layer] = [torch.cat([old, new], -2) for old, new in zip(self.held[layer], (keys, values))]\n"
                "        return self.held[layer][0], self.held[layer][1]"
            ),
        },
        "as a module": {
            "class PrefixCache:": "class PrefixCache(nn.Module):",
            _HOLD: "super().__init__()\n        self.prefix = prefix",
        },
    },
)

EXERCISES = {name: exercise for name, exercise in globals().items() if isinstance(exercise, Exercise)}
"""Every exercise of the unit, by the name of its check."""
