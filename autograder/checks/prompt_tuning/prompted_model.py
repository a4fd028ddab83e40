"""PromptedModel, and the pieces of it that several mistakes change."""

import torch
from torch import Tensor, nn

from peftlab.llama import LlamaModel


class PromptedModel(nn.Module):
    """A frozen model that reads a trained prompt before every text (section 2)."""

    def __init__(self, base: LlamaModel, start: Tensor):
        super().__init__()
        self.base = base
        self.base.requires_grad_(False)
        self.soft_prompt = nn.Parameter(start.detach().clone())

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return the hidden states of the text: the prompt's own are cut off."""
        prompt, text = self.soft_prompt, self.base.embed_tokens(input_ids)
        length = prompt.shape[0]
        sequences, masks, positions = [], [], []
        for row in range(text.shape[0]):
            sequences.append(torch.cat([prompt.to(text.dtype), text[row]]))
            own = [1] * text.shape[1] if attention_mask is None else attention_mask[row].tolist()
            masks.append([1] * length + own)
            positions.append([sum(masks[-1][: place + 1]) - 1 for place in range(length + len(own))])
        if attention_mask is None:
            hidden = self.base.decode(torch.stack(sequences))
        else:
            hidden = self.base.decode(torch.stack(sequences), torch.tensor(masks), torch.tensor(positions))
        return hidden[:, length:]


BASE = "self.base = base\n"
FREEZE = "self.base.requires_grad_(False)"
PARAMETER = "nn.Parameter(start.detach().clone())"
SEQUENCE = "torch.cat([prompt.to(text.dtype), text[row]])"
PROMPT_MASK = "[1] * length + own"
CUT = "hidden[:, length:]"
BATCHED = """
class PromptedModel(nn.Module):
    def __init__(self, base, start):
        super().__init__()
        self.base, self.soft_prompt = base, nn.Parameter(start.clone())
        for parameter in base.parameters():
            parameter.requires_grad = False

    def forward(self, input_ids, attention_mask=None):
        x = self.base.embed_tokens(input_ids)
        prompt = self.soft_prompt[None].repeat(len(x), 1, 1).to(x.dtype)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        mask = torch.nn.functional.pad(attention_mask, (prompt.shape[1], 0), value=1)
        return self.base.decode(torch.hstack([prompt, x]), mask, mask.cumsum(dim=-1))[:, -x.shape[1] :]
"""
