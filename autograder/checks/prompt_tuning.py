"""Checks of unit 05_prompt_tuning (Lester et al. 2021, arXiv 2104.08691)."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from autograder.cases import between, normal, read_safetensors, total_bytes
from autograder.drive import Observation
from autograder.exercise import Exercise
from peftlab.llama import IGNORE, LlamaConfig, LlamaModel


# ======================================================================================================================
# 1. PromptedModel: the forward pass
# ======================================================================================================================
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


def drive_prompted(PromptedModel, sizes, weights, start, input_ids, attention_mask, output_gradient, exact):
    """Build a small LLaMA with a prompt before it; return the text's hidden states, and what gets a gradient.

    The exact model takes the place of one whose dtype would leave room for mistakes: it sums what a position may look at,
    each summand multiplied by its distance, and with small whole numbers nothing is rounded.
    """
    import torch
    from torch import nn

    from peftlab.llama import LlamaConfig, LlamaModel, causal_mask

    class Exact(LlamaModel):
        def decode(self, x, attention_mask=None, positions=None):
            batch, seq, _ = x.shape
            positions = (torch.arange(seq) if positions is None else positions).expand(batch, seq)
            looked_at = causal_mask(torch.ones(batch, seq) if attention_mask is None else attention_mask)[:, 0]
            distance = 1 + positions[:, :, None] - positions[:, None, :]
            return ((looked_at * distance).double() @ x.double() * self.norm.weight.double()).to(x.dtype)

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


def padding(generator: torch.Generator, batch: int, seq: int, side: str) -> Tensor | None:
    """Return the attention mask of rows that are padded on this side, each by another amount and one by none.

    "each" has rows that are padded on the left, on the right, on both sides and on none.
    """
    if side == "none":
        return None
    mask = torch.ones(batch, seq, dtype=torch.long)
    for row, padded in enumerate(torch.randperm(batch, generator=generator).tolist()):
        left = {"left": 2 * padded, "right": 0, "each": (0, 3, 0, 2)[padded]}[side]
        right = {"left": 0, "right": 2 * padded, "each": (0, 0, 4, 1)[padded]}[side]
        mask[row, :left] = 0
        mask[row, seq - right :] = 0
    return mask


def llama_sizes(generator: torch.Generator, layers: int = 1) -> list[int]:
    """Return the sizes of a LLaMA with three heads of eight features, which share one key-value head."""
    return [between(generator, 29, 33), 24, between(generator, 36, 42), layers, 3, 1]


def llama_weights(generator: torch.Generator, sizes: Sequence[int]) -> Tensor:
    """Return all weights of such a model, in one vector; large enough for positions and masks to matter."""
    count = sum(parameter.numel() for parameter in LlamaModel(LlamaConfig(*sizes)).parameters())
    return 0.3 * normal(generator, count)


def prompted_case(generator: torch.Generator, side: str = "none", layers: int = 1) -> dict:
    """Return a model, a prompt and a batch of four rows, of which no two sizes are equal."""
    sizes, batch, length, seq = llama_sizes(generator, layers), 4, between(generator, 5, 6), between(generator, 9, 11)
    mask = padding(generator, batch, seq, side)
    output_gradient = normal(generator, batch, seq, sizes[1])
    return {
        "sizes": sizes,
        "weights": llama_weights(generator, sizes),
        "start": normal(generator, length, sizes[1]),
        "input_ids": torch.randint(0, sizes[0], (batch, seq), generator=generator),
        "attention_mask": mask,
        "output_gradient": output_gradient if mask is None else output_gradient * mask[..., None],
        "exact": False,
    }


def exact_case(generator: torch.Generator, side: str, dtype: torch.dtype, prompt_dtype: torch.dtype = torch.float32) -> dict:
    """Return a case of small whole numbers for the exact model and a prompt, each in any dtype.

    One position of each row gets a gradient of -1, 0 or 1 a feature: its sums over the batch are below 256, and exact in bf16.
    """
    case = prompted_case(generator, side)
    batch, seq = case["input_ids"].shape
    kept = torch.ones(batch, seq) if case["attention_mask"] is None else case["attention_mask"]
    last = (kept * torch.arange(1, seq + 1)).argmax(1)
    gradient = torch.zeros_like(case["output_gradient"])
    gradient[torch.arange(batch), last] = torch.randint(-1, 2, (batch, gradient.shape[2]), generator=generator).float()
    weights = torch.randint(1, 4, case["weights"].shape, generator=generator)
    start = torch.randint(-4, 5, case["start"].shape, generator=generator).to(prompt_dtype)
    return case | {"weights": weights.to(dtype), "start": start, "output_gradient": gradient.to(dtype), "exact": True}


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


_BASE = "self.base = base\n"
_FREEZE = "self.base.requires_grad_(False)"
_PARAMETER = "nn.Parameter(start.detach().clone())"
_SEQUENCE = "torch.cat([prompt.to(text.dtype), text[row]])"
_PROMPT_MASK = "[1] * length + own"
_POSITIONS = "[sum(masks[-1][: place + 1]) - 1 for place in range(length + len(own))]"
_CUT = "hidden[:, length:]"
_MASK_AND_POSITIONS = "torch.tensor(masks), torch.tensor(positions)"

_BATCHED = """
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

check_prompted_forward = Exercise(
    spec=[PromptedModel],
    driver=drive_prompted,
    reading=read_prompted,
    cases=lambda generator: [
        prompted_case(generator),
        prompted_case(generator, "each"),
        exact_case(generator, "each", torch.bfloat16),
        exact_case(generator, "none", torch.bfloat16, prompt_dtype=torch.bfloat16),
    ],
    tolerance=model_tolerance,
    mistakes={
        "the prompt stands behind the text, where no token can see it: it belongs in front": {
            _SEQUENCE: "torch.cat([text[row], prompt.to(text.dtype)])",
            _PROMPT_MASK: "own + [1] * length",
            _CUT: "hidden[:, : text.shape[1]]",
        },
        "the prompt stands behind the text, and its mask in front: both belong in front": {
            _SEQUENCE: "torch.cat([text[row], prompt.to(text.dtype)])",
            _CUT: "hidden[:, : text.shape[1]]",
        },
        "the prompt stands behind the text, and what is cut off is text: the prompt belongs in front": {
            _SEQUENCE: "torch.cat([text[row], prompt.to(text.dtype)])",
        },
        "the hidden states of the prompt are returned too: cut them off": {_CUT: "hidden"},
        "the hidden states are cut at the wrong end: the prompt's are the first": {_CUT: "hidden[:, : text.shape[1]]"},
        "the attention mask does not cover the prompt: put as many ones in front of it as the prompt has vectors": {
            _PROMPT_MASK: "own",
        },
        "the prompt's ones stand behind the text's attention mask: they belong in front of it, as the prompt does": {
            _PROMPT_MASK: "own + [1] * length",
        },
        "the attention mask hides the prompt: in front of it belong ones, not zeros": {_PROMPT_MASK: "[0] * length + own"},
        "the text sees padding: give `decode` the attention mask": {_MASK_AND_POSITIONS: "None, torch.tensor(positions)"},
        "the text sees padding: the text's own attention mask is lost": {_MASK_AND_POSITIONS: "None, None"},
        "padding between prompt and text counts as distance: the text's positions must follow the prompt's without a gap": {
            _MASK_AND_POSITIONS: "torch.tensor(masks)"
        },
        "the text's positions begin at 0, as the prompt's do: they must go on where the prompt's end": {
            _POSITIONS: "list(range(length)) + [sum(own[:place]) for place in range(len(own))]",
            "hidden = self.base.decode(torch.stack(sequences))\n": (
                "hidden = self.base.decode(torch.stack(sequences), None, torch.tensor(positions))\n"
            ),
        },
        "the base is not frozen: only the prompt may get a gradient": {_FREEZE: "pass"},
        "soft_prompt gets no gradient: `.data` and `.detach()` cut it off": {
            "prompt, text = self.soft_prompt,": "prompt, text = self.soft_prompt.data,"
        },
        "soft_prompt is frozen together with the base: create it after freezing, or freeze the base alone": {
            _PARAMETER: _PARAMETER + "\n        self.requires_grad_(False)"
        },
        "soft_prompt is a plain tensor: only an nn.Parameter is found by the optimizer": {
            _PARAMETER: "start.detach().clone().requires_grad_()"
        },
        "soft_prompt is `start` itself: copy it, or training changes what it came from": {
            _PARAMETER: "nn.Parameter(start.detach())"
        },
        "the prompt is stored in the base's dtype: it keeps that of `start`": {
            _PARAMETER: "nn.Parameter(start.detach().clone().to(base.embed_tokens.weight.dtype))"
        },
        "the prompt is stored in fp32, whatever it comes in: it keeps the dtype of `start`": {
            _PARAMETER: "nn.Parameter(start.detach().clone().float())"
        },
        "the prompt is not converted to the embeddings' dtype in `forward`: a base in bf16 is given fp32": {
            _SEQUENCE: "torch.cat([prompt, text[row]])"
        },
        "the model holds a copy of its base: keep the base itself, or its weights are in memory twice": {
            _BASE: "import copy; self.base = copy.deepcopy(base)\n"
        },
        "the prompt is left out in eval mode: the task needs it there as well": {
            "prompt, text = self.soft_prompt,": (
                "if not self.training:\n            return self.base(input_ids, attention_mask)\n        prompt, text = self.soft_prompt,"
            )
        },
    },
    variants={
        "the batch at once, positions from 1": _BATCHED,
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
            _SEQUENCE: "torch.cat([prompt[None].expand(1, -1, -1)[0].to(text.dtype), text[row]])",
        },
    },
)


