"""Files that hold an adapter alone."""

from pathlib import Path

import torch
from torch import nn

from autograder.cases import between, normal, read_safetensors
from autograder.drive import Observation
from autograder.exercise import Exercise
from autograder.helpers import attempt, fill, read_file, try_misfits


def save_adapter(model: nn.Module, path: str | Path) -> None:
    """Write lora_A and lora_B of every layer, under their full names, to a safetensors file."""
    from safetensors.torch import save_file

    adapter = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if "lora_" in name}
    save_file(adapter, path)


@torch.no_grad()
def load_adapter(model: nn.Module, path: str | Path) -> None:
    """Copy the factors from the file into the model's own, in place; the names in both must be the same."""
    from safetensors.torch import load_file

    adapter = load_file(path)
    own = {name: tensor for name, tensor in model.state_dict().items() if "lora_" in name}
    if adapter.keys() != own.keys():
        raise ValueError(f"the adapter does not fit: {sorted(adapter.keys() ^ own.keys())}")
    for name, tensor in own.items():
        tensor.copy_(adapter[name])


def adapter_case(generator: torch.Generator) -> dict:
    """Return the flat weights of two models with two layers each."""
    in_features, out_features, rank = between(generator, 9, 12), between(generator, 5, 8), between(generator, 2, 4)
    size = 2 * (in_features * out_features + rank * (in_features + out_features)) + 6
    sizes = {"in_features": in_features, "out_features": out_features, "rank": rank}
    return {"weights": normal(generator, size), "other_weights": normal(generator, size), **sizes}


def drive_adapter_files(save_adapter, load_adapter, weights, other_weights, in_features, out_features, rank):
    """Save one model's adapter, load it into another model that already has an optimizer, and try one that does not fit."""
    import os
    import tempfile
    import warnings

    import torch
    from torch import nn

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.base = nn.Linear(in_features, out_features, bias=False).requires_grad_(False)
            self.lora_A = nn.Parameter(torch.empty(rank, in_features))
            self.lora_B = nn.Parameter(torch.empty(out_features, rank))

    def model(values, layers=2):
        built = nn.ModuleDict({"blocks": nn.ModuleList(Layer() for _ in range(layers)), "norm": nn.LayerNorm(3)})
        return fill(built, values)

    warnings.simplefilter("ignore")  # a slower way to save is still a way to save
    source, target = model(weights), model(other_weights)
    held_by_an_optimizer = dict(target.named_parameters())
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "adapter.safetensors")
        save_adapter(source, path)
        content = read_file(path)
        loading = attempt(load_adapter, target, path)
        misfits = [model(other_weights, layers=1), model(torch.cat([other_weights, other_weights]), layers=3)]
        refused, untouched = try_misfits(load_adapter, misfits, path)
    return {
        "file": content,
        "loading": loading,
        "untouched": untouched,
        "loaded": {name: tensor.detach() for name, tensor in target.state_dict().items()},
        "held": {name: tensor.detach() for name, tensor in held_by_an_optimizer.items()},
        "trainable": sorted(name for name, p in target.named_parameters() if p.requires_grad),
        "refused": refused,
    }


def read_adapter_files(observation: Observation, case: dict) -> Observation:
    """Read the file, as bytes, without the student's help."""
    names, tensors, size = read_safetensors(observation["file"])
    return {
        "the list of names in the file": names,
        "bytes of the file": size,
        **{f"{name} in the file": tensor for name, tensor in tensors.items()},
        "the error when loading what was saved": observation["loading"],
        **{f"{name} after loading": tensor for name, tensor in observation["loaded"].items()},
        "the parameters that an optimizer already held, after loading,": torch.cat(
            [tensor.flatten() for tensor in observation["held"].values()]
        ),
        "the list of trainable parameters after loading": observation["trainable"],
        "the list of errors for a file with a layer too many, and for one with a layer too few": observation["refused"],
        "the model is left alone when a file with a layer too many is refused": observation["untouched"][0],
        "the model is left alone when a file with a layer too few is refused": observation["untouched"][1],
    }


_ADAPTER = '{name: tensor.contiguous() for name, tensor in model.state_dict().items() if "lora_" in name}'
_COPY = "for name, tensor in own.items():\n        tensor.copy_(adapter[name])"
_REFUSE_ADAPTER = 'if adapter.keys() != own.keys():\n        raise ValueError(f"the adapter does not fit: {sorted(adapter.keys() ^ own.keys())}")'

