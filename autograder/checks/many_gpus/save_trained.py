"""Saving what is trained in a model whose parameters are sharded: gathered by all ranks, written by one."""

import os
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn

from autograder.checking.cases import between, normal, read_safetensors
from autograder.checking.drive import Observation
from autograder.checking.exercise import Exercise
from autograder.checking.helpers import fill, read_file
from autograder.checks.many_gpus.helpers import in_ranks


def save_trained(model: nn.Module, path: Path) -> None:
    """Gather every trained parameter in all ranks; write them in rank 0, under another name first; wait for it."""
    adapter = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            adapter[name] = parameter.full_tensor()
    if dist.get_rank() == 0:
        unfinished = path.with_name(path.name + ".unfinished")
        save_file(adapter, unfinished)
        os.replace(unfinished, path)
    dist.barrier()


def save_case(generator: torch.Generator, world_size: int = 2, dtype: torch.dtype = torch.float32) -> dict:
    """Return the flat weights of a model, and its sizes: rows that cannot be dealt evenly, and fewer of them than ranks."""
    in_features, rank = between(generator, 6, 8), world_size - 1
    out_features = world_size * between(generator, 4, 6) + 1
    size = 2 * (in_features * out_features + rank * (in_features + out_features)) + in_features
    sizes = {"in_features": in_features, "out_features": out_features, "rank": rank}
    return {"world_size": world_size, "weights": normal(generator, size, dtype=dtype), **sizes}


