"""The class that holds a prefix."""

from torch import Tensor, nn


class Prefix(nn.Module):
    """Trainable keys and values, shaped (layers, kv_heads, tokens, head_dim): the class that the notebook's first cell has."""

    def __init__(self, keys: Tensor, values: Tensor):
        super().__init__()
        self.keys = nn.Parameter(keys)
        self.values = nn.Parameter(values)

    def forward(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return the keys and the values of one layer."""
        return self.keys[layer], self.values[layer]