# ======================================================================================================================
# 2. PromptedModel: measured memory
# ======================================================================================================================
def drive_prompted_memory(PromptedModel, sizes, weights, start, input_ids, attention_mask):
    """Take a training step; return what is there after it, and what forward kept for backward."""
    import torch
    from torch import nn

    from peftlab.llama import LlamaConfig, LlamaModel
    from peftlab.memory import tensors_of_step

    base = LlamaModel(LlamaConfig(*sizes))
    nn.utils.vector_to_parameters(weights, base.parameters())
    model = PromptedModel(base, start)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
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


def memory_case(generator: torch.Generator, side: str = "left", layers: int = 1) -> dict:
    """Return a model, a prompt and a batch."""
    case = prompted_case(generator, side, layers)
    return {name: case[name] for name in ("sizes", "weights", "start", "input_ids", "attention_mask")}


def memory_tolerance(case: dict) -> dict[str, float]:
    """Return by how much a sparing answer may exceed the spec's bytes.

    For the saved tensors, two copies of the embedded sequence, with the int64 indices, for whoever sorts it before and after; and
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
    driver=drive_prompted_memory,
    reading=read_memory,
    cases=lambda generator: [memory_case(generator)],
    tolerance=memory_tolerance,
    at_most=frozenset({"gradient bytes", "optimizer state bytes", "bytes of weights and buffers", _SAVED}),
    mistakes={
        "the base is left trainable: its gradients and its optimizer state are what prompt tuning is there to save": {
            _FREEZE: "pass"
        },
        "the embedding is left trainable: the prompt stands before it, and replaces it for the prompt's vectors alone": {
            _FREEZE: _FREEZE + "\n        self.base.embed_tokens.requires_grad_(True)"
        },
        "soft_prompt is in fp64: twice the bytes, twice the optimizer state": {
            _PARAMETER: "nn.Parameter(start.detach().double())"
        },
        "the prompt is computed in fp64, and so is all that follows it": {
            "prompt.to(text.dtype), text[row]": "prompt.double(), text[row].double()",
            "return hidden": "self.base.float()\n        return hidden",
            "sequences, masks, positions = [], [], []": "sequences, masks, positions = [], [], []\n        self.base.double()",
        },
        "every row has a prompt of its own to train: one prompt serves the whole batch": {
            _PARAMETER: "nn.Parameter(start.detach().repeat(4, 1, 1))",
            "length = prompt.shape[0]": "length = prompt.shape[1]",
            "prompt.to(text.dtype), text[row]": "prompt[row].to(text.dtype), text[row]",
        },
        "the model keeps a copy of its base: the frozen weights are in memory twice": {
            _BASE: "import copy; self.base = base; self.untrained = copy.deepcopy(base).requires_grad_(False)\n"
        },
        "the prompt is made by an MLP that is trained with it, as in prefix tuning: here its vectors are trained themselves": {
            _PARAMETER: _PARAMETER + "\n        self.mlp = nn.Linear(start.shape[1], start.shape[1])",
            "prompt, text = self.soft_prompt,": "prompt, text = self.mlp(self.soft_prompt),",
        },
        "the hidden states of the last batch are kept on the model, and with them all that backward needs: return them only": {
            "return hidden": "self.last = hidden\n        return hidden"
        },
        "the base runs twice: once with the prompt is enough": {
            "return hidden": "hidden = hidden + 0 * self.base.decode(torch.stack(sequences))[:, :1].sum()\n        return hidden"
        },
        "the prompt of each token of the text is another copy: the sequence is longer than prompt and text together": {
            _SEQUENCE: "torch.cat([prompt.to(text.dtype), prompt.to(text.dtype), text[row]])",
            _PROMPT_MASK: "[1] * length * 2 + own",
            "range(length + len(own))": "range(2 * length + len(own))",
            _CUT: "hidden[:, 2 * length :]",
        },
    },
    variants={
        "the batch at once, positions from 1": _BATCHED,
        "each row alone, without its padding": check_prompted_forward.variants["each row alone, without its padding"],
        "padding moved in front of the prompt": check_prompted_forward.variants["padding moved in front of the prompt"],
        "the prompt repeated by a product": _BATCHED.replace(
            "self.soft_prompt[None].repeat(len(x), 1, 1)", "x.new_ones(len(x), 1, 1) * self.soft_prompt"
        ),
    },
)


# ======================================================================================================================
# 3. three ways to start
# ======================================================================================================================
def random_start(length: int, hidden: int) -> Tensor:
    """Return standard normal numbers, (length, hidden)."""
    return torch.normal(torch.zeros(length, hidden), 1.0)


def vocabulary_start(embedding: nn.Embedding, length: int) -> Tensor:
    """Return copies of the embeddings of distinct tokens, drawn at random from the whole vocabulary."""
    ids = torch.ones(embedding.num_embeddings).multinomial(length, replacement=False)
    with torch.no_grad():
        return embedding(ids)


def text_start(embedding: nn.Embedding, token_ids: Sequence[int], length: int) -> Tensor:
    """Return copies of the embeddings of the text's tokens, from its beginning, over and over until there are `length`."""
    ids = [token_ids[position % len(token_ids)] for position in range(length)]
    with torch.no_grad():
        return embedding(torch.tensor(ids))


def drive_starts(random_start, vocabulary_start, text_start, table, token_ids, lengths, hidden):
    """Make starts; change one that is a copy, and return whether the embedding has changed with it."""
    import torch
    from torch import nn

    embedding = nn.Embedding(*table.shape, dtype=table.dtype)
    with torch.no_grad():
        embedding.weight.copy_(table)
    starts = {
        "random": random_start(lengths[-1], hidden),
        "random again": random_start(lengths[-1], hidden),
        **{f"vocabulary {draw}": vocabulary_start(embedding, lengths[1]) for draw in range(20)},
        **{f"text {length}": text_start(embedding, token_ids, length) for length in lengths[:-1]},
    }
    seen = {name: start.detach().clone() if torch.is_tensor(start) else repr(start) for name, start in starts.items()}
    asks = {f"{name.split()[0]}_start" for name, start in starts.items() if torch.is_tensor(start) and start.requires_grad}
    with torch.no_grad():
        for start in starts.values():
            if torch.is_tensor(start):
                start += 1
    same = torch.equal(embedding.weight, table) and embedding.weight.requires_grad
    return {"starts": seen, "asks for a gradient": sorted(asks), "embedding as it was": same}


def read_starts(observation: Observation, case: dict) -> Observation:
    """Turn random starts into what any right answer gives."""
    starts, table = observation["starts"], case["table"]
    returned = {f"what {name}_start returns": "a tensor" for name in ("random", "vocabulary", "text")}
    for name, value in starts.items():
        if not isinstance(value, Tensor):
            returned[f"what {name.partition(' ')[0]}_start returns"] = value
    if set(returned.values()) != {"a tensor"}:
        return returned
    short, middle, long = case["lengths"][:-1]
    read = returned | {
        "the shape of random_start": list(starts["random"].shape),
        "the dtype of random_start": str(starts["random"].dtype),
        "the mean of random_start": starts["random"].double().mean().item(),
        "the standard deviation of random_start": starts["random"].double().std().item(),
        "the share of random_start beyond two standard deviations": (starts["random"].abs() > 2).double().mean().item(),
        "two calls of random_start give the same": torch.equal(starts["random"], starts["random again"]),
        f"text_start, {len(case['token_ids'])} tokens cut to {short}": starts[f"text {short}"],
        f"text_start, {len(case['token_ids'])} tokens for {middle}": starts[f"text {middle}"],
        f"text_start, {len(case['token_ids'])} tokens for {long}": starts[f"text {long}"],
        "the shape of vocabulary_start": list(starts["vocabulary 0"].shape),
        "the dtype of vocabulary_start": str(starts["vocabulary 0"].dtype),
        "the list of functions whose start asks for a gradient": observation["asks for a gradient"],
        "the embedding is as it was after the starts were changed": observation["embedding as it was"],
    }
    draws = [start for name, start in starts.items() if name.startswith("vocabulary")]
    if read["the shape of vocabulary_start"] == [middle, table.shape[1]]:
        read["what vocabulary_start draws"] = _drawn([_tokens(start, table) for start in draws], len(table))
    return read


def _drawn(draws: list[list[int | None]], size: int) -> str:
    """Say how several draws of tokens were made."""
    length = len(draws[0])
    if any(None in ids for ids in draws):
        return "rows that the embedding does not have"
    if any(len(set(ids)) < length for ids in draws):
        return "some tokens twice"
    if all(ids == list(range(length)) for ids in draws):
        return "the first tokens, in order"
    if all(ids == list(range(ids[0], ids[0] + length)) for ids in draws):
        return "a run of neighbours"
    if all(ids == draws[0] for ids in draws):
        return "the same tokens at every call"
    if max(map(max, draws)) < length:
        return "among the first tokens only"
    if not any(0 in ids for ids in draws) or not any(size - 1 in ids for ids in draws):
        return "never the first, or never the last token"
    return "different tokens, from the whole vocabulary"