check_adapter_files = Exercise(
    spec=[save_adapter, load_adapter],
    cases=lambda generator: [adapter_case(generator)],
    driver=drive_adapter_files,
    helpers=[attempt, fill, read_file, try_misfits],
    reading=read_adapter_files,
    # An adapter's metadata may take some room in the header; a base layer may not.
    tolerance=lambda case: {"bytes of the file": 2048},
    at_most=frozenset({"bytes of the file"}),
    mistakes={
        "the file holds the whole model: an adapter is only what was learned, lora_A and lora_B": {
            _ADAPTER: "{name: tensor.contiguous() for name, tensor in model.state_dict().items()}",
            'model.state_dict().items() if "lora_" in name}\n    if': "model.state_dict().items()}\n    if",
        },
        "the file holds whatever is trainable, the norm too: an adapter is lora_A and lora_B": {
            _ADAPTER: "{name: p.detach().contiguous() for name, p in model.named_parameters() if p.requires_grad}",
            '{name: tensor for name, tensor in model.state_dict().items() if "lora_" in name}': (
                "{name: p for name, p in model.named_parameters() if p.requires_grad}"
            ),
        },
        "lora_B is missing in the file: both factors are needed": {
            'model.state_dict().items() if "lora_" in name}\n    save': 'model.state_dict().items() if "lora_A" in name}\n    save',
            'model.state_dict().items() if "lora_" in name}\n    if': 'model.state_dict().items() if "lora_A" in name}\n    if',
        },
        "the file holds no tensor at all: no name matched (peft issue 286: the 443-byte adapter file)": {
            'model.state_dict().items() if "lora_" in name}\n    save': (
                'model.state_dict().items() if name.startswith("lora_")}\n    save'
            ),
            'model.state_dict().items() if "lora_" in name}\n    if': (
                'model.state_dict().items() if name.startswith("lora_")}\n    if'
            ),
            "adapter.keys() != own.keys()": "False",
        },
        "layers overwrite each other in the file: keep the full name, not its last part": {
            "{name: tensor.contiguous() for": '{name.split(".")[-1]: tensor.contiguous() for',
            "adapter.keys() != own.keys()": "False",
            "adapter[name]": 'adapter[name.split(".")[-1]]',
        },
        "the file is a pickle: write safetensors, which cannot run code when it is opened": {
            "from safetensors.torch import save_file": "save_file = torch.save",
            "from safetensors.torch import load_file": "load_file = torch.load",
        },
        "loading replaced the parameters by new ones, and an optimizer would go on training the old: copy into them": {
            "tensor.copy_(adapter[name])": (
                'layer, _, factor = name.rpartition(".")\n'
                "        setattr(model.get_submodule(layer), factor, nn.Parameter(adapter[name]))"
            ),
        },
        "a file that does not fit the model is loaded without a word: raise a ValueError": {
            _REFUSE_ADAPTER: "pass",
            _COPY: "model.load_state_dict(adapter, strict=False)",
        },
        "a file that lacks layers of the model is loaded without a word: the names must be exactly the model's": {
            "adapter.keys() != own.keys()": "adapter.keys() - own.keys()",
            _COPY: "model.load_state_dict(adapter, strict=False)",
        },
        "a refused file has changed half of the model already: compare the names before the first copy": {
            _REFUSE_ADAPTER: "pass",
            _COPY: (
                "for name, tensor in own.items():\n        if name in adapter: tensor.copy_(adapter[name])\n"
                "    if adapter.keys() != own.keys():\n        raise ValueError('too late')"
            ),
        },
        "nothing was loaded: changing a dict of clones does not change the model": {
            "own = {name: tensor for": "own = {name: tensor.clone() for",
        },
        "loading changed the base as well: an adapter touches lora_A and lora_B only": {
            _COPY: _COPY + '\n    for name, tensor in model.state_dict().items():\n        if "base" in name: tensor.zero_()',
        },
        "lora_A and lora_B are frozen after loading: training could not go on": {
            _COPY: _COPY + "\n    model.requires_grad_(False)\n    model['norm'].requires_grad_(True)",
        },
        "the factors are rounded to bf16 in the file: save them as they are": {
            "tensor.contiguous() for": "tensor.contiguous().bfloat16() for",
        },
    },
    variants={
        "by parameter": {
            _ADAPTER: "{n: p.detach().clone() for n, p in model.named_parameters() if n.endswith(('lora_A', 'lora_B'))}",
        },
        "load_state_dict": {
            _COPY: ("missing, unexpected = model.load_state_dict(adapter, strict=False)\n    assert not unexpected"),
        },
        "with open, and bytes": """
            def save_adapter(model, path):
                from safetensors.torch import save
                state = {}
                for name, module in model.named_modules():
                    if hasattr(module, "lora_A"):
                        state[name + ".lora_A"] = module.lora_A.data
                        state[name + ".lora_B"] = module.lora_B.data
                with open(path, "wb") as file:
                    file.write(save(state))

            def load_adapter(model, path):
                from safetensors import safe_open
                layers = {n: m for n, m in model.named_modules() if hasattr(m, "lora_A")}
                with safe_open(path, "pt") as file:
                    expected = {f"{n}.{factor}" for n in layers for factor in ("lora_A", "lora_B")}
                    if set(file.keys()) != expected:
                        raise ValueError("other layers")
                    for name, layer in layers.items():
                        layer.lora_A.data[:] = file.get_tensor(name + ".lora_A")
                        layer.lora_B.data[:] = file.get_tensor(name + ".lora_B")
        """,
    },
)
