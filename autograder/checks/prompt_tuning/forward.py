"""PromptedModel: the forward pass."""

import torch

from autograder.checks.prompt_tuning.cases import exact_case, prompted_case
from autograder.checks.prompt_tuning.helpers import decode_exactly
from autograder.checks.prompt_tuning.prompted_model import (
    BASE,
    BATCHED,
    CUT,
    FREEZE,
    PARAMETER,
    PROMPT_MASK,
    SEQUENCE,
    PromptedModel,
)
from autograder.drive import Observation
from autograder.exercise import Exercise


def drive_prompted(PromptedModel, sizes, weights, start, input_ids, attention_mask, output_gradient, exact):
    """Build a small LLaMA with a prompt before it; return the text's hidden states, and what gets a gradient.

    Where the case is exact, the base rounds nothing (see `decode_exactly`).
    """
    import torch
    from torch import nn

    from peftlab.llama import LlamaConfig, LlamaModel

    class Exact(LlamaModel):
        def decode(self, x, attention_mask=None, positions=None):
            return decode_exactly(self, x, attention_mask, positions)

    base = (Exact if exact else LlamaModel)(LlamaConfig(*sizes))
    nn.utils.vector_to_parameters(weights, base.parameters())
    given = start.clone()
    model = PromptedModel(base, given)
    seen = {"the type of soft_prompt": type(model.soft_prompt).__name__}
    if not torch.is_tensor(model.soft_prompt):
        return seen
    with torch.no_grad():
        given.zero_()
    seen |= {
        "soft_prompt after `start` has been changed": model.soft_prompt.detach().clone(),
        "the list of trainable parameters": sorted(n for n, p in model.named_parameters() if p.requires_grad),
    }
    ids, mask = input_ids.clone(), None if attention_mask is None else attention_mask.clone()
    hidden = model(ids, mask)
    if not torch.is_tensor(hidden):
        return seen | {"what forward returns": repr(hidden)}
    seen |= {"what forward returns": "a tensor", "hidden": hidden.detach()}
    untouched = torch.equal(ids, input_ids) and (mask is None or torch.equal(mask, attention_mask))
    if hidden.requires_grad and hidden.shape == output_gradient.shape:
        hidden.backward(output_gradient)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    with torch.no_grad():
        base.norm.weight.mul_(2)  # the model holds the base itself, so it sees this
        after = model.eval()(ids, mask)
    return seen | {"gradients": gradients, "untouched": untouched, "after": after}


_AFTER = "the hidden states of the text in eval mode with the base's last norm doubled"


def read_prompted(observation: Observation, case: dict) -> Observation:
    """Keep the hidden states of the text: what padding gives means nothing."""
    read = {name: value for name, value in observation.items() if name.startswith(("the ", "soft_prompt", "what "))}
    if "hidden" not in observation:
        return read
    mask = case["attention_mask"]
    kept = torch.ones_like(case["input_ids"]).bool() if mask is None else mask.bool()
    hidden, gradients = observation["hidden"], observation["gradients"]
    read["the list of parameters that get a gradient"] = sorted(gradients)
    read["the shape of the hidden states"] = list(hidden.shape)
    if list(hidden.shape) != list(case["output_gradient"].shape):
        return read
    return read | {
        "the hidden states of the text": hidden.masked_fill(~kept[..., None], 0),
        _AFTER: observation["after"].masked_fill(~kept[..., None], 0),
        "the gradient of soft_prompt": gradients.get("soft_prompt", "None"),
        "input_ids and attention_mask are left as they were": observation["untouched"],
    }


def model_tolerance(case: dict) -> dict[str, float]:
    """Return by how much right answers may differ: nothing for the exact model, otherwise ten times the rounding measured.

    In 600 random cases, padded on either side, the spec in fp32 was off from each row alone in fp64 by at most 1.2e-6 in a
    hidden state and 2.7e-6 in a gradient. Another right answer rounds as often, in another order.
    """
    if case["exact"]:
        return {}
    return {
        "the hidden states of the text": 1e-5,
        _AFTER: 2e-5,
        "the gradient of soft_prompt": 3e-5,
    }


_MASK_AND_POSITIONS = "torch.tensor(masks), torch.tensor(positions)"