def drive_save_trained(save_trained, world_size, weights, in_features, out_features, rank):
    """Save a model in place of an earlier file; note what each rank calls and finds, and what becomes of the folder.

    When half of the file is written, the rank that writes pauses until all higher ranks have called their next collective or
    have returned: so a rank that does not wait for the file is always seen, and ranks that all write do so in turns.
    """
    import os
    import sys
    import tempfile
    from pathlib import Path

    import safetensors.torch
    import torch
    from torch import nn
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    class Layer(nn.Module):
        def __init__(self, trained):
            super().__init__()
            shapes = {"base": (out_features, in_features), "lora_A": (rank, in_features), "lora_B": (out_features, rank)}
            for name, shape in shapes.items():
                tensor = torch.empty(shape, dtype=torch.bfloat16 if name == "lora_A" else weights.dtype)
                self.register_parameter(name, nn.Parameter(tensor, requires_grad=trained and name != "base"))

    def sharded_model():
        model = nn.Module()
        model.layers = nn.ModuleList([Layer(trained=True), Layer(trained=False)])
        model.norm = nn.Module()
        model.norm.weight = nn.Parameter(torch.empty(in_features, dtype=weights.dtype))
        fill(model, weights)
        mesh = init_device_mesh("cpu", (world_size,))
        for part in (*model.layers, model):
            fully_shard(part, mesh=mesh)
        return model

    def act(watch):
        model = sharded_model()
        seen = {"writes": [], "renamed": [], "meanwhile": []}
        listening, save, save_bytes = [], safetensors.torch.save_file, safetensors.torch.save

        def note_write(name):
            seen["writes"].append("its own name" if Path(os.fspath(name)).resolve() == path else "another name")

        def note_what_is_there():
            whole = path.is_file() and path.read_bytes() == b"earlier"
            seen["meanwhile"].append("the earlier file" if whole else "no whole file")

        def hear(event, arguments):
            """Note what Python's own functions open for writing in the folder, and what they rename to the file's name."""
            if not listening or event not in ("open", "os.rename") or not isinstance(arguments[0], (str, os.PathLike)):
                return
            listening.clear()  # or it would hear itself
            if event == "os.rename":
                old, new = (Path(os.fspath(name)).resolve() for name in arguments[:2])
                if new == path:
                    seen["renamed"].append("from the same folder" if old.parent == path.parent else "from another folder")
                    note_what_is_there()
            elif arguments[2] & (os.O_WRONLY | os.O_RDWR) and Path(os.fspath(arguments[0])).resolve().parent == path.parent:
                note_write(arguments[0])
            listening.append(True)

        def save_slowly(tensors, filename, metadata=None):
            listening.clear()
            note_write(filename)
            content = save_bytes(tensors, metadata)
            Path(filename).write_bytes(content[: len(content) // 2])
            watch.wait_for_higher_ranks()
            note_what_is_there()
            save(tensors, filename, metadata)
            listening.append(True)

        safetensors.torch.save_file = save_slowly  # in this process, which ends soon
        names = getattr(save_trained, "__globals__", {})
        names.update({name: save_slowly for name, value in names.items() if value is save})
        sys.addaudithook(hear)
        listening.append(True)
        watch.call(save_trained, model, Path(file))
        listening.clear()
        return seen | {"found": read_file(path) if path.is_file() else "none", "gathers": watch.calls["all_gather"]}

    with tempfile.TemporaryDirectory() as folder:
        file = os.path.join(folder, "adapter.safetensors")
        path = Path(file).resolve()
        path.write_bytes(b"earlier")
        ranks = in_ranks(world_size, act)
        return {"ranks": ranks, "file": read_file(path) if path.is_file() else "none", "folder": sorted(os.listdir(folder))}


def read_save_trained(observation: Observation, case: dict) -> Observation:
    """Read the file, as bytes, without the student's help, and put into words what each rank found."""
    ranks, file = observation["ranks"], observation["file"]
    names, tensors, _ = read_safetensors(file)
    earlier = torch.tensor(list(b"earlier"), dtype=torch.uint8)

    def found(content: object) -> str:
        if not isinstance(content, torch.Tensor):
            return "no file"
        return (
            "the earlier file" if torch.equal(content, earlier) else "the new file" if torch.equal(content, file) else "a part"
        )

    gathers = [seen["gathers"] for seen in ranks]
    meanwhile = {state for seen in ranks for state in seen["meanwhile"]}
    half = ["half of the new file"] if any("its own name" in seen["writes"] for seen in ranks) else []
    renamed = sorted({how for seen in ranks for how in seen["renamed"]})
    return {
        "the list of ranks that write": [rank for rank, seen in enumerate(ranks) if seen["writes"] or seen["renamed"]],
        "how many tensors are gathered": gathers[0] if len(set(gathers)) == 1 else gathers,
        "the list of names in the file": names,
        **{f"{name} in the file": tensor for name, tensor in tensors.items()},
        "what is at `path` until the new file is whole": ", then ".join(sorted(meanwhile) + half) or "nothing",
        "how a file gets the name `path`": f"renamed {' and '.join(renamed)}" if renamed else "not renamed",
        **{f"what rank {rank} finds at `path` when it returns": found(seen["found"]) for rank, seen in enumerate(ranks)},
        "the list of files in the folder afterwards": observation["folder"],
    }


_EVERY = "if parameter.requires_grad:\n            adapter[name] = parameter.full_tensor()"
_ONE_WRITES = "if dist.get_rank() == 0:"
_UNFINISHED = 'path.with_name(path.name + ".unfinished")'
_SAVE = "save_file(adapter, unfinished)"
_RENAME = "os.replace(unfinished, path)"

check_save_trained = Exercise(
    spec=[save_trained],
    driver=drive_save_trained,
    helpers=[fill, in_ranks, read_file],
    reading=read_save_trained,
    cases=lambda generator: [save_case(generator)],
    mistakes={
        "only rank 0 gathers, and waits for the others for ever: `full_tensor` is a collective, so every rank calls it": {
            "adapter = {}": "adapter = {}\n    if dist.get_rank() != 0:\n        return",
        },
        "rank 0 gathers while the others are in `barrier` already: `full_tensor` is a collective, so every rank calls it": {
            "if parameter.requires_grad:": "if parameter.requires_grad and dist.get_rank() == 0:",
        },
        "rank 0 waits in `barrier` for ranks that have returned: every rank calls it": {
            f"{_RENAME}\n    dist.barrier()": f"{_RENAME}\n        dist.barrier()",
        },
        "frozen parameters are gathered as well: that sends the whole base through the network": {
            _EVERY: "whole = parameter.full_tensor()\n        if parameter.requires_grad:\n            adapter[name] = whole",
        },
        "frozen parameters are in the file: an adapter is what was trained": {"if parameter.requires_grad:": "if True:"},
        "the file has rank 0's shards: gather each parameter with `full_tensor`": {
            "parameter.full_tensor()": "parameter.to_local().detach().clone()",
        },
        "every rank writes the file, one over the other: rank 0 alone does": {_ONE_WRITES: "if True:"},
        "the ranks do not wait for the file, and one that returns finds the earlier one: every rank calls `barrier` at the end": {
            "\n    dist.barrier()": ""
        },
        "the file is written in place of the earlier one: a rank that is killed meanwhile leaves half of it": {
            _UNFINISHED: "path",
            _RENAME: "pass",
        },
        "the earlier file is removed before the new one has its name: `os.replace` does both at once": {
            _RENAME: "path.unlink()\n        os.replace(unfinished, path)",
        },
        "the finished file is copied to `path`, and a copy can be cut short as well: rename it": {
            _RENAME: "import shutil\n        shutil.copyfile(unfinished, path)\n        unfinished.unlink()",
        },
        "the unfinished file is in another folder, which may be on another disk, where nothing can be renamed to `path`": {
            f"unfinished = {_UNFINISHED}": (
                'import tempfile\n        unfinished = Path(tempfile.gettempdir()) / f"unfinished-{os.getpid()}"'
            ),
        },
        "the file keeps its unfinished name: rename it": {_RENAME: "pass"},
        "a second file stays in the folder": {
            _SAVE: _SAVE + '\n        save_file(adapter, path.with_name("backup.safetensors"))'
        },
        "parameters are chosen by their names: what is trained is what requires a gradient": {
            "if parameter.requires_grad:": 'if "lora_" in name:',
        },
        "the tensors are rounded to bf16 in the file: save them as they are": {
            "parameter.full_tensor()": "parameter.full_tensor().bfloat16()",
        },
        "tensors overwrite each other in the file: keep the full name, not its last part": {
            "adapter[name]": 'adapter[name.rpartition(".")[2]]',
        },
        "the file is a pickle: write safetensors, which cannot run code when it is opened": {
            _SAVE: "torch.save(adapter, unfinished)"
        },
    },
    variants={
        "bytes, and a Path that renames itself": {
            _SAVE: "import safetensors.torch\n        unfinished.write_bytes(safetensors.torch.save(adapter))",
            _RENAME: "unfinished.replace(path)",
        },
        "the state dict, redistributed": """
            def save_trained(model, path):
                import safetensors.torch
                from torch.distributed.tensor import Replicate

                trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
                sharded = {name: tensor for name, tensor in model.state_dict().items() if name in trained}
                whole = {name: tensor.redistribute(placements=[Replicate()]).to_local() for name, tensor in sharded.items()}
                if dist.get_rank() == 0:
                    safetensors.torch.save_file(whole, str(path) + "~")
                    os.rename(str(path) + "~", str(path))
                dist.all_reduce(torch.zeros(1))
        """,
        "PyTorch's own function for state dicts, and a temporary file": """
            def save_trained(model, path):
                import tempfile
                from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

                options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
                adapter = get_model_state_dict(model, options=options)
                if not dist.get_rank():
                    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as unfinished:
                        pass
                    save_file(adapter, unfinished.name)
                    os.replace(unfinished.name, path)
                dist.barrier()
        """,
    },
)
