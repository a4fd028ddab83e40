"""Files that hold the biases alone."""

from pathlib import Path

import torch
from torch import nn

from autograder.cases import between, normal, read_safetensors
from autograder.drive import Observation
from autograder.exercise import Exercise
from autograder.helpers import attempt, fill, read_file, try_misfits


def save_biases(model: nn.Module, path: str | Path) -> None:
    """Write every bias, under its full name, to a safetensors file."""
    from safetensors.torch import save_file

    tensors = {name: parameter.detach() for name, parameter in model.named_parameters() if name.split(".")[-1] == "bias"}
    save_file(tensors, path)


@torch.no_grad()
def load_biases(model: nn.Module, path: str | Path) -> None:
    """Copy the biases from the file into the model's own, in place; names and shapes in both must be the same."""
    from safetensors.torch import load_file

    saved = load_file(path)
    own = {name: tensor for name, tensor in model.state_dict().items() if name.rpartition(".")[2] == "bias"}
    if set(saved) != set(own):
        raise ValueError(f"the file does not fit: {sorted(set(saved) ^ set(own))}")
    for name in own:
        if saved[name].shape != own[name].shape:
            raise ValueError(f"{name} has another shape in the file")
    for name, tensor in own.items():
        tensor.copy_(saved[name])


def bias_file_case(generator: torch.Generator, larger: int = 0, dtype: torch.dtype = torch.float32) -> dict:
    """Return the flat weights of models with up to three blocks and a head; the saved one's are of `dtype`."""
    in_features, out_features = between(generator, 9, 12) + larger, between(generator, 5, 8) + larger
    width = out_features + 1
    size = 3 * (2 * in_features * width + 3 * width + 5) + 3 * width + 3
    sizes = {"in_features": in_features, "out_features": out_features}
    return {"weights": normal(generator, size).to(dtype), "other_weights": normal(generator, size), **sizes}


def drive_bias_files(save_biases, load_biases, weights, other_weights, in_features, out_features):
    """Save one model's biases, load them into others, one in fp64, and try four models that the file does not fit."""
    import os
    import tempfile
    import warnings

    import torch
    from torch import nn

    class Block(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.up = nn.Linear(in_features, width)
            self.plain = nn.Linear(width, in_features, bias=False)
            self.norm = nn.LayerNorm(width)
            self.bias_gate = nn.Parameter(torch.empty(2))
            self.score_bias = nn.Parameter(torch.empty(3))

    def model(values, layers=2, width=out_features):
        built = nn.ModuleDict({"blocks": nn.ModuleList(Block(width) for _ in range(layers)), "head": nn.Linear(width, 3)})
        return fill(built, values)

    warnings.simplefilter("ignore")  # a slower way to save is still a way to save
    source, target, double = model(weights), model(other_weights), model(other_weights).double()
    source["blocks"][1].up.bias.requires_grad_(False)
    held_by_an_optimizer = dict(target.named_parameters())
    memory = {name: parameter.data_ptr() for name, parameter in held_by_an_optimizer.items()}
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "biases.safetensors")
        save_biases(source, path)
        if not os.path.isfile(path):
            return {"file": None}
        content = read_file(path)
        loading = attempt(lambda: [load_biases(loaded, path) for loaded in (target, double)])
        misfits = [model(other_weights, layers=1), model(other_weights, layers=3), model(other_weights, width=out_features + 1)]
        misfits.append(model(other_weights))
        misfits[-1]["head"].bias = nn.Parameter(misfits[-1]["head"].bias.detach()[None])
        refused, untouched = try_misfits(load_biases, misfits, path)
    return {
        "file": content,
        "loading": loading,
        "untouched": untouched,
        "loaded": {name: tensor.detach() for name, tensor in target.state_dict().items()},
        "double": {name: tensor.detach() for name, tensor in double.state_dict().items() if name.endswith(".bias")},
        "moved": [name for name, p in target.named_parameters() if p.data_ptr() != memory.get(name)],
        "held": torch.cat([tensor.detach().flatten() for tensor in held_by_an_optimizer.values()]),
        "trainable": sorted(name for name, p in target.named_parameters() if p.requires_grad),
        "refused": refused,
    }