check_prompted_forward = Exercise(
    spec=[PromptedModel],
    cases=lambda generator: [
        prompted_case(generator),
        prompted_case(generator, "each"),
        exact_case(generator, "each", torch.bfloat16),
        exact_case(generator, "none", torch.bfloat16, prompt_dtype=torch.bfloat16),
    ],
    driver=drive_prompted,
    helpers=[decode_exactly],
    reading=read_prompted,
    tolerance=model_tolerance,
    mistakes={
        "the prompt stands behind the text, where no token can see it: it belongs in front": {
            SEQUENCE: "torch.cat([text[row], prompt.to(text.dtype)])",
            PROMPT_MASK: "own + [1] * length",
            CUT: "hidden[:, : text.shape[1]]",
        },
        "the prompt stands behind the text, and its mask in front: both belong in front": {
            SEQUENCE: "torch.cat([text[row], prompt.to(text.dtype)])",
            CUT: "hidden[:, : text.shape[1]]",
        },
        "the prompt stands behind the text, and what is cut off is text: the prompt belongs in front": {
            SEQUENCE: "torch.cat([text[row], prompt.to(text.dtype)])",
        },
        "the hidden states of the prompt are returned too: cut them off": {CUT: "hidden"},
        "the hidden states are cut at the wrong end: the prompt's are the first": {CUT: "hidden[:, : text.shape[1]]"},
        "the attention mask does not cover the prompt: put as many ones in front of it as the prompt has vectors": {
            PROMPT_MASK: "own",
        },
        "the prompt's ones stand behind the text's attention mask: they belong in front of it, as the prompt does": {
            PROMPT_MASK: "own + [1] * length",
        },
        "the attention mask hides the prompt: in front of it belong ones, not zeros": {PROMPT_MASK: "[0] * length + own"},
        "the text sees padding: give `decode` the attention mask": {_MASK_AND_POSITIONS: "None, torch.tensor(positions)"},
        "the text sees padding: the text's own attention mask is lost": {_MASK_AND_POSITIONS: "None, None"},
        "padding between prompt and text counts as distance: the text's positions must follow the prompt's without a gap": {
            _MASK_AND_POSITIONS: "torch.tensor(masks)"
        },
        "the text's positions begin at 0, as the prompt's do: they must go on where the prompt's end": {
            "[sum(masks[-1][: place + 1]) - 1 for place in range(length + len(own))]": (
                "list(range(length)) + [sum(own[:place]) for place in range(len(own))]"
            ),
            "hidden = self.base.decode(torch.stack(sequences))\n": (
                "hidden = self.base.decode(torch.stack(sequences), None, torch.tensor(positions))\n"
            ),
        },
        "the base is not frozen: only the prompt may get a gradient": {FREEZE: "pass"},
        "soft_prompt gets no gradient: `.data` and `.detach()` cut it off": {
            "prompt, text = self.soft_prompt,": "prompt, text = self.soft_prompt.data,"
        },
        "soft_prompt is frozen together with the base: create it after freezing, or freeze the base alone": {
            PARAMETER: PARAMETER + "\n        self.requires_grad_(False)"
        },
        "soft_prompt is a plain tensor: only an nn.Parameter is found by the optimizer": {
            PARAMETER: "start.detach().clone().requires_grad_()"
        },
        "soft_prompt is `start` itself: copy it, or training changes what it came from": {
            PARAMETER: "nn.Parameter(start.detach())"
        },
        "the prompt is stored in the base's dtype: it keeps that of `start`": {
            PARAMETER: "nn.Parameter(start.detach().clone().to(base.embed_tokens.weight.dtype))"
        },
        "the prompt is stored in fp32, whatever it comes in: it keeps the dtype of `start`": {
            PARAMETER: "nn.Parameter(start.detach().clone().float())"
        },
        "the prompt is not converted to the embeddings' dtype in `forward`: a base in bf16 is given fp32": {
            SEQUENCE: "torch.cat([prompt, text[row]])"
        },
        "the model holds a copy of its base: keep the base itself, or its weights are in memory twice": {
            BASE: "import copy; self.base = copy.deepcopy(base)\n"
        },
        "the prompt is left out in eval mode: the task needs it there as well": {
            "prompt, text = self.soft_prompt,": (
                "if not self.training:\n            return self.base(input_ids, attention_mask)\n        prompt, text = self.soft_prompt,"
            )
        },
    },
    variants={
        "the batch at once, positions from 1": BATCHED,
        "each row alone, without its padding": """
            class PromptedModel(nn.Module):
                def __init__(self, base, start):
                    super().__init__()
                    self.base = base.requires_grad_(False)
                    self.soft_prompt = nn.Parameter(start.clone())

                def forward(self, input_ids, attention_mask=None):
                    kept = torch.ones_like(input_ids) if attention_mask is None else attention_mask
                    outputs = []
                    for ids, own in zip(input_ids, kept.bool()):
                        text = self.base.embed_tokens(ids[own])
                        alone = torch.cat([self.soft_prompt.to(text), text])
                        hidden = self.base.decode(alone[None])[0]
                        full = hidden.new_zeros(len(ids), hidden.shape[1])
                        full[own] = hidden[len(self.soft_prompt) :]
                        outputs.append(full)
                    return torch.stack(outputs)
        """,
        "padding moved in front of the prompt": """
            class PromptedModel(nn.Module):
                def __init__(self, base, start):
                    super().__init__()
                    base.requires_grad_(False)
                    self.base = base
                    self.register_parameter("soft_prompt", nn.Parameter(torch.clone(start)))

                def forward(self, input_ids, attention_mask=None):
                    text = self.base.embed_tokens(input_ids)
                    batch, seq, hidden_size = text.shape
                    length = len(self.soft_prompt)
                    if attention_mask is None:
                        attention_mask = input_ids.new_ones(batch, seq)
                    mask = torch.cat([attention_mask.new_ones(batch, length), attention_mask], 1)
                    x = torch.cat([self.soft_prompt.to(text.dtype).expand(batch, -1, -1), text], 1)
                    order = mask.argsort(dim=1, stable=True)
                    x = x.gather(1, order[..., None].expand(-1, -1, hidden_size))
                    hidden = self.base.decode(x, mask.gather(1, order))
                    back = order.argsort(1)
                    return hidden.gather(1, back[..., None].expand(-1, -1, hidden_size))[:, length:]
        """,
        "expand": {
            SEQUENCE: "torch.cat([prompt[None].expand(1, -1, -1)[0].to(text.dtype), text[row]])",
        },
    },
)
