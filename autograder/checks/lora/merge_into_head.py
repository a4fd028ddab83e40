"""Bug hunt: merging into tied embeddings."""

import math

import torch
from torch import nn

from autograder.cases import between, normal
from autograder.drive import Observation
from autograder.exercise import Exercise
from autograder.helpers import fill


@torch.no_grad()
def merge_into_head(model: nn.Module) -> None:
    """Merge the head's update; if the embedding shares the head's weight, give the head a weight of its own first."""
    head = model.lm_head
    if head.base.weight is model.model.embed_tokens.weight:
        head.base.weight = nn.Parameter(head.base.weight.clone(), requires_grad=False)
    head.base.weight += head.scaling * (head.lora_B @ head.lora_A)
    head.merged = True


def tied_case(generator: torch.Generator, tied: bool) -> dict:
    """Return a tiny LLaMA's weights, and an update of its head that moves every logit."""
    rank = between(generator, 2, 4)
    return {
        "tied": tied,
        "weights": normal(generator, 5_000) * 0.3,
        "lora_A": normal(generator, rank, 16),
        "lora_B": normal(generator, 40, rank),
        "scaling": 1.5,
        "input_ids": torch.randint(0, 40, (2, 7), generator=generator),
    }


def drive_merge_into_head(merge_into_head, tied, weights, lora_A, lora_B, scaling, input_ids):
    """Give a tiny LLaMA's head an update, merge it, and return the logits before and after."""
    import dataclasses

    from torch import nn

    from peftlab.llama import Llama, LlamaConfig

    class Head(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, self.scaling, self.merged = base, scaling, False
            self.lora_A, self.lora_B = nn.Parameter(lora_A), nn.Parameter(lora_B)

        def forward(self, x):
            return self.base(x) + (0 if self.merged else self.scaling * (x @ self.lora_A.T) @ self.lora_B.T)

    config = LlamaConfig(40, 16, 24, 1, 2, 1)
    model = Llama(dataclasses.replace(config, tie_word_embeddings=tied)).requires_grad_(False)
    fill(model, weights)
    embedding_before = model.model.embed_tokens.weight.clone()
    head_before = model.lm_head.weight
    model.lm_head = Head(model.lm_head)
    before = model(input_ids).detach()
    merge_into_head(model)
    after = model(input_ids).detach()
    embedding = model.model.embed_tokens.weight
    return {
        "before": before,
        "the logits after merging": after,
        "the embedding's change": embedding.detach() - embedding_before,
        "the head's weight after merging": model.lm_head.base.weight.detach(),
        "`merged`": bool(model.lm_head.merged),
        "the head has a weight tensor of its own": embedding.data_ptr() != model.lm_head.base.weight.data_ptr(),
        "the head has a parameter of its own": embedding is not model.lm_head.base.weight,
        "an untied head was copied": not tied and model.lm_head.base.weight.data_ptr() != head_before.data_ptr(),
        "the list of trainable parameters": sorted(n for n, p in model.named_parameters() if p.requires_grad),
    }


def read_merge_into_head(observation: Observation, case: dict) -> Observation:
    """Leave out what only the message needs."""
    return {name: value for name, value in observation.items() if name != "before"}


def tied_tolerance(case: dict) -> dict[str, float]:
    """Bound the rounding of the head: hidden + rank + 4 roundings of terms whose sizes add up to the magnitude below.

    The norm's gain here is at most max|weights|, so |hidden| <= sqrt(16) * max|weights| in every feature.
    """
    rank, hidden_size = case["lora_A"].shape
    dense = case["weights"].abs().max() + case["scaling"] * (case["lora_B"].abs() @ case["lora_A"].abs()).max()
    hidden = math.sqrt(hidden_size) * case["weights"].abs().max()
    unit = (hidden_size + rank + 4) * torch.finfo(torch.float32).eps
    return {
        "the logits after merging": (unit * hidden_size * hidden * dense).item(),
        "the head's weight after merging": (unit * dense).item(),
    }


_UNTIE = "head.base.weight = nn.Parameter(head.base.weight.clone(), requires_grad=False)"
_IS_TIED = "if head.base.weight is model.model.embed_tokens.weight:"
_MERGE_HEAD = "head.base.weight += head.scaling * (head.lora_B @ head.lora_A)"

check_merge_into_head = Exercise(
    spec=[merge_into_head],
    cases=lambda generator: [tied_case(generator, tied=True), tied_case(generator, tied=False)],
    driver=drive_merge_into_head,
    helpers=[fill],
    reading=read_merge_into_head,
    tolerance=tied_tolerance,
    mistakes={
        "the update went into the embedding too: head and embedding are one tensor, so untie them first": {
            _IS_TIED: "if False:",
        },
        "the head is copied although it is not tied: that is a second matrix of vocabulary size for nothing": {
            _IS_TIED: "if True:",
        },
        "the weight is untied after merging, when the embedding has changed already: untie it first": {
            f"{_IS_TIED}\n        {_UNTIE}\n    {_MERGE_HEAD}": f"{_MERGE_HEAD}\n    {_IS_TIED}\n        {_UNTIE}",
        },
        "the update is not merged: the logits lose it": {_MERGE_HEAD: "pass"},
        "the update is not scaled: what is merged is scaling * B A": {_MERGE_HEAD: _MERGE_HEAD.replace("head.scaling * ", "")},
        "`merged` is not set: forward adds the update a second time": {"head.merged = True": "pass"},
        "the head starts from zeros: it needs a copy of the shared weight": {
            "head.base.weight.clone()": "torch.zeros_like(head.base.weight)"
        },
        "the head's weight has become trainable: it is frozen, before and after": {
            "requires_grad=False)": "requires_grad=True)",
            _MERGE_HEAD: "head.base.weight.data += head.scaling * (head.lora_B @ head.lora_A)",
        },
        "the tie is still there: a Parameter made of the same tensor shares its memory, so `clone` it": {
            "head.base.weight.clone()": "head.base.weight",
        },
        "the embedding was changed back, but the head with it: they are still one tensor": {
            _IS_TIED: "tied = head.base.weight is model.model.embed_tokens.weight\n    if False:",
            "head.merged = True": (
                "if tied: model.model.embed_tokens.weight -= head.scaling * (head.lora_B @ head.lora_A)\n    head.merged = True"
            ),
        },
    },
    variants={
        "by data_ptr": {
            _IS_TIED: "if head.base.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr():",
        },
        "out of place": {
            _IS_TIED: "update = head.scaling * (head.lora_B @ head.lora_A)\n    if model.config.tie_word_embeddings:",
            _UNTIE: "head.base.weight = nn.Parameter(head.base.weight + update, requires_grad=False)",
            _MERGE_HEAD: "else:\n        head.base.weight += update",
        },
        "a copy for the embedding": {
            _UNTIE: "model.model.embed_tokens.weight = nn.Parameter(head.base.weight.clone(), requires_grad=False)",
        },
    },
)
"""Every exercise of the unit, by the name of its check."""
