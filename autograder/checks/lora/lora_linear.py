"""LoRALinear, and the pieces of it that several mistakes change."""

import math

import torch
from torch import Tensor, nn


class LoRALinear(nn.Module):
    """y = W x + bias + (alpha / rank) B A x, with W frozen (section 4.1)."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float):
        super().__init__()
        self.base = base
        self.base.requires_grad_(False)
        like_base = {"dtype": base.weight.dtype, "device": base.weight.device}
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, **like_base))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, **like_base))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.scaling = alpha / rank
        self.merged = False

    def forward(self, x: Tensor) -> Tensor:
        """Return the base layer's output plus the scaled update's; the base's alone once the update is merged."""
        if self.merged:
            return self.base(x)
        compressed = torch.einsum("...i,ri->...r", x, self.lora_A)
        update = torch.einsum("...r,or->...o", compressed, self.lora_B)
        return self.base(x) + self.scaling * update


SCALED = "self.scaling * update"
COMPRESSED = 'torch.einsum("...i,ri->...r", x, self.lora_A)'
UPDATE = 'torch.einsum("...r,or->...o", compressed, self.lora_B)'
RETURNED = "return self.base(x) + self.scaling * update"
