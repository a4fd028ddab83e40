"""Files that hold a prompt alone."""

from pathlib import Path

import torch
from torch import nn

from autograder.cases import between, normal, read_safetensors
from autograder.drive import Observation
from autograder.exercise import Exercise
from autograder.helpers import attempt, read_file


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
        content = read_file(path)
        loading = attempt(load_prompt, target, path)
        path = os.path.join(folder, "half.safetensors")
        write(path, {"soft_prompt": prompt.half()})
        loading_half = attempt(load_prompt, from_half, path)
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


_MISFITS = (
    "a prompt of another width",
    "a longer prompt",
    "a prompt of one vector",
    "a transposed prompt",
    "a file that holds something else",
    "a file that holds something else beside the prompt",
)


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


_FILE = '{"soft_prompt": prompted.soft_prompt.detach().contiguous()}'
_COPIED = 'prompted.soft_prompt.copy_(saved["soft_prompt"])'
_NAMES = 'if list(saved) != ["soft_prompt"]:'
_SHAPES = 'if saved["soft_prompt"].shape != prompted.soft_prompt.shape:'

check_prompt_files = Exercise(
    spec=[save_prompt, load_prompt],
    cases=lambda generator: [files_case(generator)],
    driver=drive_prompt_files,
    helpers=[attempt, read_file],
    reading=read_prompt_files,
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