def read_bias_files(observation: Observation, case: dict) -> Observation:
    """Read the file, as bytes, without the student's help."""
    if observation["file"] is None:
        return {"what save_biases writes": "nothing"}
    names, tensors, size = read_safetensors(observation["file"])
    described = (
        "with a layer too many",
        "with a layer too few",
        "with layers of another width",
        "with a bias of shape (n,) for one of shape (1, n)",
    )
    return {
        "what save_biases writes": "a file",
        "the list of names in the file": names,
        "bytes of the file": size,
        **{f"{name} in the file": tensor for name, tensor in tensors.items()},
        "the error when loading what was saved": observation["loading"],
        **{f"{name} after loading": tensor for name, tensor in observation["loaded"].items()},
        "the list of parameters whose memory is another after loading": observation["moved"],
        "the joined vector of the parameters that an optimizer already held": observation["held"],
        **{f"{name} after loading into a model in fp64": tensor for name, tensor in observation["double"].items()},
        "the list of trainable parameters after loading": observation["trainable"],
        **{f"the error for a file {kind}": error for kind, error in zip(described, observation["refused"])},
        **{f"the model is left alone by a file {kind}": alone for kind, alone in zip(described, observation["untouched"])},
    }


_SAVED = 'for name, parameter in model.named_parameters() if name.split(".")[-1] == "bias"}'
_OWN = 'for name, tensor in model.state_dict().items() if name.rpartition(".")[2] == "bias"}'
_REFUSE_NAMES = (
    'if set(saved) != set(own):\n        raise ValueError(f"the file does not fit: {sorted(set(saved) ^ set(own))}")'
)
_REFUSE_SHAPES = (
    "for name in own:\n        if saved[name].shape != own[name].shape:\n"
    '            raise ValueError(f"{name} has another shape in the file")'
)
_COPY = "for name, tensor in own.items():\n        tensor.copy_(saved[name])"

