"""`ReparameterizedPrefix` and `fold`."""

import math

import torch
from torch import Tensor, nn

from autograder.cases import between, normal
from autograder.checks.prefix_tuning.prefix import Prefix
from autograder.checks.prefix_tuning.rounding import rounding_tolerance
from autograder.drive import Observation
from autograder.exercise import Exercise


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


_MADE = "made = self.up(torch.tanh(self.down(self.embedding)))"
_UP = "self.up = nn.Linear(mlp_width, layers * 2 * kv_heads * head_dim)"
_KEYS_OF = "keys = made[:, start : start + size].reshape(self.tokens, self.kv_heads, self.head_dim)"
_VALUES_OF = "values = made[:, start + size : start + 2 * size].reshape(self.tokens, self.kv_heads, self.head_dim)"
_FOLDED = "return Prefix(torch.stack(keys), torch.stack(values))"

check_reparameterized = Exercise(
    spec=[ReparameterizedPrefix, fold],
    cases=lambda generator: [reparameterized_case(generator)],
    driver=drive_reparameterized,
    reading=read_reparameterized,
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
            "self.embedding = nn.Parameter(torch.randn(tokens, width))": "self.embedding = torch.randn(tokens, width)",
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
