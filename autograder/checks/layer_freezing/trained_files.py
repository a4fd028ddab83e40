"""`save_trained` and `load_trained`: files that hold what was trained."""

from pathlib import Path

import torch
from torch import Tensor, nn

from autograder.cases import between, read_safetensors
from autograder.checks.layer_freezing.cases import parts
from autograder.drive import Observation
from autograder.exercise import Exercise
from autograder.helpers import read_file


def save_trained(model: nn.Module, path: str | Path) -> None:
    """Write every parameter that requires a gradient, under its full name, to a safetensors file."""
    from safetensors.torch import save_file

    trained = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            trained[name] = parameter.detach().contiguous()
    save_file(trained, path)


@torch.no_grad()
def load_trained(model: nn.Module, path: str | Path) -> None:
    """Copy the file's tensors into the model's own parameters, in place; all of them must fit."""
    from safetensors.torch import load_file

    saved = load_file(path)
    own = dict(model.named_parameters())
    for name, tensor in saved.items():
        if name not in own or own[name].shape != tensor.shape:
            raise ValueError(f"{name} does not fit this model")
    for name, tensor in saved.items():
        own[name].copy_(tensor)


def files_case(generator: torch.Generator, tied: bool, dtype: str = "float32") -> dict:
    """Return a model's sizes and the prefixes of what is trained in it: always the last layer, which a shallower one lacks."""
    vocabulary, hidden, wide, layers = (between(generator, *ends) for ends in ((30, 39), (12, 19), (41, 49), (3, 4)))
    low = between(generator, 0, layers - 2)
    return {
        "sizes": [vocabulary, hidden, wide, layers],
        "tied": tied,
        "dtype": dtype,
        "seed": between(generator, 0, 2**31 - 9),
        "trained": [f"model.layers.{low}.", f"model.layers.{layers - 1}.", "model.norm"] + ["model.embed_tokens"] * tied,
        # In a model with a wider MLP the final norm still fits: who copies one tensor after the other has changed it already.
        "misfits": [[vocabulary, hidden, wide, layers - 1], [vocabulary, hidden, wide + 3, layers]],
    }


def drive_files(save_trained, load_trained, sizes, tied, dtype, seed, trained, misfits):
    """Save what was trained of one model; load it into another, as it comes and frozen, and into some that it does not fit."""
    import os
    import tempfile
    import warnings

    import torch
    from torch import nn

    class Block(nn.Module):
        def __init__(self, hidden, wide):
            super().__init__()
            self.up_proj, self.down_proj = nn.Linear(hidden, wide, bias=False), nn.Linear(wide, hidden, bias=False)
            self.norm = nn.RMSNorm(hidden)

    class Model(nn.Module):
        def __init__(self, vocabulary, hidden, wide, layers):
            super().__init__()
            self.model = nn.Module()
            self.model.embed_tokens = nn.Embedding(vocabulary, hidden)
            self.model.layers = nn.ModuleList(Block(hidden, wide) for _ in range(layers))
            self.model.norm = nn.RMSNorm(hidden)
            self.lm_head = nn.Linear(hidden, vocabulary, bias=False)
            if tied:
                self.lm_head.weight = self.model.embed_tokens.weight

    def built(sizes, seed):
        generator = torch.Generator().manual_seed(seed)
        model = Model(*sizes).to(getattr(torch, dtype))
        for parameter in model.parameters():
            nn.init.normal_(parameter, generator=generator)
        return model

    def attempt(model, path):
        try:
            load_trained(model, path)
            return "nothing"
        except NotImplementedError:
            raise
        except Exception as error:
            return "ValueError" if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"

    warnings.simplefilter("ignore")  # a slower way to save is still a way to save
    source = built(sizes, seed)
    for name, parameter in source.named_parameters():
        parameter.requires_grad = name.startswith(tuple(trained))
    frozen = built(sizes, seed + 1).requires_grad_(False)
    # A base may have another dtype than the file, and keeps it.
    frozen.to(torch.bfloat16 if dtype == "float32" else torch.float32)
    fresh = built(sizes, seed + 2)
    held = dict(fresh.named_parameters())
    memory = {name: p.data_ptr() for name, p in held.items()}
    wanted = {name: p.detach().clone() for name, p in source.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in fresh.named_parameters()}
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "trained.safetensors")
        save_trained(source, path)
        if not os.path.isfile(path):
            return {"file": None}
        content = read_file(path)
        loading = [attempt(model, path) for model in (fresh, frozen)]
        refused, untouched = [], []
        others = [built(misfit, seed + 3) for misfit in (*misfits, sizes)]
        matrix = others[-1].model.layers[-1].up_proj
        matrix.weight = nn.Parameter(matrix.weight.detach().T.contiguous())
        for other in others:
            as_it_was = {name: p.detach().clone() for name, p in other.named_parameters()}
            refused.append(attempt(other, path))
            untouched.append(all(torch.equal(as_it_was[name], p) for name, p in other.named_parameters()))
    return {
        "file": content,
        "wanted": wanted,
        "before": before,
        "loading": loading,
        "fresh": {name: p.detach() for name, p in fresh.named_parameters()},
        "frozen": {name: p.detach() for name, p in frozen.named_parameters() if name in wanted},
        "held": {name: p.detach() for name, p in held.items() if name in wanted},
        "moved": [name for name, p in fresh.named_parameters() if p.data_ptr() != memory.get(name)],
        "head": fresh.lm_head.weight.detach(),
        "trainable": [[own for own, p in model.named_parameters() if p.requires_grad] for model in (source, fresh, frozen)],
        "refused": refused,
        "untouched": untouched,
    }


