"""PromptedModel: measured memory."""

import torch

from autograder.checking.cases import total_bytes
from autograder.checking.drive import Observation
from autograder.checking.exercise import Exercise
from autograder.checking.helpers import constant_llama
from autograder.checks.prompt_tuning.cases import prompted_case
from autograder.checks.prompt_tuning.forward import check_prompted_forward
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


def memory_case(generator: torch.Generator, side: str = "left", layers: int = 1) -> dict:
    """Return a model, a prompt and a batch."""
    case = prompted_case(generator, side, layers)
    return {name: case[name] for name in ("sizes", "weights", "start", "input_ids", "attention_mask")}


def drive_prompted_memory(PromptedModel, sizes, weights, start, input_ids, attention_mask):
    """Take a training step; return what is there after it, and what forward kept for backward.

    Where no weights are given, the base is large, and it is returned what has a gradient.
    """
    import torch
    from torch import nn

    from peftlab.llama import LlamaConfig, LlamaModel
    from peftlab.memory import tensors_of_step

    if weights is None:
        base = constant_llama(*sizes).model
    else:
        base = LlamaModel(LlamaConfig(*sizes))
        nn.utils.vector_to_parameters(weights, base.parameters())
    model = PromptedModel(base, start)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    if weights is None:
        model(input_ids, attention_mask).sum().backward()
        optimizer.step()
        return {"the shapes of what has a gradient": [list(p.shape) for p in model.parameters() if p.grad is not None]}
    known = [weights, start, input_ids, *([] if attention_mask is None else [attention_mask])]
    tensors = tensors_of_step(lambda: model(input_ids, attention_mask).sum(), model.parameters(), optimizer, not_counted=known)
    cached = {f"self.{name}": held for name, held in vars(model).items() if torch.is_tensor(held)}
    return tensors | {"kept": {name: tensor.detach() for name, tensor in (model.state_dict() | cached).items()}}


_SAVED = "bytes besides the weights that forward saves for backward"


def read_memory(observation: Observation, case: dict) -> Observation:
    """Count the bytes of the tensors that came back."""
    return {
        "gradient bytes": total_bytes(observation["gradients"]),
        "optimizer state bytes": total_bytes(observation["optimizer state"]),
        "bytes of weights and buffers": total_bytes(observation["kept"].values()),
        _SAVED: total_bytes(observation["saved"]),
    }


def memory_tolerance(case: dict) -> dict[str, float]:
    """Return by how much a sparing answer may exceed the spec's bytes.

    For the saved tensors, two copies of the embedded sequence, with the int64 indices, for answers that sort it before and after; and
    where there is no mask, one of ones with each row's own cos and sin, fp32, for eight features a head, and the (seq, seq) mask
    that comes of it.
    """
    batch, seq = case["input_ids"].shape
    length, hidden = case["start"].shape
    seq += length
    own_tables = 0 if case["attention_mask"] is not None else batch * seq * (2 * 8 * 4 + seq)
    return {_SAVED: 2 * batch * seq * (4 * hidden + 8) + own_tables}


check_prompted_memory = Exercise(
    spec=[PromptedModel],
    cases=lambda generator: [memory_case(generator)],
    driver=drive_prompted_memory,
    helpers=[constant_llama],
    reading=read_memory,
    tolerance=memory_tolerance,
    at_most=frozenset({"gradient bytes", "optimizer state bytes", "bytes of weights and buffers", _SAVED}),
    mistakes={
        "the base is left trainable: its gradients and its optimizer state are what prompt tuning is there to save": {
            FREEZE: "pass"
        },
        "the embedding is left trainable: the prompt stands before it, and replaces it for the prompt's vectors alone": {
            FREEZE: FREEZE + "\n        self.base.embed_tokens.requires_grad_(True)"
        },
        "soft_prompt is in fp64: twice the bytes, twice the optimizer state": {
            PARAMETER: "nn.Parameter(start.detach().double())"
        },
        "the prompt is computed in fp64, and so is all that follows it": {
            "prompt.to(text.dtype), text[row]": "prompt.double(), text[row].double()",
            "return hidden": "self.base.float()\n        return hidden",
            "sequences, masks, positions = [], [], []": "sequences, masks, positions = [], [], []\n        self.base.double()",
        },
        "every row has a prompt of its own to train: one prompt serves the whole batch": {
            PARAMETER: "nn.Parameter(start.detach().repeat(4, 1, 1))",
            "length = prompt.shape[0]": "length = prompt.shape[1]",
            "prompt.to(text.dtype), text[row]": "prompt[row].to(text.dtype), text[row]",
        },
        "the model keeps a copy of its base: the frozen weights are in memory twice": {
            BASE: "import copy; self.base = base; self.untrained = copy.deepcopy(base).requires_grad_(False)\n"
        },
        "the prompt is made by an MLP that is trained with it, as in prefix tuning: here its vectors are trained themselves": {
            PARAMETER: PARAMETER + "\n        self.mlp = nn.Linear(start.shape[1], start.shape[1])",
            "prompt, text = self.soft_prompt,": "prompt, text = self.mlp(self.soft_prompt),",
        },
        "the hidden states of the last batch are kept on the model, and with them all that backward needs: return them only": {
            "return hidden": "self.last = hidden\n        return hidden"
        },
        "the base runs twice: once with the prompt is enough": {
            "return hidden": "hidden = hidden + 0 * self.base.run_layers(torch.stack(sequences))[:, :1].sum()\n        return hidden"
        },
        "the prompt of each token of the text is another copy: the sequence is longer than prompt and text together": {
            SEQUENCE: "torch.cat([prompt.to(text.dtype), prompt.to(text.dtype), text[row]])",
            PROMPT_MASK: "[1] * length * 2 + own",
            "range(length + len(own))": "range(2 * length + len(own))",
            CUT: "hidden[:, 2 * length :]",
        },
    },
    variants={
        "the batch at once, positions from 1": BATCHED,
        "each row alone, without its padding": check_prompted_forward.variants["each row alone, without its padding"],
        "padding moved in front of the prompt": check_prompted_forward.variants["padding moved in front of the prompt"],
        "the prompt repeated by a product": BATCHED.replace(
            "self.soft_prompt[None].repeat(len(x), 1, 1)", "x.new_ones(len(x), 1, 1) * self.soft_prompt"
        ),
    },
)
