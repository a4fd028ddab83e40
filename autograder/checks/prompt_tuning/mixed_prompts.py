"""MixedPrompts: a batch of several tasks."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from autograder.cases import normal
from autograder.checks.prompt_tuning.cases import exact_case, prompted_case
from autograder.checks.prompt_tuning.helpers import decode_exactly
from autograder.checks.prompt_tuning.prompted_model import FREEZE
from autograder.drive import Observation
from autograder.exercise import Exercise
from peftlab.llama import LlamaModel


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


def drive_mixed(MixedPrompts, sizes, weights, prompts, lengths, input_ids, task_ids, attention_mask, output_gradient, exact):
    """Run a batch of several tasks through a small LLaMA; return the text's hidden states, and the prompts' gradients.

    Where the case is exact, the base is as in `drive_prompted`.
    """
    import torch
    from torch import nn

    from peftlab.llama import LlamaConfig, LlamaModel

    runs = []

    class Counted(LlamaModel):
        def decode(self, x, attention_mask=None, positions=None):
            runs.append(len(x))
            return decode_exactly(self, x, attention_mask, positions) if exact else super().decode(x, attention_mask, positions)

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


_OWN_PROMPT = "self.soft_prompts[int(task_ids[row])]"
_LIST = "nn.ParameterList([nn.Parameter(prompt.detach().clone()) for prompt in prompts])"
_LONGEST = "max(len(prompt) for prompt in self.soft_prompts)"
_ROW = "torch.cat([missing, prompt.to(text.dtype), text[row]])"
_BEHIND = "torch.cat([prompt.to(text.dtype), missing, text[row]])"
_ROW_MASK = "[0] * len(missing) + [1] * len(prompt) + own"
_MASK_BEHIND = "[1] * len(prompt) + [0] * len(missing) + own"
_ROW_POSITIONS = "[sum(masks[-1][: place + 1]) - 1 for place in range(longest + len(own))]"
_MIXED_CUT = "hidden[:, longest:]"

check_mixed_prompts = Exercise(
    spec=[MixedPrompts],
    cases=lambda generator: [
        mixed_case(generator),
        mixed_case(generator, "each"),
        exact_mixed_case(generator, "each", torch.bfloat16),
    ],
    driver=drive_mixed,
    helpers=[decode_exactly],
    reading=read_mixed,
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
        "the base is not frozen: only prompts may learn": {FREEZE: "pass"},
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
        "the batch at once, padded on the left": """
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
        """,
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