def read_files(observation: Observation, case: dict) -> Observation:
    """Read the file, as bytes, without the student's help, and hold what was loaded against what was saved."""
    if observation["file"] is None:
        return {"what save_trained writes": "nothing"}
    names, tensors, size = read_safetensors(observation["file"])
    in_file = names if isinstance(names, list) else []
    wanted, fresh = observation["wanted"], observation["fresh"]

    def joined(values: dict) -> Tensor:
        return torch.cat([values[name].flatten() for name in sorted(values)]) if values else torch.zeros(0)

    rest = {name: tensor for name, tensor in observation["before"].items() if name not in wanted}
    unchanged = fresh.keys() == observation["before"].keys() and all(torch.equal(fresh[name], rest[name]) for name in rest)
    misfits = ("with too few layers", "of another width", "with a transposed matrix")
    return {
        "what save_trained writes": "a file",
        "the list of names in the file": parts(names, tensors_of_a_layer=3) if isinstance(names, list) else names,
        "the name in the file that no trained parameter has": next((n for n in in_file if n not in wanted), "none"),
        "the name of a trained parameter that the file lacks": next((n for n in wanted if n not in in_file), "none"),
        "bytes of the file": size,
        "what the tensors in the file hold": joined(tensors),
        "the list of errors on loading into a fresh model and into a frozen one": observation["loading"],
        "the list of parameters whose memory is another after loading": parts(observation["moved"], tensors_of_a_layer=3),
        "what the parameters hold after loading into a fresh model": joined(
            {name: fresh[name] for name in wanted if name in fresh}
        ),
        "what the parameters hold after loading into a frozen model of another dtype": joined(observation["frozen"]),
        "what the parameters that an optimizer already held are after loading": joined(observation["held"]),
        "the head of a fresh model after loading": observation["head"],
        "the other parameters are what they were": unchanged,
        "the list of how many parameters are trainable in the saved, the fresh and the frozen model at the end": [
            len(own) for own in observation["trainable"]
        ],
        **{f"the error for a model {kind}": error for kind, error in zip(misfits, observation["refused"], strict=True)},
        **{
            f"a model that the file does not fit is left alone: one {kind}": untouched
            for kind, untouched in zip(misfits, observation["untouched"], strict=True)
        },
    }


_LOOP = "for name, parameter in model.named_parameters():\n        if parameter.requires_grad:\n            trained[name] = parameter.detach().contiguous()"
_COPY_TRAINED = "for name, tensor in saved.items():\n        own[name].copy_(tensor)"
_FITS = "name not in own or own[name].shape != tensor.shape"
_FIT_LOOP = f'for name, tensor in saved.items():\n        if {_FITS}:\n            raise ValueError(f"{{name}} does not fit this model")\n    '

