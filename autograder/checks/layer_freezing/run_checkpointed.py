"""Bug hunt: gradient checkpointing below frozen layers."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from autograder.cases import between
from autograder.checks.layer_freezing.cases import parts, sizes_of_a_llama
from autograder.drive import Observation
from autograder.exercise import Exercise


def run_checkpointed(layers: nn.ModuleList, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Run the decoder layers; of those that backward visits, keep the input alone and compute the rest again."""
    for layer in layers:
        visited = x.requires_grad or any(parameter.requires_grad for parameter in layer.parameters())
        x = checkpoint(layer, x, cos, sin, None, use_reentrant=False) if visited else layer(x, cos, sin, None)
    return x


def checkpointed_case(generator: torch.Generator, kind: str, dtype: str = "float32", layers: tuple[int, int] = (4, 4)) -> dict:
    """Return a model's sizes and which layers are trained: "last", "first", "middle" or "embedding".

    In "middle" the lowest trained layer is trained in part: one parameter, and not its first.
    """
    sizes = sizes_of_a_llama(generator, layers)
    count = sizes[3]
    middle = [between(generator, 1, count - 3), count - 1]
    trained = {"last": [count - 2, count - 1], "first": [0], "middle": middle, "embedding": [count - 1]}[kind]
    return {
        "sizes": sizes,
        "dtype": dtype,
        "seed": between(generator, 0, 2**31 - 1),
        "trained": trained,
        "partly": "mlp.up_proj.weight" if kind == "middle" else "",
        "embedding": kind == "embedding",
        "input_ids": torch.randint(0, sizes[0], (2, between(generator, 6, 8)), generator=generator),
    }