def _tokens(start: Tensor, table: Tensor) -> list[int | None]:
    """Return which row of the table each row is, or None."""
    same = (start[:, None] == table).all(-1)
    return [place if found else None for place, found in zip(same.int().argmax(1).tolist(), same.any(1).tolist())]


def starts_case(generator: torch.Generator, dtype: torch.dtype = torch.float32) -> dict:
    """Return an embedding, a text, and lengths shorter than it, longer than it and longer than twice; 4,000 random numbers.

    24 of 30 tokens are drawn, twenty times: that these miss one token, or are equal, or distinct by accident, doesn't happen.
    """
    vocabulary, tokens = between(generator, 30, 33), between(generator, 9, 11)
    return {
        "table": normal(generator, vocabulary, between(generator, 12, 14), dtype=dtype),
        "token_ids": torch.randperm(vocabulary, generator=generator)[:tokens].tolist(),
        "lengths": [between(generator, 4, 6), 24, 2 * tokens + 5, between(generator, 60, 62)],
        "hidden": between(generator, 66, 70),
    }


_MULTINOMIAL = "torch.ones(embedding.num_embeddings).multinomial(length, replacement=False)"
_NORMAL = "torch.normal(torch.zeros(length, hidden), 1.0)"
_CYCLED = "[token_ids[position % len(token_ids)] for position in range(length)]"
_DRAWN = "with torch.no_grad():\n        return embedding(ids)"
_TEXT = "with torch.no_grad():\n        return embedding(torch.tensor(ids))"

check_starts = Exercise(
    spec=[random_start, vocabulary_start, text_start],
    driver=drive_starts,
    reading=read_starts,
    cases=lambda generator: [starts_case(generator), starts_case(generator, torch.bfloat16)],
    # Over 4,000 normal numbers the mean scatters by 0.016, the standard deviation by 0.011 and the share beyond two of them,
    # 4.6%, by 0.33%, for two answers 1.4 times as much; these are about six times that.
    tolerance=lambda case: {
        "the mean of random_start": 0.13,
        "the standard deviation of random_start": 0.1,
        "the share of random_start beyond two standard deviations": 0.028,
    },
    mistakes={
        "random_start is uniform between 0 and 1: `torch.randn` gives normal numbers, `torch.rand` does not": {
            _NORMAL: "torch.rand(length, hidden)"
        },
        "random_start is uniform between -0.5 and 0.5, as in Lester et al.: here its numbers should be standard normal": {
            _NORMAL: "torch.rand(length, hidden) - 0.5"
        },
        "random_start has standard deviation 0.02, as a model's weights when they start: it should be 1": {
            _NORMAL: _NORMAL.replace("1.0", "0.02")
        },
        "random_start is the same at every call: do not set a seed inside": {
            _NORMAL: "torch.manual_seed(0).seed() and torch.randn(length, hidden, generator=torch.Generator().manual_seed(0))"
        },
        "vocabulary_start may draw a token twice: its tokens must be distinct": {
            _MULTINOMIAL: "torch.randint(embedding.num_embeddings, (length,))"
        },
        "vocabulary_start takes the first tokens: it draws them at random": {_MULTINOMIAL: "torch.arange(length)"},
        "vocabulary_start takes a run of neighbours: every token is drawn by itself": {
            _MULTINOMIAL: "torch.randint(embedding.num_embeddings - length, ()) + torch.arange(length)"
        },
        "vocabulary_start draws numbers that look like embeddings: it copies rows of the embedding": {
            _DRAWN: "with torch.no_grad():\n        return embedding(ids) * 0 + embedding.weight.std() * torch.randn(length, embedding.embedding_dim).to(embedding.weight)"
        },
        "text_start has fewer rows than asked for: where the text is too short, it begins again": {
            _CYCLED: "list(token_ids)[:length]"
        },
        "text_start fills up with its last token: where the text is too short, it begins again": {
            _CYCLED: "(list(token_ids) + [token_ids[-1]] * length)[:length]"
        },
        "text_start repeats every token on the spot: the whole text is repeated, in its order": {
            _CYCLED: "sorted(range(length), key=lambda place: place % len(token_ids))",
            "torch.tensor(ids)": "torch.tensor([token_ids[place % len(token_ids)] for place in ids])",
        },
        "text_start keeps the end of the text: it is cut at the end, its first tokens stay": {
            _CYCLED: "(list(token_ids) * length)[-length:]"
        },
        "vocabulary_start hangs on the embedding: detach it": {_DRAWN: "return embedding(ids)"},
        "text_start hangs on the embedding: detach it": {_TEXT: "return embedding(torch.tensor(ids))"},
        "vocabulary_start and text_start hang on the embedding: detach them": {
            _DRAWN: "return embedding(ids)",
            _TEXT: "return embedding(torch.tensor(ids))",
        },
        "the dtype is not the embedding's: a copy keeps it": {
            _DRAWN: "with torch.no_grad():\n        return embedding(ids).double()"
        },
    },
    variants={
        "by index": {
            _NORMAL: "torch.randn((length, hidden))",
            _DRAWN: "return embedding.weight[ids].detach().clone()",
            _TEXT: "return embedding.weight.data[torch.tensor(ids)]",
        },
        "repeat and cut": """
            def random_start(length, hidden):
                return torch.empty(length, hidden).normal_()

            def vocabulary_start(embedding, length):
                ids = torch.randperm(embedding.num_embeddings)[:length]
                return embedding.weight.detach()[ids]

            def text_start(embedding, token_ids, length):
                ids = torch.tensor(token_ids).repeat(math.ceil(length / len(token_ids)))[:length]
                return embedding.weight.index_select(0, ids).detach()
        """,
        "row by row": """
            def random_start(length, hidden):
                return torch.stack([nn.init.normal_(torch.empty(hidden)) for _ in range(length)])

            def vocabulary_start(embedding, length):
                import random

                rows = random.sample(range(embedding.weight.shape[0]), length)
                return torch.stack([embedding.weight[row].detach() for row in rows])

            def text_start(embedding, token_ids, length):
                import itertools

                ids = list(itertools.islice(itertools.cycle(token_ids), length))
                start = torch.empty(length, embedding.embedding_dim, dtype=embedding.weight.dtype)
                for place, token in enumerate(ids):
                    start[place] = embedding.weight[token].detach()
                return start
        """,
    },
)


