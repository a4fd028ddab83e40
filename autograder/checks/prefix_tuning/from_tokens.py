"""`prefix_from_tokens`: a prefix that starts as a text."""

import torch
from torch import Tensor

from autograder.checking.cases import between, normal
from autograder.checking.drive import Observation
from autograder.checking.exercise import Exercise
from autograder.checking.helpers import fill
from autograder.checks.prefix_tuning.prefix import Prefix
from autograder.checks.prefix_tuning.rounding import LOW_PRECISION, cast, relative_errors, rounding_tolerance
from peftlab.llama import Llama, rotary_angles, rotate  # noqa: F401  (variants call rotate)


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


def drive_from_tokens(prefix_from_tokens, weights, input_ids, kv_heads, layers, elsewhere=False):
    """Take the prefix of some tokens of a tiny LLaMA; return it, and whether the model is as it was."""
    import torch

    from peftlab.llama import Llama, LlamaConfig

    head_dim, heads = 4, 3 * kv_heads
    model = Llama(LlamaConfig(17, heads * head_dim, 2 * heads * head_dim, layers, heads, kv_heads, rope_theta=50.0))
    fill(model, weights)
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
    """In 16 bits, compare the tensors with what they are in double precision."""
    return relative_errors(observation, case["exact"]) if case["weights"].dtype in LOW_PRECISION else observation


def exact_from_tokens(case: dict) -> dict:
    """Return what the driver sees of a right answer in double precision, for cases in 16 bits."""
    is_needed = case["weights"].dtype in LOW_PRECISION
    return {"exact": drive_from_tokens(prefix_from_tokens, **cast(case, torch.float64))} if is_needed else {}


_TURN = "key = key * cos[token] + torch.cat([-second, first]) * sin[token]"
_NEXT = "x = layer(x, cos, sin, None)"
_MIXED_UP = "[0].view(kv_heads, tokens, head_dim).transpose(0, 1)"
_RETURN_PREFIX = "return Prefix(all_keys, all_values)"

check_prefix_from_tokens = Exercise(
    spec=[prefix_from_tokens],
    cases=lambda generator: [tokens_case(generator)],
    driver=drive_from_tokens,
    helpers=[fill],
    reading=read_from_tokens,
    exact=exact_from_tokens,
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
            "k_proj(seen)[0].view(tokens, kv_heads, head_dim)": "k_proj(seen)" + _MIXED_UP,
            "v_proj(seen)[0].view(tokens, kv_heads, head_dim)": "v_proj(seen)" + _MIXED_UP,
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