check_bias_files = Exercise(
    spec=[save_biases, load_biases],
    cases=lambda generator: [bias_file_case(generator)],
    driver=drive_bias_files,
    helpers=[attempt, fill, read_file, try_misfits],
    reading=read_bias_files,
    # Metadata may take some room in the header; weights may not.
    tolerance=lambda case: {"bytes of the file": 1024},
    at_most=frozenset({"bytes of the file"}),
    mistakes={
        "save_biases wrote no file: write it to `path`": {"save_file(tensors, path)": "pass"},
        "loading replaced the parameters by new ones, and an optimizer would go on training the old: copy into them": {
            "tensor.copy_(saved[name])": (
                'layer, _, last = name.rpartition(".")\n'
                "        setattr(model.get_submodule(layer), last, nn.Parameter(saved[name].to(tensor.dtype)))"
            ),
        },
        "the biases changed their dtype on loading: copy the numbers into the model's own tensors": {
            "tensor.copy_(saved[name])": "model.get_parameter(name).data = saved[name]",
        },
        "`parameter.data = tensor` puts other memory in place of the parameter's own: copy the numbers into that": {
            "tensor.copy_(saved[name])": "model.get_parameter(name).data = saved[name].to(tensor.dtype)",
        },
        "a bias with as many numbers in another shape is taken: compare the shapes, not `numel()`": {
            "saved[name].shape != own[name].shape": "saved[name].numel() != own[name].numel()",
        },
        "the file holds `score_bias` too: compare the last part of the name, whole, not the last letters": {
            _SAVED: 'for name, parameter in model.named_parameters() if name.endswith("bias")}',
            _OWN: 'for name, tensor in model.state_dict().items() if name.endswith("bias")}',
        },
        "a frozen bias is missing in the file: every bias of the model is saved, whatever is trained": {
            _SAVED: _SAVED.replace("if name", "if parameter.requires_grad and name"),
        },
        "only the biases of nn.Linear are saved: other layers have some too, so ask for the name, not for the type": {
            _SAVED: _SAVED.replace(
                "if name", 'if isinstance(model.get_submodule(name.rpartition(".")[0]), nn.Linear) and name'
            ),
            _OWN: _OWN.replace("if name", 'if isinstance(model.get_submodule(name.rpartition(".")[0]), nn.Linear) and name'),
        },
        "a file that lacks biases of the model is loaded without a word: the names must be exactly the model's": {
            "if set(saved) != set(own):": "if set(saved) - set(own):",
            _REFUSE_SHAPES: "own = {name: own[name] for name in saved}\n    " + _REFUSE_SHAPES,
        },
        "a file with biases that the model lacks is loaded without a word: the names must be exactly the model's": {
            "if set(saved) != set(own):": "if set(own) - set(saved):",
        },
        "a file that does not fit the model is loaded without a word: raise a ValueError": {
            _REFUSE_NAMES: "own = {name: own[name] for name in own if name in saved and saved[name].shape == own[name].shape}",
            _REFUSE_SHAPES: "pass",
        },
        "a file whose biases have another shape fails half-way: compare the shapes too, before the first copy": {
            _REFUSE_SHAPES: "pass",
        },
        "a refused file has changed a part of the model already: compare names and shapes before the first copy": {
            _REFUSE_NAMES: "pass",
            _REFUSE_SHAPES: "pass",
            _COPY: (
                "for name, tensor in own.items():\n"
                "        if name not in saved or saved[name].shape != tensor.shape: raise ValueError(name)\n"
                "        tensor.copy_(saved[name])\n"
                "    if saved.keys() != own.keys():\n        raise ValueError('too late')"
            ),
        },
        "nothing was loaded: changing clones does not change the model": {
            "own = {name: tensor for": "own = {name: tensor.clone() for"
        },
        "the loaded biases were added to those that were there: copy them": {"tensor.copy_(": "tensor.add_("},
        "the biases are frozen after loading: training could not go on": {
            _COPY: _COPY + "\n    for name in own:\n        model.get_parameter(name).requires_grad_(False)",
        },
        "the file holds the whole model: the biases are all that was learned": {
            _SAVED: "for name, parameter in model.named_parameters()}",
            _OWN: "for name, tensor in model.state_dict().items()}",
        },
        "the file holds `bias_gate` too: take the parameters whose own name is `bias`, whole": {
            _SAVED: 'for name, parameter in model.named_parameters() if "bias" in name}',
            _OWN: 'for name, tensor in model.state_dict().items() if "bias" in name}',
        },
        "the head's bias is missing in the file: every bias of the model is saved": {
            _SAVED: _SAVED.replace("if name", 'if name.startswith("blocks") and name'),
            _OWN: _OWN.replace("if name", 'if name.startswith("blocks") and name'),
        },
        "the file holds no tensor at all: no name matched": {
            _SAVED: 'for name, parameter in model.named_parameters() if name == "bias"}',
            _REFUSE_NAMES: "own = {name: own[name] for name in saved}",
        },
        "layers overwrite each other in the file: keep the full name, not its last parts": {
            "{name: parameter.detach() for": '{".".join(name.split(".")[-2:]): parameter.detach() for',
            _REFUSE_NAMES: "pass",
            _REFUSE_SHAPES: "saved = {name: saved['.'.join(name.split('.')[-2:])] for name in own}",
        },
        "the file is a pickle: write safetensors, which cannot run code when it is opened": {
            "from safetensors.torch import save_file": "save_file = torch.save",
            "from safetensors.torch import load_file": "load_file = torch.load",
        },
        "the biases are rounded to bf16 in the file: save them as they are": {
            "parameter.detach() for": "parameter.detach().bfloat16() for",
        },
    },
    variants={
        "from the state dict": {
            "parameter.detach() for": "parameter for",
            _SAVED: 'for name, parameter in model.state_dict().items() if name.endswith(".bias")}',
        },
        "load_state_dict": {
            _COPY: "missing, unexpected = model.load_state_dict(saved, strict=False)\n    assert not unexpected"
        },
        "with open, and bytes": """
            def biases_of(model):
                modules = model.named_modules()
                return {name + ".bias": m.bias for name, m in modules if getattr(m, "bias", None) is not None}

            def save_biases(model, path):
                from safetensors.torch import save
                with open(path, "wb") as file:
                    file.write(save({name: bias.data.clone() for name, bias in biases_of(model).items()}))

            def load_biases(model, path):
                from safetensors import safe_open
                own = biases_of(model)
                with safe_open(path, "pt") as file:
                    shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
                    if shapes != {name: tuple(bias.shape) for name, bias in own.items()}:
                        raise ValueError("another model's")
                    for name, bias in own.items():
                        bias.data[:] = file.get_tensor(name)
        """,
    },
)