# ======================================================================================================================
# 4. the loss, over prompt and text
# ======================================================================================================================
def prompted_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross-entropy of the labels, given logits for the positions of prompt and text."""
    length = logits.shape[1] - labels.shape[1]
    losses = []
    for row in range(labels.shape[0]):
        for place in range(labels.shape[1]):
            label = int(labels[row, place])
            if label != IGNORE:
                predicted_by = length + place - 1
                losses.append(-logits[row, predicted_by].float().log_softmax(-1)[label])
    return torch.stack(losses).mean()


def drive_loss(prompted_loss, logits, labels):
    """Return the loss and its gradient with respect to the logits."""
    import torch

    given = labels.clone()
    logits.requires_grad_(True)
    loss = prompted_loss(logits, given)
    if not torch.is_tensor(loss):
        return {"what prompted_loss returns": repr(loss)}
    if loss.requires_grad and loss.numel() == 1:
        loss.backward()
    return {
        "what prompted_loss returns": "a tensor",
        "the shape of the loss": list(loss.shape),
        "the loss is in half precision": loss.dtype in (torch.bfloat16, torch.float16),
        "the loss": loss.detach().float(),
        "the gradient of the logits": logits.grad,
        "the labels are left as they were": torch.equal(given, labels),
    }


def loss_case(generator: torch.Generator, dtype: torch.dtype = torch.float32, ignored: float = 0.4) -> dict:
    """Return logits and labels; the first token of the first row has a label, and rows have different numbers of them."""
    batch, seq, length, vocabulary = 3, between(generator, 7, 9), between(generator, 4, 6), between(generator, 11, 14)
    labels = torch.randint(0, vocabulary, (batch, seq), generator=generator)
    labels[torch.rand(batch, seq, generator=generator) < ignored] = IGNORE
    labels[0, :2] = torch.tensor([2, 0])
    labels[1, : seq - 2], labels[1, seq - 1] = IGNORE, 1
    labels[2, 1:5] = torch.tensor([3, IGNORE, 0, 5])
    return {"logits": 2 * normal(generator, batch, length + seq, vocabulary, dtype=dtype), "labels": labels}


def loss_tolerance(case: dict) -> dict[str, float]:
    """Bound the rounding, in fp32: a log-softmax over V logits has V + 3 roundings of numbers no larger than twice the largest
    logit plus log V, and the mean one more. A gradient, a softmax divided by the number of labels, is rounded once more to its
    dtype.
    """
    logits, labels = case["logits"], case["labels"]
    vocabulary, counted = logits.shape[-1], (labels != IGNORE).sum().item()
    unit = (vocabulary + counted + 6) * torch.finfo(torch.float32).eps
    return {
        "the loss": unit * (2 * logits.abs().max().item() + math.log(vocabulary)),
        "the gradient of the logits": (unit + torch.finfo(logits.dtype).eps) / counted,
    }


_COUNTED = "if label != IGNORE:"
_LENGTH = "length = logits.shape[1] - labels.shape[1]"
_PLACE = "length + place - 1"
_LOGITS = "logits[row, predicted_by].float()"
_MEAN = "torch.stack(losses).mean()"

check_prompted_loss = Exercise(
    spec=[prompted_loss],
    driver=drive_loss,
    cases=lambda generator: [loss_case(generator), loss_case(generator, torch.bfloat16)],
    tolerance=loss_tolerance,
    mistakes={
        "each position is compared with its own token: it predicts the next one": {_PLACE: "length + place"},
        "the labels are shifted once too often: the token at t is predicted at t - 1": {_PLACE: "length + place - 2"},
        "the labels are shifted once too often, by the cut and again for the loss: the token at t is predicted at t - 1": {
            _PLACE: "length + place - 2",
            _COUNTED: "if label != IGNORE and place > 0:",
        },
        "the labels are held against the first positions, where the prompt stands: the text's come after these": {
            _PLACE: "place - 1",
            _COUNTED: "if label != IGNORE and place > 0:",
        },
        "the shift goes the wrong way: the token at t is predicted at t - 1, not at t + 1": {
            _PLACE: "min(length + place + 1, logits.shape[1] - 1)"
        },
        "the first token of the text is not counted: the last position of the prompt predicts it": {
            _COUNTED: "if label != IGNORE and place > 0:"
        },
        "the prompt's positions count, with token 0 for a label: extend the labels by IGNORE": {
            "losses = []": "losses = [-logits[row, place].float().log_softmax(-1)[0] for row in range(len(labels)) for place in range(length - 1)]"
        },
        "the mean is taken over all positions: only those with a label count": {
            _MEAN: "torch.stack(losses).sum() / labels.numel()"
        },
        "the mean is taken over the rows' means: every label counts the same, whatever its row": {
            _MEAN: "torch.stack([part.mean() for part in torch.stack(losses).split((labels != IGNORE).sum(1).tolist())]).mean()"
        },
        "the losses are summed: it is their mean": {_MEAN: "torch.stack(losses).sum()"},
        "label 0 is ignored: it is a token as any other, and what is ignored is IGNORE": {
            _COUNTED: "if label not in (IGNORE, 0):"
        },
        "IGNORE is taken for a token: where it stands, nothing is counted": {_COUNTED: "if True:"},
        "the loss is computed in half precision: make the logits fp32 first": {_LOGITS: "logits[row, predicted_by]"},
        "the labels were changed in place: others need them as well": {
            _MEAN: _MEAN + " + 0 * labels.fill_(IGNORE).float().mean()"
        },
    },
    variants={
        "labels extended, as peft does": """
            def prompted_loss(logits, labels):
                length = logits.shape[1] - labels.shape[1]
                extended = torch.cat([labels.new_full((labels.shape[0], length), IGNORE), labels], dim=1)
                shifted = logits[:, :-1].float().flatten(0, 1), extended[:, 1:].flatten()
                return nn.functional.cross_entropy(*shifted, ignore_index=IGNORE)
        """,
        "logits cut": """
            def prompted_loss(logits, labels):
                predicting = logits[:, -labels.shape[1] - 1 : -1].float()
                return nn.functional.cross_entropy(predicting.transpose(1, 2), labels)
        """,
        "gathered": """
            def prompted_loss(logits, labels):
                counted = labels != IGNORE
                log_p = logits.float().log_softmax(-1).narrow(1, logits.shape[1] - labels.shape[1] - 1, labels.shape[1])
                return -log_p[counted].gather(1, labels[counted][:, None]).mean()
        """,
        "in double precision": {_LOGITS: "logits[row, predicted_by].double()"},
    },
)


# ======================================================================================================================
# 5. MixedPrompts: a batch of several tasks
# ======================================================================================================================
class MixedPrompts(nn.Module):
    """One frozen model and several tasks' prompts, of different lengths; every row is read with its own task's."""

    def __init__(self, base: LlamaModel, prompts: Sequence[Tensor]):
        super().__init__()
        self.base = base
        self.base.requires_grad_(False)
        self.soft_prompts = nn.ParameterList([nn.Parameter(prompt.detach().clone()) for prompt in prompts])

    def forward(self, input_ids: Tensor, task_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return the hidden states of the text: every row is hidden padding, its own prompt and its text."""
        text = self.base.embed_tokens(input_ids)
        longest = max(len(prompt) for prompt in self.soft_prompts)
        sequences, masks, positions = [], [], []
        for row in range(text.shape[0]):
            prompt = self.soft_prompts[int(task_ids[row])]
            missing = text.new_zeros(longest - len(prompt), text.shape[2])
            sequences.append(torch.cat([missing, prompt.to(text.dtype), text[row]]))
            own = [1] * text.shape[1] if attention_mask is None else attention_mask[row].tolist()
            masks.append([0] * len(missing) + [1] * len(prompt) + own)
            positions.append([sum(masks[-1][: place + 1]) - 1 for place in range(longest + len(own))])
        hidden = self.base.decode(torch.stack(sequences), torch.tensor(masks), torch.tensor(positions))
        return hidden[:, longest:]


def drive_mixed(MixedPrompts, sizes, weights, prompts, lengths, input_ids, task_ids, attention_mask, output_gradient, exact):
    """Run a batch of several tasks through a small LLaMA; return the text's hidden states, and the prompts' gradients.

    Where the case is exact, the base is as in `drive_prompted`.
    """
    import torch
    from torch import nn

    from peftlab.llama import LlamaConfig, LlamaModel, causal_mask

    runs = []

    class Counted(LlamaModel):
        def decode(self, x, attention_mask=None, positions=None):
            runs.append(len(x))
            if not exact:
                return super().decode(x, attention_mask, positions)
            batch, seq, _ = x.shape
            positions = (torch.arange(seq) if positions is None else positions).expand(batch, seq)
            looked_at = causal_mask(torch.ones(batch, seq) if attention_mask is None else attention_mask)[:, 0]
            distance = 1 + positions[:, :, None] - positions[:, None, :]
            return ((looked_at * distance).double() @ x.double() * self.norm.weight.double()).to(x.dtype)

    base = Counted(LlamaConfig(*sizes))
    nn.utils.vector_to_parameters(weights, base.parameters())
    starts = [prompt.clone() for prompt in prompts.split(lengths)]
    model = MixedPrompts(base, starts)
    with torch.no_grad():
        for start in starts:
            start.zero_()
    owned = {id(parameter) for parameter in model.parameters()}
    seen = {
        "the list of the prompts' shapes": [list(prompt.shape) for prompt in model.soft_prompts],
        "all prompts are parameters of the model": all(id(prompt) in owned for prompt in model.soft_prompts),
        "the prompts after what they were copied from has changed": torch.cat([p.detach().clone() for p in model.soft_prompts]),
        "the base asks for a gradient": any(parameter.requires_grad for parameter in base.parameters()),
    }
    hidden = model(input_ids, task_ids, attention_mask)
    if not torch.is_tensor(hidden):
        return seen | {"what forward returns": repr(hidden)}
    seen |= {"what forward returns": "a tensor", "hidden": hidden.detach()}
    if hidden.requires_grad and hidden.shape == output_gradient.shape:
        hidden.backward(output_gradient)
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.soft_prompts]
    return seen | {"gradients": gradients, "runs": len(runs)}


def read_mixed(observation: Observation, case: dict) -> Observation:
    """Keep the hidden states of the text."""
    read = {name: value for name, value in observation.items() if name not in ("hidden", "gradients", "runs")}
    if "hidden" not in observation:
        return read
    mask, hidden = case["attention_mask"], observation["hidden"]
    kept = torch.ones_like(case["input_ids"]).bool() if mask is None else mask.bool()
    read["the shape of the hidden states"] = list(hidden.shape)
    if list(hidden.shape) != list(case["output_gradient"].shape):
        return read
    gradients = {f"the gradient of prompt {task}": gradient for task, gradient in enumerate(observation["gradients"])}
    read["the hidden states of the text"] = hidden.masked_fill(~kept[..., None], 0)
    return read | gradients | {"how often the base runs": observation["runs"]}


def mixed_case(generator: torch.Generator, side: str = "none", layers: int = 1) -> dict:
    """Return a model, three prompts of different lengths, and four rows: two of one task, and one task that none asks for."""
    case = prompted_case(generator, side, layers)
    lengths = [(3, 5, 4)[place] for place in torch.randperm(3, generator=generator)]
    first, second, _ = torch.randperm(3, generator=generator).tolist()
    kept = ("sizes", "weights", "input_ids", "attention_mask", "output_gradient", "exact")
    return {name: case[name] for name in kept} | {
        "prompts": normal(generator, sum(lengths), case["sizes"][1]),
        "lengths": lengths,
        "task_ids": torch.tensor([first, second, first, second][: len(case["input_ids"])]),
    }


