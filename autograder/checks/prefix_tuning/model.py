"""PrefixModel: every layer, and where the text's positions start."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from autograder.checking.cases import between, normal, total_bytes
from autograder.checking.drive import Observation
from autograder.checking.exercise import Exercise
from autograder.checking.helpers import constant_llama
from autograder.checks.prefix_tuning.elsewhere import ELSEWHERE, on_meta
from autograder.checks.prefix_tuning.helpers import make_prefix
from autograder.checks.prefix_tuning.prefix_attention import PrefixAttention
from autograder.checks.prefix_tuning.rounding import rounding_tolerance
from peftlab.llama import LlamaModel


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
        return self.base.run_layers(self.base.embed_tokens(input_ids), attention_mask, positions)


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


def drive_model(PrefixModel, weights, keys, values, input_ids, padding, heads):
    """Build the model around an attention of the driver's own; return its states, its gradients, and what it is made of.

    Where no weights are given, the base is large, and it is returned what the model is made of.
    """
    import torch
    from torch import nn

    from peftlab.llama import LlamaConfig, LlamaModel
    from peftlab.memory import tensors_of_step

    made = []

    class Attends(nn.Module):
        def __init__(self, attention, prefix, layer):
            super().__init__()
            self.attention, self.prefix, self.layer = attention, prefix, layer
            made.append(self)

        def forward(self, x, cos, sin, mask):
            own = sum(part.mean() for part in self.prefix(self.layer))  # not what the student builds: it only has to be used
            place = (cos + sin).mean(-1).reshape(-1, x.shape[1], 1)  # positions of its own for each row, or the same for all
            return self.attention(x, cos, sin, mask) * (1 + own * place)

    layers, kv_heads, _, head_dim = keys.shape
    sizes = (17, heads * head_dim, 2 * heads * head_dim, layers, heads, kv_heads)
    if weights is None:
        base = constant_llama(*sizes).model
    else:
        base = LlamaModel(LlamaConfig(*sizes))
        nn.utils.vector_to_parameters(weights, base.parameters())
    base, prefix = base.to(keys.dtype), make_prefix(keys, values)
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
    if weights is None:
        optimizer = torch.optim.AdamW(trained, lr=1e-3)
        model(input_ids).sum().backward()
        optimizer.step()
        return seen | {"the trained parameters have a gradient": all(parameter.grad is not None for parameter in trained)}
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
    base.run_layers = lambda x, attention_mask=None, positions=None: x[..., 0] + positions
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
            ELSEWHERE: on_meta(observation["elsewhere"]),
        }
    return read


_FREEZE = "for parameter in base.parameters():\n            parameter.requires_grad_(False)"
_WRAP = "base.layers[number].self_attn = wrap(base.layers[number].self_attn, prefix, number)"
_KEEP = "self.base = base\n        self.prefix = prefix"
_COUNTED = "counted = torch.ones_like(input_ids) if attention_mask is None else attention_mask"
_POSITIONS = "positions = tokens - 1 + counted.cumsum(dim=1)"
_RUN_LAYERS = "return self.base.run_layers(self.base.embed_tokens(input_ids), attention_mask, positions)"

check_prefix_model = Exercise(
    spec=[PrefixModel],
    cases=lambda generator: [model_case(generator)],
    driver=drive_model,
    helpers=[make_prefix, constant_llama],
    reading=read_model,
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
            _RUN_LAYERS: _RUN_LAYERS.replace("attention_mask, positions", "None, positions"),
        },
        "the attention mask is extended by the prefix, as for prompt tuning: here the prefix is no part of the sequence": {
            _RUN_LAYERS: (
                "if attention_mask is not None:\n"
                "            attention_mask = torch.cat([attention_mask.new_ones(len(input_ids), tokens), attention_mask], 1)\n"
                "        " + _RUN_LAYERS
            ),
        },
        "the first hidden states are cut off, as for prompt tuning: here all of them are the text's": {
            _RUN_LAYERS: _RUN_LAYERS + "[:, tokens:]",
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
            _RUN_LAYERS: f"with torch.no_grad():\n            {_RUN_LAYERS}",
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
