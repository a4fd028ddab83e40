"""A model with adapters, and the pieces of its code that several mistakes change."""

from collections.abc import Sequence

from torch import Tensor, nn

from autograder.checks.adapters.adapter import Adapter
from peftlab.llama import Llama


class Adapted(nn.Module):
    """A sub-layer and the adapter that its output passes through, before the decoder layer adds it to the residual stream."""

    def __init__(self, sublayer: nn.Module, adapter: nn.Module):
        super().__init__()
        self.sublayer = sublayer
        self.adapter = adapter

    def forward(self, *args: object) -> Tensor:
        """Return the adapter's output on the sub-layer's."""
        output = self.sublayer(*args)
        return self.adapter(output)


def add_adapters(model: Llama, bottleneck: int, places: Sequence[str] = ("self_attn", "mlp")) -> None:
    """Freeze the model; then let the output of these sub-layers pass through adapters, in every decoder layer."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    weight = model.lm_head.weight
    for number in range(len(model.model.layers)):
        layer = model.model.layers[number]
        for place in places:
            adapter = Adapter(model.config.hidden_size, bottleneck).to(weight.device, weight.dtype)
            sublayer = getattr(layer, place)
            setattr(layer, place, Adapted(sublayer, adapter))


FROZEN = "for parameter in model.parameters():\n        parameter.requires_grad_(False)"
OUTPUT = "output = self.sublayer(*args)\n        return self.adapter(output)"
NEW_ADAPTER = "Adapter(model.config.hidden_size, bottleneck)"
MOVED = ".to(weight.device, weight.dtype)"
WRAPPED = "setattr(layer, place, Adapted(sublayer, adapter))"