def exact_mixed_case(
    generator: torch.Generator, side: str, dtype: torch.dtype, prompt_dtype: torch.dtype = torch.float32
) -> dict:
    """Return a case of small whole numbers for the exact model and the prompts, as `exact_case` does."""
    case, numbers = mixed_case(generator, side), exact_case(generator, side, dtype)
    prompts = torch.randint(-4, 5, case["prompts"].shape, generator=generator).to(prompt_dtype)
    return case | {name: numbers[name] for name in case.keys() & numbers.keys()} | {"prompts": prompts}


_OWN_PROMPT = "self.soft_prompts[int(task_ids[row])]"
_LIST = "nn.ParameterList([nn.Parameter(prompt.detach().clone()) for prompt in prompts])"
_LONGEST = "max(len(prompt) for prompt in self.soft_prompts)"
_ROW = "torch.cat([missing, prompt.to(text.dtype), text[row]])"
_BEHIND = "torch.cat([prompt.to(text.dtype), missing, text[row]])"
_ROW_MASK = "[0] * len(missing) + [1] * len(prompt) + own"
_MASK_BEHIND = "[1] * len(prompt) + [0] * len(missing) + own"
_ROW_POSITIONS = "[sum(masks[-1][: place + 1]) - 1 for place in range(longest + len(own))]"
_MIXED_CUT = "hidden[:, longest:]"

_MIXED_BATCH = """
class MixedPrompts(nn.Module):
    def __init__(self, base, prompts):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.soft_prompts = nn.ParameterList([nn.Parameter(prompt.clone()) for prompt in prompts])

    def forward(self, input_ids, task_ids, attention_mask=None):
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        longest = max(len(prompt) for prompt in self.soft_prompts)
        padded = [nn.functional.pad(prompt, (0, 0, longest - len(prompt), 0)) for prompt in self.soft_prompts]
        used = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in self.soft_prompts]
        mask = torch.cat([torch.tensor(used)[task_ids], attention_mask], 1)
        text = self.base.embed_tokens(input_ids)
        x = torch.cat([torch.stack(padded).to(text.dtype)[task_ids], text], 1)
        positions = mask.cumsum(1) - 1
        return self.base.decode(x, mask, positions)[:, longest:]
"""

check_mixed_prompts = Exercise(
    spec=[MixedPrompts],
    driver=drive_mixed,
    reading=read_mixed,
    cases=lambda generator: [
        mixed_case(generator),
        mixed_case(generator, "each"),
        exact_mixed_case(generator, "each", torch.bfloat16),
    ],
    # As for PromptedModel: ten times the rounding that was measured there.
    tolerance=lambda case: (
        {}
        if case["exact"]
        else {
            "the hidden states of the text": 1e-5,
            **{f"the gradient of prompt {task}": 3e-5 for task in range(3)},
        }
    ),
    mistakes={
        "all rows are read with the first row's prompt: look the prompt up for every row": {
            _OWN_PROMPT: "self.soft_prompts[int(task_ids[0])]"
        },
        "the prompt is chosen by the row's number: `task_ids` says which one it is": {
            _OWN_PROMPT: "self.soft_prompts[row % len(self.soft_prompts)]"
        },
        "every row is read with all prompts one after the other: it needs its own alone": {
            _OWN_PROMPT: "torch.cat(list(self.soft_prompts))",
            _LONGEST: "sum(len(prompt) for prompt in self.soft_prompts)",
        },
        "the longer prompts are cut to the shortest: pad the shorter ones instead": {
            _OWN_PROMPT: _OWN_PROMPT + "[:longest]",
            _LONGEST: "min(len(prompt) for prompt in self.soft_prompts)",
        },
        "the zeros that pad a shorter prompt are seen by the text: the attention mask must hide them": {
            _ROW_MASK: "[1] * longest + own"
        },
        "the zeros behind a shorter prompt are seen by the text: the attention mask must hide them": {
            _ROW: _BEHIND,
            _ROW_MASK: "[1] * longest + own",
        },
        "a shorter prompt's zeros stand in front of it, and those of its mask behind: they belong on the same side": {
            _ROW_MASK: _MASK_BEHIND
        },
        "a shorter prompt's zeros stand behind it, and those of its mask in front: they belong on the same side": {
            _ROW: _BEHIND
        },
        "padding between prompt and text counts as distance: the text's positions must follow the prompt's without a gap": {
            _ROW_POSITIONS: "list(range(longest + len(own)))"
        },
        "padding behind a shorter prompt counts as distance: the text's positions must follow the prompt's without a gap": {
            _ROW: _BEHIND,
            _ROW_MASK: _MASK_BEHIND,
            _ROW_POSITIONS: "list(range(longest + len(own)))",
        },
        "the hidden states of the prompt are cut off by its own length: what is cut is the longest, padding included": {
            _MIXED_CUT: "hidden[:, min(len(prompt) for prompt in self.soft_prompts) :][:, : text.shape[1]]"
        },
        "the rows come back sorted by task: they must stay where they were": {
            _MIXED_CUT: "hidden[task_ids.argsort(stable=True), longest:]"
        },
        "the base is not frozen: only prompts may learn": {_FREEZE: "pass"},
        "the prompts are in a plain list, where no optimizer finds them: use an nn.ParameterList": {
            _LIST: "[nn.Parameter(prompt.detach().clone()) for prompt in prompts]"
        },
        "the prompts are the tensors that were given: copy them": {
            _LIST: "nn.ParameterList([nn.Parameter(prompt.detach()) for prompt in prompts])"
        },
        "the prompts are stored in the base's dtype: each keeps that in which it was given": {
            _LIST: _LIST.replace("clone()", "clone().to(base.embed_tokens.weight.dtype)")
        },
        "the prompts are not converted to the embeddings' dtype in `forward`: a base in bf16 is given fp32": {
            _ROW: "torch.cat([missing, prompt, text[row]])"
        },
        "the text sees padding: the text's own attention mask is lost": {
            "[1] * text.shape[1] if attention_mask is None else attention_mask[row].tolist()": "[1] * text.shape[1]"
        },
        "the base is run once for each row: pad the prompts to one length and run it once": """
            class MixedPrompts(nn.Module):
                def __init__(self, base, prompts):
                    super().__init__()
                    self.base = base.requires_grad_(False)
                    self.soft_prompts = nn.ParameterList([nn.Parameter(prompt.detach().clone()) for prompt in prompts])

                def forward(self, input_ids, task_ids, attention_mask=None):
                    outputs = []
                    for row, ids in enumerate(input_ids):
                        kept = torch.ones_like(ids).bool() if attention_mask is None else attention_mask[row].bool()
                        prompt = self.soft_prompts[int(task_ids[row])]
                        text = self.base.embed_tokens(ids[kept])
                        hidden = self.base.decode(torch.cat([prompt.to(text.dtype), text])[None])[0]
                        output = hidden.new_zeros(len(ids), hidden.shape[1])
                        output[kept] = hidden[len(prompt) :]
                        outputs.append(output)
                    return torch.stack(outputs)
        """,
        "the base is run once for each task: pad the prompts to one length and run it once": """
            class MixedPrompts(nn.Module):
                def __init__(self, base, prompts):
                    super().__init__()
                    self.base = base.requires_grad_(False)
                    self.soft_prompts = nn.ParameterList(nn.Parameter(torch.clone(prompt)) for prompt in prompts)

                def forward(self, input_ids, task_ids, attention_mask=None):
                    text = self.base.embed_tokens(input_ids)
                    output = torch.zeros_like(text)
                    for task, prompt in enumerate(self.soft_prompts):
                        rows = (task_ids == task).nonzero().flatten()
                        if len(rows) == 0:
                            continue
                        x = torch.cat([prompt.to(text).expand(len(rows), -1, -1), text[rows]], 1)
                        mask = input_ids.new_ones(x.shape[:2])
                        if attention_mask is not None:
                            mask[:, len(prompt) :] = attention_mask[rows]
                        output[rows] = self.base.decode(x, mask, mask.cumsum(1) - 1)[:, len(prompt) :]
                    return output
        """,
    },
    variants={
        "the batch at once, padded on the left": _MIXED_BATCH,
        "the batch at once, padded on the right": """
            class MixedPrompts(nn.Module):
                def __init__(self, base, prompts):
                    super().__init__()
                    for parameter in base.parameters():
                        parameter.requires_grad_(False)
                    self.base = base
                    self.soft_prompts = nn.ParameterList(nn.Parameter(torch.clone(prompt)) for prompt in prompts)

                def forward(self, input_ids, task_ids, attention_mask=None):
                    padded = nn.utils.rnn.pad_sequence(list(self.soft_prompts), batch_first=True)
                    lengths = torch.tensor([len(prompt) for prompt in self.soft_prompts])
                    used = torch.arange(padded.shape[1]) < lengths[task_ids][:, None]
                    text = self.base.embed_tokens(input_ids)
                    kept = torch.ones_like(input_ids) if attention_mask is None else attention_mask
                    mask = torch.cat([used.to(kept.dtype), kept], 1)
                    x = torch.cat([padded[task_ids].to(text.dtype), text], 1)
                    return self.base.decode(x, mask, mask.cumsum(1))[:, -text.shape[1] :]
        """,
        "row by row, padded to the longest in the batch": """
            class MixedPrompts(nn.Module):
                def __init__(self, base, prompts):
                    super().__init__()
                    self.base = base.requires_grad_(False)
                    self.soft_prompts = nn.ParameterList(nn.Parameter(prompt.detach().clone()) for prompt in prompts)

                def forward(self, input_ids, task_ids, attention_mask=None):
                    text = self.base.embed_tokens(input_ids)
                    batch, seq, hidden = text.shape
                    chosen = [self.soft_prompts[task] for task in task_ids.tolist()]
                    longest = max(map(len, chosen))
                    x, mask = text.new_zeros(batch, longest + seq, hidden), input_ids.new_zeros(batch, longest + seq)
                    for row, prompt in enumerate(chosen):
                        x[row, longest - len(prompt) : longest] = prompt.to(text.dtype)
                        mask[row, longest - len(prompt) : longest] = 1
                    x[:, longest:] = text
                    mask[:, longest:] = 1 if attention_mask is None else attention_mask
                    return self.base.decode(x, mask, positions=(mask.cumsum(-1) - 1).clamp(min=0))[:, longest:]
        """,
    },
)


