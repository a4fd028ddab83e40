"""The adapter, and the pieces of it that several mistakes change."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Adapter(nn.Module):
    """h + W_up gelu(W_down h + b_down) + b_up (section 2.1)."""

    def __init__(self, hidden: int, bottleneck: int):
        super().__init__()
        self.down = nn.Linear(hidden, bottleneck)
        self.up = nn.Linear(bottleneck, hidden)
        nn.init.normal_(self.down.weight, std=0.01)
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, h: Tensor) -> Tensor:
        """Return h and what the bottleneck has to add to it."""
        squeezed = torch.matmul(h, self.down.weight.T) + self.down.bias
        bent = F.gelu(squeezed)
        change = torch.matmul(bent, self.up.weight.T) + self.up.bias
        return h + change


DOWN = "nn.Linear(hidden, bottleneck)"
UP = "nn.Linear(bottleneck, hidden)"
SQUEEZED = "torch.matmul(h, self.down.weight.T) + self.down.bias"
GELU = "F.gelu(squeezed)"
CHANGE = "torch.matmul(bent, self.up.weight.T) + self.up.bias"
SUM = "return h + change"
START_DOWN = "nn.init.normal_(self.down.weight, std=0.01)"
START_UP_BIAS = "nn.init.zeros_(self.up.bias)"