def drive_checkpointed(run_checkpointed, sizes, dtype, seed, trained, partly, embedding, input_ids):
    """Train some layers of a small Llama with the layers run by the student; return gradients, bytes alive, and runs."""
    import warnings

    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves
    from torch.utils.weak import WeakIdKeyDictionary

    from peftlab.llama import Llama, LlamaConfig, rotary_angles

    class Alive(TorchDispatchMode):
        """Note every storage that an operation makes; those that are dropped leave the list by themselves."""

        def __init__(self):
            super().__init__()
            self.storages = WeakIdKeyDictionary()

        def __torch_dispatch__(self, function, types, arguments=(), named=None):
            result = function(*arguments, **(named or {}))
            for tensor in tree_leaves(result):
                if torch.is_tensor(tensor):
                    self.storages[tensor.untyped_storage()] = tensor.untyped_storage().nbytes()
            return result

    config = LlamaConfig(*sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Llama(config).to(getattr(torch, dtype)).requires_grad_(False)
    for number in trained:
        model.model.layers[number].requires_grad_(True)
    if partly:
        model.model.layers[trained[0]].requires_grad_(False).get_parameter(partly).requires_grad_(True)
    model.model.norm.requires_grad_(True)
    model.model.embed_tokens.requires_grad_(embedding)
    runs = []
    for number, layer in enumerate(model.model.layers):
        layer.register_forward_pre_hook(lambda module, inputs, number=number: runs.append(number))
    angles = [
        angle.to(getattr(torch, dtype)) for angle in rotary_angles(torch.arange(input_ids.shape[1]), config.head_dim, 1e4)
    ]
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        with Alive() as alive:
            embedded = model.model.embed_tokens(input_ids)
            output = run_checkpointed(model.model.layers, embedded, *angles)
            there = [*model.parameters(), *angles]
            there = {tensor.untyped_storage().data_ptr() for tensor in there}
            kept = sum(size for storage, size in alive.storages.items() if storage.data_ptr() not in there)
        outcome = output.detach()  # raises here, and not in the norm, if nothing came back
        model.lm_head(model.model.norm(output)).float().logsumexp(-1).sum().backward()
    return {
        "output": outcome,
        "gradients": {name: p.grad for name, p in model.named_parameters() if p.grad is not None},
        "trainable": [name for name, p in model.named_parameters() if p.requires_grad],
        "kept": kept,
        "runs": len(runs),
        "warned": any("None of the inputs have requires_grad" in str(warning.message) for warning in warned),
    }


KEPT = "bytes alive after forward, besides the weights"
RUNS = "how often any layer runs in forward and backward"
OUTPUT, GRADIENTS = "the output of the last layer", "the joined vector of all gradients"


def read_checkpointed(observation: Observation, case: dict) -> Observation:
    """Join the gradients, in a fixed order, and name the parts that have one."""
    gradients = observation["gradients"]
    where = f"if layers {case['trained']} of {case['sizes'][3]} are trained" + (
        f" (of layer {case['trained'][0]} only {case['partly']})" if case["partly"] else ""
    )
    where += " and the embedding" if case["embedding"] else ""
    joined = [gradients[name].flatten().float() for name in sorted(gradients)]
    # A right answer may be warned for nothing, a frozen layer at the bottom, say: the warning only tells wrong ones apart.
    told = {"torch's warning": observation["warned"]} if list(gradients) == ["model.norm.weight"] else {}
    return told | {
        f"the list of what gets a gradient {where}": parts(list(gradients)),
        f"the list of what requires a gradient {where}": parts(observation["trainable"]),
        OUTPUT: observation["output"],
        GRADIENTS: torch.cat(joined) if joined else torch.zeros(0),
        KEPT: observation["kept"],
        RUNS: observation["runs"],
    }


def checkpointed_tolerance(case: dict) -> dict[str, float]:
    """Return what another number of threads may change.

    A recomputed layer does the same operations on the same numbers in the same order. But the student's process may split its sums
    among more threads or fewer than this one. Then they differ by a few roundings, of states of size 0.05 and gradients below one;
    in bfloat16, where sums are rounded once at their end, by one.
    """
    eps = torch.finfo(getattr(torch, case["dtype"])).eps
    if case["dtype"] == "bfloat16":
        return {OUTPUT: 0.05 * eps, GRADIENTS: 0.5 * eps}
    return {OUTPUT: 4 * eps, GRADIENTS: 10 * eps}


_CHECKPOINT = "checkpoint(layer, x, cos, sin, None, use_reentrant=False)"
_VISITED = "x.requires_grad or any(parameter.requires_grad for parameter in layer.parameters())"
_RUN_LOOP = "for layer in layers:\n        visited"
_PLAIN = "if visited else layer(x, cos, sin, None)"

check_run_checkpointed = Exercise(
    spec=[run_checkpointed],
    cases=lambda generator: [checkpointed_case(generator, "middle"), checkpointed_case(generator, "embedding")],
    driver=drive_checkpointed,
    reading=read_checkpointed,
    tolerance=checkpointed_tolerance,
    at_most=frozenset({KEPT, RUNS}),
    mistakes={
        "the trained layers get no gradient: a reentrant checkpoint gives none if no *input* wants one, whatever its weights want": {
            "use_reentrant=False": "use_reentrant=True",
        },
        "the embedding's output is made to require a gradient: that helps, but backward now runs every frozen layer again": {
            _RUN_LOOP: "x = x if x.requires_grad else x.requires_grad_()\n    " + _RUN_LOOP,
        },
        "a copy of the embedding's output is made to require a gradient: backward now runs every frozen layer again": {
            _RUN_LOOP: "x = x if x.requires_grad else x.clone().requires_grad_()\n    " + _RUN_LOOP,
        },
        "the embedding's output is detached and made to require a gradient: backward now runs every frozen layer again, "
        "and a trained embedding gets no gradient": {
            _RUN_LOOP: "x = x.detach().requires_grad_()\n    " + _RUN_LOOP,
        },
        "the embedding is trained, and its gradient is lost in the frozen layers: ask `x.requires_grad` too": """
            def run_checkpointed(layers, x, cos, sin):
                trained = [any(parameter.requires_grad for parameter in layer.parameters()) for layer in layers]
                first = trained.index(True) if True in trained else len(layers)
                for number, layer in enumerate(layers):
                    with torch.set_grad_enabled(number >= first):
                        x = checkpoint(layer, x, cos, sin, None, use_reentrant=False)
                return x
        """,
        "a layer is taken for frozen if its first parameter is, and gets no gradient: ask all of its parameters": {
            f"visited = {_VISITED}": (
                "visited = x.requires_grad or next(layer.parameters()).requires_grad\n        torch.set_grad_enabled(visited)"
            ),
            "return x": "torch.set_grad_enabled(True)\n    return x",
        },
        "a layer is taken for frozen if its first parameter is, and keeps its activations: ask all of its parameters": {
            _VISITED: "x.requires_grad or next(layer.parameters()).requires_grad",
        },
        "nothing is checkpointed: gradients are right, and all activations are kept": {_CHECKPOINT: "layer(x, cos, sin, None)"},
        "only trained layers are checkpointed: the frozen ones above them keep activations too": {
            _VISITED: "any(parameter.requires_grad for parameter in layer.parameters())",
        },
        "frozen layers are run without gradients: those above a trained one have to pass them on": {
            _VISITED: "any(parameter.requires_grad for parameter in layer.parameters())",
            _PLAIN: "if visited else layer(x.detach(), cos, sin, None)",
        },
        "the frozen layers were thawed to let gradients through: they are to stay frozen": {
            _RUN_LOOP: "layers.requires_grad_(True)\n    " + _RUN_LOOP,
        },
        "the checkpointed function is a lambda that looks `layer` up when it is run again, and finds the last one": {
            _CHECKPOINT: "checkpoint(lambda h: layer(h, cos, sin, None), x, use_reentrant=False)",
        },
        "all layers lie in one checkpoint: backward runs them all again, frozen ones at the bottom too": {
            f"for layer in layers:\n        visited = {_VISITED}\n        x = {_CHECKPOINT} {_PLAIN}\n    return x": (
                "def run(x):\n        for layer in layers:\n            x = layer(x, cos, sin, None)\n        return x\n"
                "    return checkpoint(run, x, use_reentrant=False)"
            ),
        },
        "every layer reads the embedding: it should read what the layer before it gave": {
            _RUN_LOOP: "embedded = x\n    " + _RUN_LOOP,
            _CHECKPOINT: "checkpoint(layer, embedded, cos, sin, None, use_reentrant=False)",
        },
        "the outcome is detached: no layer gets a gradient": {"return x": "return x.detach()"},
    },
    variants={
        "a checkpoint for every layer": {f"visited = {_VISITED}": "visited = True"},
        "partial": {
            _CHECKPOINT: "checkpoint(partial(layer, cos=cos, sin=sin, mask=None), x, use_reentrant=False)",
            _RUN_LOOP: "from functools import partial\n    " + _RUN_LOOP,
        },
        "a closure made by a function, and keywords": """
            def run_checkpointed(layers, x, cos, sin):
                def runner(layer):
                    def run(h):
                        return layer(h, cos, sin, None)
                    return run

                wants = x.requires_grad
                for number in range(len(layers)):
                    wants = wants or any(p.requires_grad for p in layers[number].parameters())
                    step = runner(layers[number])
                    x = checkpoint(step, x, use_reentrant=False, preserve_rng_state=False) if wants else step(x)
                return x
        """,
        "frozen layers at the bottom without autograd": {
            f"visited = {_VISITED}": f"visited = {_VISITED}\n        torch.set_grad_enabled(visited)",
            "return x": "torch.set_grad_enabled(True)\n    return x",
        },
        "reentrant from the first trained layer on, whose input is a leaf": """
            def run_checkpointed(layers, x, cos, sin):
                for layer in layers:
                    if not x.requires_grad and any(p.requires_grad for p in layer.parameters()):
                        x = x.detach().requires_grad_()
                    x = checkpoint(layer, x, cos, sin, None, use_reentrant=True)
                return x
        """,
    },
)
"""Every exercise of the unit, by the name of its check."""