# ======================================================================================================================
# 6. the prompt's file
# ======================================================================================================================
def save_prompt(prompted: nn.Module, path: str | Path) -> None:
    """Write the soft prompt, and nothing else, to a safetensors file."""
    from safetensors.torch import save_file

    save_file({"soft_prompt": prompted.soft_prompt.detach().contiguous()}, path)


@torch.no_grad()
def load_prompt(prompted: nn.Module, path: str | Path) -> None:
    """Copy the file's soft prompt into the model's own, in place; both must have the same shape."""
    from safetensors.torch import load_file

    saved = load_file(path)
    if list(saved) != ["soft_prompt"]:
        raise ValueError(f"{path} should hold soft_prompt alone, and holds {sorted(saved)}")
    if saved["soft_prompt"].shape != prompted.soft_prompt.shape:
        raise ValueError(f"{path} does not fit: {saved['soft_prompt'].shape}, not {prompted.soft_prompt.shape}")
    prompted.soft_prompt.copy_(saved["soft_prompt"])


def drive_prompt_files(save_prompt, load_prompt, prompt, other, base, misfits):
    """Save one model's prompt, load it into another that an optimizer holds already, and try what does not fit."""
    import json
    import os
    import struct
    import tempfile
    import warnings

    import torch
    from torch import nn

    class Prompted(nn.Module):
        def __init__(self, start):
            super().__init__()
            self.base = nn.Linear(*reversed(base.shape), bias=False, dtype=base.dtype).requires_grad_(False)
            self.base.weight.copy_(base)
            self.soft_prompt = nn.Parameter(start.clone())

    def write(path, tensors):
        """Write a safetensors file by hand."""
        header, content = {}, b""
        for name, tensor in tensors.items():
            start, content = len(content), content + tensor.numpy().tobytes()
            dtype = {torch.float32: "F32", torch.float16: "F16"}[tensor.dtype]
            header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, len(content)]}
        encoded = json.dumps(header).encode()
        with open(path, "wb") as file:
            file.write(struct.pack("<Q", len(encoded)) + encoded + content)

    warnings.simplefilter("ignore")  # a slower way to save is still a way to save
    target, from_half, refused, untouched = Prompted(other), Prompted(other), [], []
    held, place = target.soft_prompt, target.soft_prompt.data_ptr()
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "prompt.safetensors")
        save_prompt(Prompted(prompt), path)
        with open(path, "rb") as file:
            content = torch.frombuffer(bytearray(file.read()) or bytearray(1), dtype=torch.uint8).clone()
        try:
            load_prompt(target, path)
            loading = "nothing"
        except Exception as error:
            loading = f"{type(error).__name__}: {error}"
        path = os.path.join(folder, "half.safetensors")
        write(path, {"soft_prompt": prompt.half()})
        try:
            load_prompt(from_half, path)
            loading_half = "nothing"
        except Exception as error:
            loading_half = f"{type(error).__name__}: {error}"
        for number, shapes in enumerate(misfits):
            path = os.path.join(folder, f"{number}.safetensors")
            write(path, {name: torch.ones(shape) for name, shape in shapes.items()})
            model = Prompted(other)
            try:
                load_prompt(model, path)
                refused.append("nothing")
            except Exception as error:
                refused.append(type(error).__name__)
            same = torch.is_tensor(model.soft_prompt) and torch.equal(model.soft_prompt, other)
            untouched.append(same and torch.equal(model.base.weight, base))
    return {
        "file": content,
        "loading": loading,
        "loaded": target.soft_prompt.detach(),
        "held": held.detach(),
        "moved": target.soft_prompt.data_ptr() != place,
        "loading half": loading_half,
        "loaded from half": from_half.soft_prompt.detach(),
        "base": target.base.weight.detach(),
        "trainable": [name for name, p in target.named_parameters() if p.requires_grad],
        "refused": refused,
        "untouched": untouched,
    }


def read_prompt_files(observation: Observation, case: dict) -> Observation:
    """Read the file, as bytes, without the student's help."""
    names, tensors, size = read_safetensors(observation["file"])
    return {
        "the list of names in the file": names,
        "bytes of the file": size,
        **{f"{name} in the file": tensor for name, tensor in tensors.items()},
        "the error when loading what was saved": observation["loading"],
        "soft_prompt after loading": observation["loaded"],
        "the optimizer's own parameter after loading": observation["held"],
        "soft_prompt lies elsewhere in memory after loading": observation["moved"],
        "the error when loading a file in fp16": observation["loading half"],
        "soft_prompt after loading a file in fp16": observation["loaded from half"],
        "the base after loading": observation["base"],
        "the list of trainable parameters after loading": observation["trainable"],
        **{f"the error for {kind}": error for kind, error in zip(_MISFITS, observation["refused"], strict=True)},
        "the list of refused files that have changed the model": [
            kind for kind, untouched in zip(_MISFITS, observation["untouched"], strict=True) if not untouched
        ],
    }


_MISFITS = (
    "a prompt of another width",
    "a longer prompt",
    "a prompt of one vector",
    "a transposed prompt",
    "a file that holds something else",
    "a file that holds something else beside the prompt",
)


def files_case(generator: torch.Generator, dtype: torch.dtype = torch.float32) -> dict:
    """Return two prompts of one shape, a base, and the files that do not fit, as shapes by name."""
    length, hidden = between(generator, 5, 7), between(generator, 9, 12)
    misfits = [
        {"soft_prompt": [length, hidden + 1]},
        {"soft_prompt": [length + 2, hidden]},
        {"soft_prompt": [1, hidden]},  # which `copy_` would broadcast
        {"soft_prompt": [hidden, length]},
        {"lora_A": [length, hidden]},
        {"lora_A": [length, hidden], "soft_prompt": [length, hidden]},
    ]
    return {
        "prompt": normal(generator, length, hidden, dtype=dtype),
        "other": normal(generator, length, hidden, dtype=dtype),
        "base": normal(generator, 23, hidden, dtype=dtype),
        "misfits": misfits,
    }


_FILE = '{"soft_prompt": prompted.soft_prompt.detach().contiguous()}'
_COPIED = 'prompted.soft_prompt.copy_(saved["soft_prompt"])'
_NAMES = 'if list(saved) != ["soft_prompt"]:'
_SHAPES = 'if saved["soft_prompt"].shape != prompted.soft_prompt.shape:'

