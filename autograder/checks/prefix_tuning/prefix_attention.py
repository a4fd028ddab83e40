"""PrefixAttention, and the pieces of it that several mistakes change."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftlab.llama import LlamaAttention, rotary_angles, rotate  # noqa: F401  (mistakes call rotary_angles)


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


CAST = "prefix_keys, prefix_values = prefix_keys.to(x.dtype), prefix_values.to(x.dtype)"
CAT_KEYS = "keys = torch.cat([prefix_keys.expand(batch, -1, -1, -1), keys], dim=2)"
CAT_VALUES = "values = torch.cat([prefix_values.expand(batch, -1, -1, -1), values], dim=2)"
CAUSAL = "mask = torch.ones(1, 1, seq, seq, dtype=torch.bool, device=x.device).tril()"
TO_PREFIX = "to_prefix = mask.new_ones(mask.shape[0], 1, seq, tokens)"
CAT_MASK = "mask = torch.cat([to_prefix, mask], dim=3)"
SDPA = "mixed = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, enable_gqa=True)"