check_trained_files = Exercise(
    spec=[save_trained, load_trained],
    cases=lambda generator: [files_case(generator, tied=True)],
    driver=drive_files,
    helpers=[read_file],
    reading=read_files,
    # A file's metadata may take some room in the header; a frozen layer, of 4,000 bytes and more, may not.
    tolerance=lambda case: {"bytes of the file": 512},
    at_most=frozenset({"bytes of the file"}),
    mistakes={
        "save_trained wrote no file: write it to `path`": {"save_file(trained, path)": "pass"},
        "the file holds the whole model: save only what requires a gradient": {
            "if parameter.requires_grad:": "if True:",
        },
        "the file is empty: the tensors of `state_dict()` never require a gradient, so ask `named_parameters()`": {
            _LOOP: "trained = {name: t for name, t in model.state_dict().items() if t.requires_grad}",
        },
        "the tied embedding is saved twice, under both of its names: `named_parameters()` gives each parameter once": {
            _LOOP: (
                "for name, t in model.state_dict(keep_vars=True).items():\n"
                "        if t.requires_grad: trained[name] = t.detach().clone()"
            ),
            _FITS: "name not in model.state_dict() or model.state_dict()[name].shape != tensor.shape",
            "own[name].copy_(tensor)": "model.state_dict()[name].copy_(tensor)",
        },
        "layers overwrite each other in the file: keep the full name, not its last parts": {
            "trained[name] =": 'trained[".".join(name.split(".")[-2:])] =',
            _FIT_LOOP: "",
            _COPY_TRAINED: (
                "for name, p in own.items():\n        short = '.'.join(name.split('.')[-2:])\n"
                "        if short in saved: p.copy_(saved[short])"
            ),
        },
        "only decoder layers are saved: the final norm, and whatever else was trained, belongs in the file": {
            "if parameter.requires_grad:": 'if parameter.requires_grad and ".layers." in name:',
        },
        "the file is a pickle: write safetensors, which cannot run code when it is opened": {
            "from safetensors.torch import save_file": "save_file = torch.save",
            "from safetensors.torch import load_file": "load_file = torch.load",
        },
        "autograd watches the copying, and refuses it where the parameter is trainable: use `torch.no_grad()`": {
            "@torch.no_grad()\n": "",
        },
        "loading replaced the parameters by new ones, and an optimizer would go on training the old: copy into them": {
            "own[name].copy_(tensor)": (
                'part, _, last = name.rpartition(".")\n'
                "        setattr(model.get_submodule(part), last, nn.Parameter(tensor, own[name].requires_grad))"
            ),
        },
        "`parameter.data = tensor` puts the file's memory, and its dtype, in place of the parameter's: copy the numbers": {
            "own[name].copy_(tensor)": "own[name].data = tensor",
        },
        "a model that lacks some of the file's layers is loaded without a word: raise a ValueError": {
            _FIT_LOOP: "",
            "own[name].copy_(tensor)": "if name in own and own[name].shape == tensor.shape: own[name].copy_(tensor)",
        },
        "a tensor of another shape is not refused with a ValueError: compare the shapes too": {
            _FITS: "name not in own",
        },
        "a tensor with as many numbers in another shape is taken: compare the shapes, not `numel()`": {
            _FITS: "name not in own or own[name].numel() != tensor.numel()",
            "own[name].copy_(tensor)": "own[name].copy_(tensor.view_as(own[name]))",
        },
        "a refused file has changed half of the model already: compare all names and shapes before the first copy": {
            _FIT_LOOP: "",
            _COPY_TRAINED: (
                "for name, tensor in saved.items():\n"
                f"        if {_FITS}:\n            raise ValueError(name)\n        own[name].copy_(tensor)"
            ),
        },
        "only a model with just these parameters trainable is accepted: a base is loaded before anything in it is frozen": {
            "own = dict(model.named_parameters())": (
                "own = dict(model.named_parameters())\n"
                "    if {n for n in own if own[n].requires_grad} != set(saved): raise ValueError('other parameters')"
            ),
        },
        "nothing was loaded: changing clones does not change the model": {
            "own = dict(model.named_parameters())": "own = {n: p.clone() for n, p in model.named_parameters()}",
        },
    },
    variants={
        "a comprehension, and load_state_dict": {
            _LOOP: "trained = {name: p.data for name, p in model.named_parameters() if p.requires_grad}",
            _COPY_TRAINED: "model.load_state_dict(saved, strict=False)",
        },
        "through .data, with sets": """
            def save_trained(model, path):
                from safetensors.torch import save_file
                names = {name for name, p in model.named_parameters() if p.requires_grad}
                save_file({n: t.clone() for n, t in model.state_dict().items() if n in names}, str(path))

            def load_trained(model, path):
                from safetensors.torch import load_file
                saved, own = load_file(str(path)), dict(model.named_parameters())
                if set(saved) - set(own):
                    raise ValueError("names")
                if any(own[name].shape != saved[name].shape for name in saved):
                    raise ValueError("shapes")
                for name in saved:
                    own[name].data[...] = saved[name]
        """,
        "with open, and bytes": """
            def save_trained(model, path):
                from safetensors.torch import save
                state = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
                with open(path, "wb") as file:
                    file.write(save(state, metadata={"format": "pt"}))

            def load_trained(model, path):
                from safetensors import safe_open
                own = {name: (p.shape, p) for name, p in model.named_parameters()}
                with safe_open(path, "pt") as file, torch.no_grad():
                    for name in file.keys():
                        if name not in own or tuple(own[name][0]) != tuple(file.get_slice(name).get_shape()):
                            raise ValueError(f"no room for {name}")
                    for name in file.keys():
                        own[name][1].copy_(file.get_tensor(name))
        """,
    },
)