check_prompt_files = Exercise(
    spec=[save_prompt, load_prompt],
    driver=drive_prompt_files,
    reading=read_prompt_files,
    cases=lambda generator: [files_case(generator)],
    # Metadata may take some room in the header; the base, with 23 rows of the prompt's width, may not.
    tolerance=lambda case: {"bytes of the file": 256},
    at_most=frozenset({"bytes of the file"}),
    mistakes={
        "the file holds the base as well: what was learned is the prompt alone": {
            _FILE: "{name: tensor.contiguous() for name, tensor in prompted.state_dict().items()}",
            _NAMES: 'if set(saved) not in ({"soft_prompt"}, {"soft_prompt", "base.weight"}):',
        },
        "the file is a pickle: write safetensors, which cannot run code when it is opened": {
            "from safetensors.torch import save_file": "save_file = torch.save",
            "from safetensors.torch import load_file": "load_file = torch.load",
        },
        "the prompt has another name in the file: it is called soft_prompt, as in the model": {
            _FILE: _FILE.replace('"soft_prompt"', '"prompt"'),
            "saved = load_file(path)": 'saved = {"soft_prompt": load_file(path).get("prompt", torch.zeros(0))}',
        },
        "the prompt is rounded to bf16 in the file: save it as it is": {".contiguous()": ".contiguous().bfloat16()"},
        "loading made a new parameter, and an optimizer would go on training the old one: copy into it": {
            _COPIED: 'prompted.soft_prompt = nn.Parameter(saved["soft_prompt"])'
        },
        "loading puts the file's tensor in the parameter's place, with its dtype and device: copy into it, `copy_`": {
            _COPIED: 'prompted.soft_prompt.data = saved["soft_prompt"]'
        },
        "loading changed a copy of the prompt: the model is as it was": {
            _COPIED: 'prompted.soft_prompt.clone().copy_(saved["soft_prompt"])'
        },
        "the prompt is frozen after loading: training could not go on": {
            _COPIED: _COPIED + "\n    prompted.requires_grad_(False)"
        },
        "a prompt of one vector is taken for a whole one: `copy_` repeats it, so compare the shapes first": {
            _SHAPES: 'if saved["soft_prompt"].shape[0] not in (1, prompted.soft_prompt.shape[0]) or saved["soft_prompt"].shape[1] != prompted.soft_prompt.shape[1]:'
        },
        "a prompt that does not fit is refused by torch, not by you: compare the shapes and raise a ValueError": {
            _SHAPES: "if False:"
        },
        "a longer prompt is cut to fit: raise a ValueError": {
            _SHAPES: 'if saved["soft_prompt"].shape[1] != prompted.soft_prompt.shape[1] or len(saved["soft_prompt"]) < len(prompted.soft_prompt):',
            _COPIED: 'prompted.soft_prompt.copy_(saved["soft_prompt"][: len(prompted.soft_prompt)])',
        },
        "a file that holds something else is loaded as a prompt, whatever its name: compare the names": {
            "saved = load_file(path)": 'saved = {"soft_prompt": next(iter(load_file(path).values()))}',
        },
        "a file that holds more than the prompt is not refused: compare the whole list of names": {
            _NAMES: 'if "soft_prompt" not in saved:',
        },
        "a refused file has changed the prompt already: compare before you copy": {
            _SHAPES: "prompted.soft_prompt.zero_()\n    " + _SHAPES,
        },
        "a refused file, one with a second tensor, has changed the prompt already: compare names as well before you copy": {
            _NAMES: (
                'if "soft_prompt" in saved and saved["soft_prompt"].shape == prompted.soft_prompt.shape:\n'
                f"        {_COPIED}\n    {_NAMES}"
            ),
        },
    },
    variants={
        "through .data": {_COPIED: 'prompted.soft_prompt.data[:] = saved["soft_prompt"]'},
        "load_state_dict": {
            _COPIED: "missing, unexpected = prompted.load_state_dict(saved, strict=False)\n    assert not unexpected",
        },
        "with open, and bytes": """
            def save_prompt(prompted, path):
                from safetensors.torch import save

                with open(path, "wb") as file:
                    file.write(save({"soft_prompt": prompted.state_dict()["soft_prompt"]}))

            def load_prompt(prompted, path):
                from safetensors import safe_open

                with safe_open(path, "pt") as file:
                    if set(file.keys()) != {"soft_prompt"}:
                        raise ValueError(list(file.keys()))
                    tensor = file.get_tensor("soft_prompt")
                if tensor.size() != prompted.soft_prompt.size():
                    raise ValueError(tensor.size())
                with torch.no_grad():
                    prompted.soft_prompt.zero_().add_(tensor)
        """,
    },
)


# ======================================================================================================================
# 7. bug hunt: metrics that never move
# ======================================================================================================================
def diagnose(prompted: nn.Module, optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor], steps: int) -> str:
    """Say why training would leave `prompted.soft_prompt` where it is, or that it learns; leave no gradient behind."""
    parameters = [*prompted.parameters(), *(held for group in optimizer.param_groups for held in group["params"])]
    for parameter in parameters:
        parameter.grad = None
    value = loss()
    if value.requires_grad:
        value.backward()
    gradient = prompted.soft_prompt.grad
    for parameter in parameters:
        parameter.grad = None
    if gradient is None or not gradient.abs().sum() > 0:
        return "no gradient"
    for group in optimizer.param_groups:
        for held in group["params"]:
            if held is prompted.soft_prompt:
                size = prompted.soft_prompt.detach().pow(2).mean().sqrt()
                return "too slow" if group["lr"] * steps < size / 10 else "learns"
    return "not in the optimizer"


def drive_diagnose(diagnose, prompt, head, x, situations):
    """Set up training runs, some of which cannot work, and return what is said of each."""
    import torch
    from torch import nn

    class Prompted(nn.Module):
        def __init__(self):
            super().__init__()
            self.soft_prompt = nn.Parameter(prompt.clone())

        def forward(self, used):
            return used.sum(0) + x

    seen = {}
    for situation, rate, other_rate, steps, head_first, head_frozen in situations:
        model, own_head = (
            Prompted(),
            nn.Parameter(head.clone(), requires_grad=not head_frozen),
        )  # the head is outside, as lm_head is
        held = model.soft_prompt
        if "replaced" in situation:
            model.soft_prompt = nn.Parameter(held.detach().clone())
        if "frozen" in situation:
            model.soft_prompt.requires_grad_(False)
        groups = [{"params": [held], "lr": rate}, {"params": [own_head], "lr": other_rate}]
        groups = groups[1:] if "the head alone" in situation else groups
        # With so small an eps AdamW takes the same steps for tiny gradients as for large ones.
        optimizer = torch.optim.AdamW(groups[::-1] if head_first else groups, lr=other_rate, weight_decay=0.1, eps=1e-20)
        if "left over" in situation:
            model.soft_prompt.grad = torch.ones_like(model.soft_prompt)
        calls = []
        before = [
            parameter.grad if parameter.grad is None else parameter.grad.clone() for parameter in (model.soft_prompt, own_head)
        ]

        def loss(model=model, own_head=own_head, situation=situation, calls=calls):
            calls.append(situation)
            if "cancel" in situation:
                return (model.soft_prompt[0] - model.soft_prompt[1]).sum()
            prompt = model.soft_prompt.data if ".data" in situation else model.soft_prompt
            value = (own_head @ model(prompt * 0 if "zero" in situation else prompt)).pow(2).sum()
            value = 1e-12 * value if "tiny" in situation else value
            return -value if "second" in situation else value

        answer = diagnose(model, optimizer, loss, steps)
        label = f"{situation} (learning rate {rate:.2g}, {steps} steps)"
        seen[f"the diagnosis of {label}"] = answer if isinstance(answer, str) else repr(answer)
        left = [
            parameter.grad is not None and parameter.grad.any() and (old is None or not torch.equal(parameter.grad, old))
            for parameter, old in zip((model.soft_prompt, own_head), before)
        ]
        seen[f"gradients are left behind by {label}"] = any(left)
        moved = not torch.equal(model.soft_prompt.detach(), prompt) or not torch.equal(own_head.detach(), head)
        seen[f"weights have changed in {label}"] = moved
        seen[f"the loss was computed in {label}"] = bool(calls)
    return seen


_REACHES = (80, 15, 9.6, 5.8, 4.2, 2.85, 1.6, 1.06, 0.3, 0.6, 0.85, 0.95)
"""How far runs reach, where 1 is just enough, so that every wrong size and share is wrong in other runs.

With 45 to 84 entries, 9 to 12 a row, of the numbers below, it takes: by a mean 0.45, a mean absolute value 0.80, a standard deviation 0.90,
the mean square 1.12 (where the scale is 1), the largest entry 2.5 to 2.7, a row's norm 2.9 to 3.5, half of the size 5, the norm 6.7 to 9.2, the whole
size 10, a hundredth 0.1, without the steps 30 to 60, and with the tenth on the wrong side 100.
"""


def diagnose_case(generator: torch.Generator, scale: float = 1.0) -> dict:
    """Return a prompt, a head, and situations: both learning rates, the steps, and how optimizer and head were set up.

    The prompt's numbers are those of a normal distribution with mean 0.5 and standard deviation 1, times the scale, evenly drawn, in
    random order: a wrong size is then off by the same factor in every case.
    """
    length, hidden, steps = between(generator, 5, 7), between(generator, 9, 12), between(generator, 30, 60)
    drawn = torch.special.ndtri((torch.arange(length * hidden) + 0.5) / (length * hidden))
    prompt = scale * (drawn / drawn.std() + 0.5)[torch.randperm(length * hidden, generator=generator)].view(length, hidden)
    needed = prompt.pow(2).mean().sqrt().item() / 10
    enough = 1.1 * needed / steps
    data = "a forward that uses soft_prompt.data"
    situations = [
        *(
            (
                f"a run that reaches {reach:g} times what is enough",
                reach * needed / steps,
                reach * needed / steps,
                steps,
                False,
                False,
            )
            for reach in _REACHES
        ),
        ("a run that is all right", enough, enough / 50, steps, True, False),
        ("a second run that is all right", enough, 50 * enough, steps, False, True),
        ("a run of one step", 1.1 * needed, enough, 1, False, False),
        ("a run whose gradients are tiny", enough, enough, steps, False, False),
        ("a run whose gradients cancel in their sum", enough, enough, steps, False, False),
        ("a slow run", 0.9 * needed / steps, 50 * enough, steps, True, False),
        (data, enough, enough, steps, True, False),
        (f"{data}, with an old gradient left over", enough, enough, steps, True, False),
        (f"{data} before a frozen head", enough, enough, steps, False, True),
        (f"{data}, and an optimizer that holds the head alone", enough, enough, steps, False, False),
        (
            f"{data}, and an optimizer that holds the head alone, with an old gradient left over",
            enough,
            enough,
            steps,
            False,
            False,
        ),
        (f"a slow run: {data}", 0.7 * needed / steps, enough, steps, False, False),
        ("a forward that multiplies the prompt by zero", enough, enough, steps, True, False),
        ("a prompt that is frozen", enough, enough, steps, False, False),
        ("a prompt that was replaced after the optimizer was made", enough, enough, steps, False, False),
        ("an optimizer that holds the head alone", enough, enough, steps, False, False),
    ]
    return {
        "prompt": prompt,
        "head": normal(generator, between(generator, 3, 4), hidden) / 4,
        "x": normal(generator, hidden),
        "situations": situations,
    }


_CLEAR = "    for parameter in parameters:\n        parameter.grad = None\n    value"
_CLEAR_AFTER = "gradient = prompted.soft_prompt.grad\n    for parameter in parameters:\n        parameter.grad = None\n"
_NO_GRADIENT = "gradient is None or not gradient.abs().sum() > 0"
_IS_HELD = "if held is prompted.soft_prompt:"
_SIZE = "prompted.soft_prompt.detach().pow(2).mean().sqrt()"
_REACH = 'group["lr"] * steps < size / 10'

check_diagnose = Exercise(
    spec=[diagnose],
    driver=drive_diagnose,
    cases=lambda generator: [diagnose_case(generator)],
    mistakes={
        "a gradient that an earlier step left behind is taken for this loss's: clear the gradients first": {
            _CLEAR: "    value"
        },
        "a gradient of zeros is taken for one: a prompt that the mask hides gets zeros, not None": {
            _NO_GRADIENT: "gradient is None"
        },
        "only the optimizer's gradients are cleared first: where it does not hold the prompt, an old one stays": {
            _CLEAR: "    optimizer.zero_grad()\n    value"
        },
        "a small gradient is taken for none: AdamW divides by its size, only None and exact zeros count": {
            _NO_GRADIENT: "gradient is None or gradient.norm() < 1e-6"
        },
        "the sum of the gradient is asked, in which positive and negative numbers cancel: ask whether any is not zero": {
            _NO_GRADIENT: "gradient is None or gradient.sum() == 0"
        },
        "`requires_grad` is asked instead of backward: a prompt may require a gradient and get none": {
            _NO_GRADIENT: "not prompted.soft_prompt.requires_grad"
        },
        'a loss that depends on nothing trainable makes backward fail: ask its `requires_grad` first, and say "no gradient"': {
            "if value.requires_grad:": "if True:"
        },
        "a tensor with the prompt's numbers is taken for the prompt: compare with `is`, an optimizer holds objects": {
            _IS_HELD: "if held.shape == prompted.soft_prompt.shape and torch.equal(held, prompted.soft_prompt):"
        },
        "`in` compares tensors by their numbers, and fails or misleads: compare with `is`": {
            _IS_HELD: 'if prompted.soft_prompt in group["params"]:'
        },
        "only the first group of the optimizer is looked at: there may be several": {
            "for group in optimizer.param_groups:\n        for": "for group in optimizer.param_groups[:1]:\n        for"
        },
        "the learning rate is the first group's: it is that of the group that holds the prompt": {
            'group["lr"] * steps': 'optimizer.param_groups[0]["lr"] * steps'
        },
        "the number of steps is left out: what counts is how far all of them can go together": {
            _REACH: 'group["lr"] < size / 10'
        },
        "the prompt's size is its mean, where positive and negative numbers cancel: take the root mean square": {
            _SIZE: "prompted.soft_prompt.detach().mean()"
        },
        "the prompt's size is its standard deviation, which leaves the mean out: take the root mean square": {
            _SIZE: "prompted.soft_prompt.detach().std()"
        },
        "the prompt's size is the mean of its absolute values: take the root mean square": {
            _SIZE: "prompted.soft_prompt.detach().abs().mean()"
        },
        "the prompt's size is its largest entry: take the root mean square": {
            _SIZE: "prompted.soft_prompt.detach().abs().max()"
        },
        "the prompt's size is its mean square: take the root of it": {_SIZE: "prompted.soft_prompt.detach().pow(2).mean()"},
        "the prompt's size is that of a row, whose norm grows with its length: take the root mean square": {
            _SIZE: "prompted.soft_prompt.detach().norm(dim=1).mean()"
        },
        "the prompt's size is its norm, which grows with the number of its entries: take the root mean square": {
            _SIZE: "prompted.soft_prompt.detach().norm()"
        },
        "the factor of a tenth is missing: too slow is what reaches less than a tenth of the size": {
            _REACH: 'group["lr"] * steps < size'
        },
        "the tenth is on the wrong side: the learning rate times the steps is compared with a tenth of the size": {
            _REACH: 'group["lr"] * steps / 10 < size'
        },
        "a hundredth of the size is taken for enough: less than a tenth is too slow": {
            _REACH: 'group["lr"] * steps < size / 100'
        },
        "half of the size is asked for: a tenth of it is enough": {_REACH: 'group["lr"] * steps < size / 2'},
        "the comparison is upside down: too slow is what reaches less than a tenth of the size": {
            _REACH: 'group["lr"] * steps > size / 10'
        },
        "gradients are left behind: the first step of training would add to them": {
            _CLEAR_AFTER: "gradient = prompted.soft_prompt.grad\n"
        },
        "the optimizer's other parameters are left with gradients: clear these too, not the prompted model's alone": {
            _CLEAR_AFTER: "gradient = prompted.soft_prompt.grad\n    prompted.zero_grad()\n"
        },
        "the prompt is left with a gradient where the optimizer does not hold it: clear the prompted model's too": {
            _CLEAR_AFTER: "gradient = prompted.soft_prompt.grad\n    gradient = gradient if gradient is None else gradient.clone()\n    optimizer.zero_grad()\n"
        },
        "the prompt has moved: a diagnosis takes no step": {"value.backward()": "value.backward()\n        optimizer.step()"},
        'the optimizer is searched for the prompt before the gradient is known: say "no gradient" first': {
            "    value = loss()": (
                "    if not any(held is prompted.soft_prompt for group in optimizer.param_groups for held in group['params']):\n"
                '        return "not in the optimizer"\n    value = loss()'
            )
        },
        'the optimizer is asked before the gradient: say "no gradient" first': {
            "    value = loss()": (
                '    holding = [group for group in optimizer.param_groups if any(p is prompted.soft_prompt for p in group["params"])]\n'
                '    if not holding:\n        return "not in the optimizer"\n'
                '    if holding[0]["lr"] * steps < prompted.soft_prompt.detach().pow(2).mean().sqrt() / 10:\n'
                '        return "too slow"\n    value = loss()'
            )
        },
    },
    variants={
        "torch.autograd.grad": """
            def diagnose(prompted, optimizer, loss, steps):
                prompt, value = prompted.soft_prompt, loss()
                for p in prompted.parameters():
                    p.grad = None
                gradient = None
                if value.requires_grad and prompt.requires_grad:
                    (gradient,) = torch.autograd.grad(value, prompt, allow_unused=True)
                if gradient is None or not gradient.any():
                    return "no gradient"
                rates = [g["lr"] for g in optimizer.param_groups if id(prompt) in map(id, g["params"])]
                if not rates:
                    return "not in the optimizer"
                rms = (prompt.detach().double() ** 2).mean() ** 0.5
                return "learns" if steps * rates[0] >= 0.1 * rms else "too slow"
        """,
        "old gradients put back": {
            _CLEAR: f"    old = [parameter.grad for parameter in parameters]\n{_CLEAR}",
            _CLEAR_AFTER: (
                "gradient = prompted.soft_prompt.grad\n"
                "    for parameter, was in zip(parameters, old):\n        parameter.grad = was\n"
            ),
        },
        "zero_grad, and a walrus": """
            def diagnose(prompted, optimizer, loss, steps):
                prompted.zero_grad()
                optimizer.zero_grad()
                if (value := loss()).requires_grad:
                    value.backward()
                found = prompted.soft_prompt.grad is not None and prompted.soft_prompt.grad.abs().max().item() > 0
                prompted.zero_grad()
                optimizer.zero_grad()
                if not found:
                    return "no gradient"
                mine = next((g for g in optimizer.param_groups if any(p is prompted.soft_prompt for p in g["params"])), None)
                if mine is None:
                    return "not in the optimizer"
                size = prompted.soft_prompt.data.norm() / prompted.soft_prompt.numel() ** 0.5
                return "too slow" if mine["lr"] * steps < 0.1 * size else "learns"
        """,
        "an early return at the end": {
            "if gradient is None or not gradient.abs().sum() > 0:": "if gradient is None or torch.count_nonzero(gradient) == 0:",
            _SIZE: "torch.linalg.vector_norm(prompted.soft_prompt.detach()) / math.sqrt(prompted.soft_prompt.numel())",
        },
    },
)

EXERCISES = {name: exercise for name, exercise in globals().items() if isinstance(exercise, Exercise)}
"""Every exercise of the unit, by the name of its check."""
