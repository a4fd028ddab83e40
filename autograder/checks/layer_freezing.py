"""Checks of unit 03_layer_freezing: what a frozen parameter saves is counted, in tensors that came back from a real step."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from autograder.cases import between, read_safetensors, total_bytes
from autograder.drive import Observation
from autograder.exercise import Exercise
from peftlab.llama import Llama, LlamaConfig

TENSORS_OF_A_LAYER = 9
"""Four projections of attention, three of the MLP, two norms."""


def sizes_of_a_llama(generator: torch.Generator, layers: tuple[int, int] = (4, 6)) -> list[int]:
    """Return the arguments of a `LlamaConfig`: vocabulary, hidden, intermediate, layers, heads, key-value heads.

    No two sizes are equal, nor is any twice another of the same layer: the hidden size is 12 to 24, and keys and values are a
    third as wide.
    """
    heads, key_value_heads, head_dim = [(6, 2, 4), (6, 2, 2), (9, 3, 2)][between(generator, 0, 2)]
    return [
        between(generator, 30, 39),
        heads * head_dim,
        (53, 59, 61)[between(generator, 0, 2)],
        between(generator, *layers),
        heads,
        key_value_heads,
    ]


def parts(names: Sequence[str], tensors_of_a_layer: int = TENSORS_OF_A_LAYER) -> list[str]:
    """Return which parts of a Llama these parameters are; of layers that are there in part, how many tensors."""
    counted: dict[str, int] = {}
    for name in names:
        part = name.removeprefix("model.").removesuffix(".weight")
        if part.startswith("layers."):
            part = ".".join(part.split(".")[:2])
        counted[part] = counted.get(part, 0) + 1
    runs: list[list[str]] = []  # of layers one after the other, as much of each
    for part, count in counted.items():
        previous = runs[-1][-1] if runs else ""
        follows = previous.startswith("layers.") and part == f"layers.{int(previous.split('.')[1]) + 1}"
        if follows and counted[previous] == count:
            runs[-1].append(part)
        else:
            runs.append([part])
    listed = []
    for run in runs:
        count = counted[run[0]]
        in_part = run[0].startswith("layers.") and count != tensors_of_a_layer
        listed.append(" to ".join(dict.fromkeys([run[0], run[-1]])) + f" ({count} of {tensors_of_a_layer})" * in_part)
    return listed


# ======================================================================================================================
# 1. train_last and train_first: what learns
# ======================================================================================================================
def train_last(model: Llama, count: int) -> None:
    """Train the last `count` decoder layers and the final norm, and nothing else."""
    total = len(model.model.layers)
    if count < 0 or count > total:
        raise ValueError(f"there are {total} layers, not {count}")
    for parameter in model.parameters():
        parameter.requires_grad = False
    for number in range(total):
        if number >= total - count:
            for parameter in model.model.layers[number].parameters():
                parameter.requires_grad = True
    model.model.norm.weight.requires_grad = True


def train_first(model: Llama, count: int) -> None:
    """Train the first `count` decoder layers and the final norm, and nothing else."""
    depth = len(model.model.layers)
    if not 0 <= count <= depth:
        raise ValueError(f"there are {depth} layers, not {count}")
    for weight in model.parameters():
        weight.requires_grad = False
    for position in range(depth):
        if position < count:
            for weight in model.model.layers[position].parameters():
                weight.requires_grad = True
    model.model.norm.requires_grad_(True)


def drive_freezing(train_last, train_first, sizes, tied, seed, calls, refused):
    """Call the two functions on one model, one after the other; return what each call leaves trainable, or raises."""
    import torch

    from peftlab.llama import Llama, LlamaConfig

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Llama(LlamaConfig(*sizes, tie_word_embeddings=tied))
    functions = {"train_last": train_last, "train_first": train_first}
    held = dict(model.named_parameters())
    before = {name: parameter.detach().clone() for name, parameter in held.items()}
    trainable, raised, errors = [], [], []
    for name, count in calls:
        try:
            functions[name](model, count)
            raised.append("nothing")
        except ValueError:
            if count not in (0, len(model.model.layers)):  # not a refused count: let the student see the line
                raise
            raised.append("ValueError")
        trainable.append([own for own, parameter in model.named_parameters() if parameter.requires_grad])
    for name, count in refused:
        try:
            functions[name](model, count)
            errors.append("nothing")
        except Exception as error:
            errors.append("ValueError" if isinstance(error, ValueError) else type(error).__name__)
    now = dict(model.named_parameters())
    return {
        "trainable": trainable,
        "raised": raised,
        "errors": errors,
        "trainable after errors": [own for own, parameter in now.items() if parameter.requires_grad],
        "the model still has the parameters that it had": list(now) == list(held)
        and all(now[own] is held[own] for own in held),
        "the weights are what they were": all(torch.equal(now[own], before[own]) for own in before if own in now),
    }


def read_freezing(observation: Observation, case: dict) -> Observation:
    """Name the parts instead of 40 parameters."""
    read = {}
    seen = zip(case["calls"], observation["raised"], observation["trainable"], strict=True)
    for number, ((name, count), raised, trainable) in enumerate(seen, 1):
        read[f"what is raised by call {number}, {name}(model, {count})"] = raised
        read[f"the list of what requires a gradient after call {number}, {name}(model, {count})"] = parts(trainable)
    for name in ("the model still has the parameters that it had", "the weights are what they were"):
        read[name] = observation[name]
    refused = ", ".join(f"{name}(model, {count})" for name, count in case["refused"])
    read[f"the list of errors raised by {refused}"] = observation["errors"]
    read["the list of what requires a gradient after these calls were refused"] = parts(observation["trainable after errors"])
    return read


def freezing_case(generator: torch.Generator, tied: bool) -> dict:
    """Return a model's sizes and a sequence of calls in which every count follows a larger and a smaller one.

    There are 12 layers or more: the name of layer 1 begins those of layers 10 and 11.
    """
    sizes = sizes_of_a_llama(generator, layers=(12, 13))
    layers = sizes[3]
    some, fewer = between(generator, 2, layers - 1), 1
    return {
        "sizes": sizes,
        "tied": tied,
        "seed": between(generator, 0, 2**31 - 1),
        "calls": [
            ["train_last", some],
            ["train_first", some],
            ["train_last", 0],
            ["train_first", fewer],
            ["train_last", layers],
            ["train_first", 0],
            ["train_first", layers],
            ["train_last", fewer],
        ],
        "refused": [["train_last", layers + 1], ["train_last", -1], ["train_first", layers + 1], ["train_first", -1]],
    }


_FREEZE_LAST = "for parameter in model.parameters():\n        parameter.requires_grad = False"
_FREEZE_FIRST = "for weight in model.parameters():\n        weight.requires_grad = False"
_THAW_LAST = "for parameter in model.model.layers[number].parameters():\n                parameter.requires_grad = True"
_THAW_FIRST = "for weight in model.model.layers[position].parameters():\n                weight.requires_grad = True"
_NORM_LAST = "model.model.norm.weight.requires_grad = True"
_NORM_FIRST = "model.model.norm.requires_grad_(True)"
_IS_LAST = "number >= total - count"
_IS_FIRST = "position < count"
_REFUSE_LAST = 'if count < 0 or count > total:\n        raise ValueError(f"there are {total} layers, not {count}")\n    '
_IS_FIRST_BY_PREFIX = "any(str(position).startswith(str(chosen)) for chosen in range(count))"
_REFUSE_FIRST = 'if not 0 <= count <= depth:\n        raise ValueError(f"there are {depth} layers, not {count}")\n    '

check_train_last = Exercise(
    spec=[train_last, train_first],
    driver=drive_freezing,
    reading=read_freezing,
    cases=lambda generator: [freezing_case(generator, tied=False)],
    mistakes={
        "train_last trains the first layers: layer 0 reads the embedding, and the last one has the highest number": {
            _IS_LAST: _IS_FIRST.replace("position", "number"),
        },
        "train_first trains the last layers: layer 0, which reads the embedding, is the first": {
            _IS_FIRST: "position >= depth - count",
        },
        "with a count of 0 every layer is trained: `layers[-0:]` is the whole list": {
            _IS_LAST: f"count == 0 or {_IS_LAST}",
        },
        "train_last trains one layer too many": {_IS_LAST: "number >= total - count - 1"},
        "train_first trains one layer too many": {_IS_FIRST: "position <= count"},
        "`model.layers.1` also begins the names of layers 10 to 19: put the dot after the number": {
            _IS_FIRST: _IS_FIRST_BY_PREFIX,
        },
        "a count of 0 is refused: it is allowed, and trains the final norm alone": {
            "if count < 0 or": "if count <= 0 or",
            "if not 0 <= count": "if not 0 < count",
        },
        "the number of layers is refused as a count: it is allowed, and trains them all": {
            "or count > total:": "or count >= total:",
            "<= count <= depth:": "<= count < depth:",
        },
        "the final norm, `model.model.norm`, stays frozen: both functions train it": {_NORM_LAST: "pass", _NORM_FIRST: "pass"},
        "nothing is frozen: set `requires_grad` of every parameter to False before you thaw some": {
            _FREEZE_LAST: "pass",
            _FREEZE_FIRST: "pass",
        },
        "the embedding is not frozen: freeze the whole model, not its decoder layers alone": {
            _FREEZE_LAST: _FREEZE_LAST.replace("model.parameters()", "model.model.layers.parameters()"),
            _FREEZE_FIRST: _FREEZE_FIRST.replace("model.parameters()", "model.model.layers.parameters()"),
        },
        "the head is not frozen: it is no part of `model.model`, so freeze `model`": {
            _FREEZE_LAST: _FREEZE_LAST.replace("model.parameters()", "model.model.parameters()"),
            _FREEZE_FIRST: _FREEZE_FIRST.replace("model.parameters()", "model.model.parameters()"),
        },
        "what an earlier call froze stays frozen: a layer that is chosen has to be thawed": {
            _THAW_LAST: "pass",
            _THAW_FIRST: "pass",
            _FREEZE_LAST: (
                "for name, own in model.named_parameters():\n"
                "        own.requires_grad &= name.split('.')[2] in [str(n) for n in range(total - count, total)]"
            ),
            _FREEZE_FIRST: (
                "for name, own in model.named_parameters():\n"
                "        own.requires_grad &= name.split('.')[2] in [str(n) for n in range(count)]"
            ),
        },
        "`requires_grad = True` was set on a layer, which has no such switch: use `layer.requires_grad_(True)`": {
            _THAW_LAST: "model.model.layers[number].requires_grad = True",
            _THAW_FIRST: "model.model.layers[position].requires_grad = True",
        },
        "the parameters were replaced by new ones: an optimizer that holds the old ones would train nothing": {
            _FREEZE_LAST: (
                "for module in model.modules():\n        for own, old in list(module._parameters.items()):\n"
                "            if old is not None: module._parameters[own] = nn.Parameter(old.detach(), requires_grad=False)"
            ),
        },
        "a count that is negative, or larger than the number of layers, goes unnoticed: raise a ValueError": {
            "if count < 0 or count > total:": "if False:",
            "if not 0 <= count <= depth:": "if False:",
        },
        "a refused count has frozen the model all the same: look at the count before you change anything": {
            _REFUSE_LAST: "",
            _NORM_LAST: _REFUSE_LAST + _NORM_LAST,
        },
    },
    variants={
        "slices": """
            def train_last(model, count):
                layers = model.model.layers
                if not 0 <= count <= len(layers):
                    raise ValueError(count)
                model.requires_grad_(False)
                layers[len(layers) - count :].requires_grad_(True)
                model.model.norm.requires_grad_(True)

            def train_first(model, count):
                layers = model.model.layers
                if not 0 <= count <= len(layers):
                    raise ValueError(count)
                model.requires_grad_(False)
                layers[:count].requires_grad_(True)
                model.model.norm.requires_grad_(True)
        """,
        "one helper": """
            def train_these(model, wanted):
                model.requires_grad_(False)
                for module in (*wanted, model.model.norm):
                    module.requires_grad_()

            def train_last(model, count):
                if count not in range(model.config.num_hidden_layers + 1):
                    raise ValueError("no such count")
                train_these(model, list(model.model.layers)[::-1][:count])

            def train_first(model, count):
                if count not in range(model.config.num_hidden_layers + 1):
                    raise ValueError("no such count")
                train_these(model, list(model.model.layers)[:count])
        """,
        "by name": """
            def by_name(model, numbers, count):
                if count < 0 or count > len(model.model.layers):
                    raise ValueError
                chosen = tuple(f"model.layers.{number}." for number in numbers)
                for name, parameter in model.named_parameters():
                    parameter.requires_grad = name.startswith(chosen) or name == "model.norm.weight"

            def train_last(model, count):
                total = len(model.model.layers)
                by_name(model, range(total - count, total), count)

            def train_first(model, count):
                by_name(model, range(count), count)
        """,
        "in one pass": {
            _FREEZE_LAST: "model.requires_grad_(False)",
            f"if {_IS_LAST}:\n            {_THAW_LAST}": f"model.model.layers[number].requires_grad_({_IS_LAST})",
        },
    },
)


# ======================================================================================================================
# 2. train_last and train_first: measured memory
# ======================================================================================================================
def drive_freezing_memory(train_last, train_first, sizes, tied, dtype, seed, count, input_ids):
    """For each end, take a training step with an optimizer that was built before, over all of the model's parameters."""
    import torch

    from peftlab.llama import Llama, LlamaConfig, causal_loss
    from peftlab.memory import tensors_of_step

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Llama(LlamaConfig(*sizes, tie_word_embeddings=tied)).to(getattr(torch, dtype))
    seen = {}
    for name, function in (("train_last", train_last), ("train_first", train_first)):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        function(model, count)
        seen[name] = tensors_of_step(
            lambda: causal_loss(model, input_ids, input_ids), model.parameters(), optimizer, not_counted=[input_ids]
        )
        seen[name]["names"] = [own for own, parameter in model.named_parameters() if parameter.grad is not None]
        model.zero_grad()
    return seen


def read_freezing_memory(observation: Observation, case: dict) -> Observation:
    """Count the bytes of the tensors that came back."""
    read = {}
    for name in ("train_last", "train_first"):
        seen, after = observation[name], f"after {name}({case['count']})"
        gradients = seen["gradients"]
        read |= {
            f"bytes of gradients {after}": total_bytes(gradients),
            f"bytes of gradients of nothing but zeros {after}": total_bytes(g for g in gradients if not g.any()),
            f"bytes of optimizer state {after}": total_bytes(seen["optimizer state"]),
            f"the list of what has a gradient {after}": parts(seen["names"]),
            f"{SAVED} {after}": total_bytes(seen["saved"]),
        }
    return read


SAVED = "bytes that forward saves for backward"


def freezing_memory_case(
    generator: torch.Generator, layers: tuple[int, int] = (3, 3), count: int = 1, tied: bool = False, dtype: str = "float32"
) -> dict:
    """Return a model's sizes, and how many of its layers to train: fewer than half."""
    sizes = sizes_of_a_llama(generator, layers=layers)
    return {
        "sizes": sizes,
        "tied": tied,
        "dtype": dtype,
        "seed": between(generator, 0, 2**31 - 1),
        "count": count,
        "input_ids": torch.randint(0, sizes[0], (2, between(generator, 6, 8)), generator=generator),
    }


_AT_THE_END = "\n    model.model.embed_tokens.register_forward_hook(lambda module, ids, x: x.requires_grad_())"

check_freezing_memory = Exercise(
    spec=[train_last, train_first],
    driver=drive_freezing_memory,
    reading=read_freezing_memory,
    cases=lambda generator: [freezing_memory_case(generator), freezing_memory_case(generator, layers=(12, 12), count=2)],
    at_most=frozenset(f"{SAVED} after {name}({count})" for name in ("train_last", "train_first") for count in range(9)),
    mistakes={
        "nothing is frozen: there are gradients and optimizer state for the whole model": {
            _FREEZE_LAST: "pass",
            _FREEZE_FIRST: "pass",
        },
        "frozen parameters have gradients of zeros, and AdamW keeps two more zeros for each: ask for none, with requires_grad": {
            _FREEZE_LAST: "for parameter in model.parameters():\n        parameter.register_hook(torch.zeros_like)",
            _FREEZE_FIRST: "for weight in model.parameters():\n        weight.register_hook(torch.zeros_like)",
            _THAW_LAST: "for parameter in model.model.layers[number].parameters():\n                parameter._backward_hooks.clear()",
            _THAW_FIRST: "for weight in model.model.layers[position].parameters():\n                weight._backward_hooks.clear()",
        },
        "gradients of frozen parameters are computed and then thrown away: forward still saves all that they take": {
            _FREEZE_LAST: (
                "keep = ('model.norm.', *(f'model.layers.{number}.' for number in range(total - count, total)))\n"
                "    for name, own in model.named_parameters():\n        if not name.startswith(keep): "
                "own.register_post_accumulate_grad_hook(lambda p: setattr(p, 'grad', None))"
            ),
        },
        "train_last trains one layer too many": {_IS_LAST: "number >= total - count - 1"},
        "train_first trains one layer too many": {_IS_FIRST: "position <= count"},
        "`model.layers.1` also begins the names of layers 10 to 19: put the dot after the number": {
            _IS_FIRST: _IS_FIRST_BY_PREFIX,
        },
        "train_last trains the first layers: as many gradients, but backward goes all the way down": {
            _IS_LAST: _IS_FIRST.replace("position", "number"),
        },
        "train_first trains the last layers": {_IS_FIRST: "position >= depth - count"},
        "the embedding is trained, so that backward goes all the way down": {
            _FREEZE_LAST: _FREEZE_LAST.replace("model.parameters()", "model.model.layers.parameters()"),
            _FREEZE_FIRST: _FREEZE_FIRST.replace("model.parameters()", "model.model.layers.parameters()"),
        },
        "the head is trained: it is no part of `model.model`, so freeze `model`": {
            _FREEZE_LAST: _FREEZE_LAST.replace("model.parameters()", "model.model.parameters()"),
            _FREEZE_FIRST: _FREEZE_FIRST.replace("model.parameters()", "model.model.parameters()"),
        },
        "every norm is trained: they are tiny, but the lowest of them makes backward go all the way down": {
            _NORM_LAST: 'for name, own in model.named_parameters(): own.requires_grad |= "norm" in name',
            _NORM_FIRST: 'for name, own in model.named_parameters(): own.requires_grad |= "norm" in name',
        },
        "the embedding's output is made to require a gradient, so that backward goes all the way down for nothing": {
            _NORM_LAST: _NORM_LAST + _AT_THE_END,
            _NORM_FIRST: _NORM_FIRST + _AT_THE_END,
        },
        "the parameters were replaced by new ones, and the optimizer, which holds the old ones, trains nothing": {
            _FREEZE_LAST: (
                "for module in model.modules():\n        for own, old in list(module._parameters.items()):\n"
                "            if old is not None: module._parameters[own] = nn.Parameter(old.detach(), requires_grad=False)"
            ),
        },
    },
    variants=check_train_last.variants,
)


# ======================================================================================================================
# 3. train_only, and ties
# ======================================================================================================================
def train_only(
    model: Llama, *, layers: Sequence[int] = (), embedding: bool = False, head: bool = False, norm: bool = False
) -> None:
    """Train the named parts of the model and nothing else; refuse to train one end of a tie without the other."""
    embedding_weight = model.model.embed_tokens.weight
    head_weight = model.lm_head.weight
    if head_weight is embedding_weight and embedding != head:
        raise ValueError("embedding and head are tied, one parameter: train both or none")
    for parameter in model.parameters():
        parameter.requires_grad = False
    embedding_weight.requires_grad = embedding
    head_weight.requires_grad = head
    model.model.norm.weight.requires_grad = norm
    for number, layer in enumerate(model.model.layers):
        if number in layers:
            for parameter in layer.parameters():
                parameter.requires_grad = True


def drive_train_only(train_only, sizes, tie, seed, requests):
    """Ask for one set of parts after the other; return what each call leaves trainable, or what it raises."""
    import torch
    from torch import nn

    from peftlab.llama import Llama, LlamaConfig

    in_config, in_truth = tie
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Llama(LlamaConfig(*sizes, tie_word_embeddings=in_config))
    if in_truth:
        model.lm_head.weight = model.model.embed_tokens.weight
    elif in_config:
        model.lm_head.weight = nn.Parameter(model.model.embed_tokens.weight.detach().clone())
    held = dict(model.named_parameters(remove_duplicate=False))
    seen = []
    for request in requests:
        try:
            train_only(model, **request)
            error = "nothing"
        except NotImplementedError:
            raise
        except Exception as raised:
            error = "ValueError" if isinstance(raised, ValueError) else f"{type(raised).__name__}: {raised}"
        seen.append([error, [own for own, parameter in model.named_parameters() if parameter.requires_grad]])
    now = dict(model.named_parameters(remove_duplicate=False))
    return {
        "seen": seen,
        "the model still has the parameters that it had": list(now) == list(held)
        and all(now[own] is held[own] for own in held),
    }


TIES = {
    (False, False): "untied",
    (True, True): "tied",
    (True, False): "untied by hand against the config",
    (False, True): "tied by hand against the config",
}


def read_train_only(observation: Observation, case: dict) -> Observation:
    """Name what was asked for, and the parts instead of the parameters."""
    read = {}
    for number, (request, (error, names)) in enumerate(zip(case["requests"], observation["seen"], strict=True), 1):
        asked = ", ".join(f"{name}={value}" for name, value in request.items())
        where = f"call {number}, train_only(model, {asked}), with embedding and head {TIES[tuple(case['tie'])]}"
        read[f"what is raised by {where}"] = error
        read[f"the list of what requires a gradient after {where}"] = parts(names)
    return read | {
        "the model still has the parameters that it had": observation["the model still has the parameters that it had"]
    }


def train_only_case(generator: torch.Generator, tie: tuple[bool, bool]) -> dict:
    """Return a model's sizes and requests: for some layers, for either end alone, for both, for none.

    Args:
        tie: whether config and model say that embedding and head are tied. Ends untied by hand have equal values.
    """
    sizes = sizes_of_a_llama(generator, layers=(12, 13))  # the name of layer 1 begins that of layer 10
    order = torch.randperm(sizes[3], generator=generator).tolist()
    if order[:2] == [0, 1]:  # "which layers" must differ from "how many"
        order[:2] = order[1::-1]
        order[0], order[-1] = order[-1], order[0]
    return {
        "sizes": sizes,
        "tie": list(tie),
        "seed": between(generator, 0, 2**31 - 1),
        "requests": [
            {"layers": order[:2], "norm": True},
            {"embedding": True},
            {"layers": order[2:3], "embedding": True, "head": True},
            {"head": True, "norm": True},
            {"layers": [1]},
        ],
    }


_TIED = "head_weight is embedding_weight"
_REFUSE_TIE = f'if {_TIED} and embedding != head:\n        raise ValueError("embedding and head are tied, one parameter: train both or none")\n    '
_FREEZE_ONLY = "for parameter in model.parameters():\n        parameter.requires_grad = False"
_ENDS = "embedding_weight.requires_grad = embedding\n    head_weight.requires_grad = head"

check_train_only = Exercise(
    spec=[train_only],
    driver=drive_train_only,
    reading=read_train_only,
    cases=lambda generator: [train_only_case(generator, tie) for tie in TIES],
    mistakes={
        "one end of a tie is frozen with the other: `head=False` has frozen the embedding that was to be trained": {
            _REFUSE_TIE: "",
        },
        "one end of a tie is trained with the other: who asks for the embedding gets the head too, and is not told": {
            _REFUSE_TIE: "",
            _ENDS: "embedding_weight.requires_grad |= embedding\n    head_weight.requires_grad |= head",
        },
        "the config is asked whether the two are tied: ask the model, for a tie can be made and cut by hand": {
            _TIED: "model.config.tie_word_embeddings",
        },
        "one end alone is refused where nothing is tied": {f"if {_TIED} and embedding": "if embedding"},
        "equal values are taken for a tie: two tensors can be equal and not the same, so use `is`": {
            _TIED: "torch.equal(head_weight, embedding_weight)",
        },
        "the tie was cut to train one end alone: the model then has more parameters than before, and other logits later on": {
            'raise ValueError("embedding and head are tied, one parameter: train both or none")': (
                "head_weight = model.lm_head.weight = nn.Parameter(head_weight.detach().clone())"
            ),
        },
        "a tied embedding without its head is not refused: raise a ValueError for either end alone": {
            "embedding != head:": "head and not embedding:",
        },
        "a tied head without its embedding is not refused: raise a ValueError for either end alone": {
            "embedding != head:": "embedding and not head:",
        },
        "both ends of a tie at once are refused: that can be done, and should": {"embedding != head:": "(embedding or head):"},
        "a refused request has frozen the model all the same: look for the tie before you change anything": {
            _REFUSE_TIE: "",
            "embedding_weight.requires_grad = embedding\n": _REFUSE_TIE + "embedding_weight.requires_grad = embedding\n",
        },
        "as many layers as `layers` has entries are trained: it lists their numbers": {
            "if number in layers:": "if number < len(layers):",
        },
        "`model.layers.1` also begins the names of layers 10 to 19: put the dot after the number": {
            "if number in layers:": "if any(str(number).startswith(str(chosen)) for chosen in layers):",
        },
        "what an earlier call has thawed stays trainable: freeze everything first": {
            _FREEZE_ONLY: (
                "for parameter in model.parameters():\n"
                "        parameter.requires_grad = parameter.requires_grad and not all(p.requires_grad for p in model.parameters())"
            ),
        },
    },
    variants={
        "by data_ptr": {_TIED: "head_weight.data_ptr() == embedding_weight.data_ptr()"},
        "modules": {
            _FREEZE_ONLY: "model.requires_grad_(False)",
            _ENDS: "model.model.embed_tokens.requires_grad_(embedding)\n    model.lm_head.requires_grad_(head)",
        },
        "by name": """
            def train_only(model, *, layers=(), embedding=False, head=False, norm=False):
                names = [name for name, _ in model.named_parameters()]
                if "lm_head.weight" not in names and (embedding, head) in [(True, False), (False, True)]:
                    raise ValueError("tied")
                chosen = {f"layers.{number}" for number in layers}
                chosen |= {part for part, on in (("embed_tokens", embedding), ("lm_head", head), ("norm", norm)) if on}
                for name, parameter in model.named_parameters():
                    pieces = name.removeprefix("model.").split(".")
                    part = ".".join(pieces[:2]) if pieces[0] == "layers" else pieces[0]
                    parameter.requires_grad = part in chosen
        """,
        "a set of parameters": """
            def train_only(model, *, layers=(), embedding=False, head=False, norm=False):
                ends = {id(model.model.embed_tokens.weight), id(model.lm_head.weight)}
                if len(ends) == 1 and bool(embedding) is not bool(head):
                    raise ValueError("these two are one")
                wanted = [model.model.layers[number] for number in layers]
                wanted += [model.model.embed_tokens] * embedding + [model.lm_head] * head + [model.model.norm] * norm
                trained = {id(parameter) for module in wanted for parameter in module.parameters()}
                for parameter in model.parameters():
                    parameter.requires_grad_(id(parameter) in trained)
        """,
    },
)


# ======================================================================================================================
# 4. numbers_kept: what each layer leaves for backward
# ======================================================================================================================
def numbers_kept(config: LlamaConfig, layers: Sequence[int], embedding: bool = False) -> list[int]:
    """Return how many numbers per token each decoder layer keeps for backward, if these layers are trained."""
    hidden, wide = config.hidden_size, config.intermediate_size
    key_value = config.num_key_value_heads * config.head_dim
    lowest = -1 if embedding else min(layers, default=config.num_hidden_layers)
    answer = []
    for layer in range(config.num_hidden_layers):
        kept = 0
        if layer >= lowest:
            kept += hidden + 2 * key_value  # queries, keys and values, for attention
            kept += hidden + config.num_attention_heads  # what attention gives, and a log-sum per head
            kept += hidden + 1  # the second norm: its input, and what that is multiplied by
            kept += 3 * wide  # gate, up and silu(gate), for the two nonlinear products
        if layer > lowest:
            kept += hidden + 1  # the first norm, whose input wants a gradient
        if layer in layers:
            kept += 2 * hidden + 2 * hidden  # of each norm, for its gain and for the projections that read it
            kept += wide  # what the down projection reads
        answer.append(kept)
    return answer


def drive_numbers_kept(numbers_kept, sizes, tied, seed, requests, measure):
    """Return the answer for each request and, if asked to measure, what a real Llama of that size keeps."""
    import torch

    from peftlab.llama import Llama, LlamaConfig, rotary_angles

    config = LlamaConfig(*sizes, tie_word_embeddings=tied)
    answers, measured = [], []
    for layers, embedding in requests:
        answer = numbers_kept(config, list(layers), embedding) if embedding else numbers_kept(config, list(layers))
        if not isinstance(answer, (list, tuple)):
            answers.append(type(answer).__name__)
        elif not all(hasattr(number, "__float__") for number in answer):
            answers.append("a list of other things")
        else:
            answers.append([float(number) for number in answer])
    if not measure:
        return {"answers": answers}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Llama(config)
        batch, length = 2, 5
        input_ids = torch.randint(0, config.vocab_size, (batch, length))
    angles = rotary_angles(torch.arange(length), config.head_dim, config.rope_theta)
    for layers, embedding in requests:
        model.requires_grad_(False)
        model.model.embed_tokens.requires_grad_(embedding)
        for number in layers:
            model.model.layers[number].requires_grad_(True)
        there_anyway = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *angles)}
        x, counts, alive = model.model.embed_tokens(input_ids), [], []
        for layer in model.model.layers:
            kept = {}

            def note(tensor, kept=kept, alive=alive):
                alive.append(tensor)
                kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
                return tensor

            alive.append(x)
            with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
                x = layer(x, *angles, None)
            size = sum(size for pointer, size in kept.items() if pointer not in there_anyway)
            counts.append(size / (4 * batch * length))
        measured.append(counts)
    return {"answers": answers, "measured": measured}


def situation(layer: int, layers: Sequence[int], embedding: bool) -> str:
    """Return in which of the four situations of the notebook a layer is."""
    lowest = -1 if embedding else min(layers, default=layer + 1)
    if layer in layers:
        return "trained, the lowest of all" if layer == lowest else "trained, and something below it is trained too"
    return "frozen, above a trained one" if layer > lowest else "frozen, below every trained one"


def read_numbers_kept(observation: Observation, case: dict) -> Observation:
    """Put each answer beside its request, by the layers' situations; then say whether measurement agrees."""
    tie = ", tie_word_embeddings=True" if case["tied"] else ""
    config, count = f"LlamaConfig({', '.join(map(str, case['sizes']))}{tie})", case["sizes"][3]
    read = {}
    for (layers, embedding), answer in zip(case["requests"], observation["answers"], strict=True):
        call = f"numbers_kept({config}, {layers}{', embedding=True' if embedding else ''})"
        is_list = isinstance(answer, list)
        read[f"what {call} returns"] = "a list of numbers" if is_list else answer
        read[f"the length of {call}"] = len(answer) if is_list else 0
        kinds: dict[str, list[int]] = {}
        for layer in range(count):
            kinds.setdefault(situation(layer, layers, embedding), []).append(layer)
        for kind, entries in kinds.items():
            numbers = [answer[entry] for entry in entries if entry < len(answer)] if is_list else []
            read[f"the list of entries {entries} ({kind}) of {call}"] = [int(n) if n.is_integer() else n for n in numbers]
    if case["measure"]:
        read["the lists are what a real Llama keeps"] = observation["answers"] == observation["measured"]
    return read


def kept_case(generator: torch.Generator, measure: bool = False, tied: bool = True) -> dict:
    """Return a model's sizes and sets of trained layers: none, all, the embedding alone, and random ones with gaps.

    A tie is in the config, and tells nothing: what is trained stands in the request.
    """
    sizes = sizes_of_a_llama(generator, layers=(5, 6))
    layers = sizes[3]
    low, high = between(generator, 1, layers - 4), between(generator, layers - 2, layers - 1)
    chosen = [
        [[low, high], False],
        [[high], True],
        [[layers - 1, layers - 2], False],
        [[0], False],
        [[], True],
        [list(range(layers)), False],
        [[], False],
    ]
    seed = between(generator, 0, 2**31 - 1)
    return {"sizes": sizes, "tied": tied, "seed": seed, "requests": chosen, "measure": measure}


_QKV = "kept += hidden + 2 * key_value "
_ATTENDED = "kept += hidden + config.num_attention_heads "
_SECOND_NORM = "kept += hidden + 1  # the second norm"
_FIRST_NORM = "kept += hidden + 1  # the first norm"
_MLP = "kept += 3 * wide "
_NORMED = "kept += 2 * hidden + 2 * hidden "
_PRODUCT = "kept += wide  # what"
_REACHED, _INPUT, _LEARNS = "if layer >= lowest:", "if layer > lowest:", "if layer in layers:"
_EMPTY = "min(layers, default=config.num_hidden_layers)"

check_numbers_kept = Exercise(
    spec=[numbers_kept],
    driver=drive_numbers_kept,
    reading=read_numbers_kept,
    cases=lambda generator: [kept_case(generator, tied=False), kept_case(generator)],
    mistakes={
        "a frozen layer keeps nothing here: above a trained one the gradient has to pass through it, and needs what it saw": {
            _REACHED: "if layer in layers:",
            _INPUT: "if layer in layers and layer > lowest:",
        },
        "a frozen layer keeps as much as a trained one here: what only a weight's gradient needs is dropped": {
            _LEARNS: "if layer >= lowest:",
        },
        "layers below the lowest trained one keep something here: backward never comes there": {
            _REACHED: "if True:",
            _INPUT: "if True:",
        },
        "a trained embedding is overlooked: then backward goes through every layer": {"-1 if embedding else ": ""},
        "the config's tie is taken for a trained embedding: only `embedding` says so": {
            "-1 if embedding else": "-1 if embedding or config.tie_word_embeddings else",
        },
        "a trained embedding is taken for a trained layer 0: that layer only passes the gradient on": {
            _LEARNS: "if layer in layers or (embedding and layer == 0):",
        },
        "the lowest trained layer keeps the input of its first norm here: nothing below wants a gradient, so it is dropped": {
            _INPUT: "if layer >= lowest:",
        },
        "the lowest trained layer keeps nothing of its second norm's input here: what attention adds to it wants a gradient": {
            _SECOND_NORM: "kept += 0 if layer == lowest else hidden + 1  # the second norm",
        },
        "keys and values are counted as wide as the queries: they have num_key_value_heads * head_dim numbers each": {
            _QKV: "kept += 3 * hidden ",
        },
        "keys and values are left out: attention keeps them beside the queries": {_QKV: "kept += hidden "},
        "what attention keeps of its softmax is left out: one number a head, the logarithm of the sum": {
            _ATTENDED: "kept += hidden ",
        },
        "the output of attention is left out: attention keeps it for its own backward": {
            _ATTENDED: "kept += config.num_attention_heads ",
        },
        "the output of attention is left out where the layer is frozen: attention needs it for its own backward there too": {
            _ATTENDED: "kept += (hidden if layer in layers else 0) + config.num_attention_heads ",
        },
        "the output of attention is counted again for o_proj, where that is trained: it is one and the same tensor": {
            _NORMED: "kept += hidden + 2 * hidden + 2 * hidden ",
        },
        "what a norm's input is multiplied by is left out: it is one number a token": {
            _SECOND_NORM: "kept += hidden  # the second norm",
            _FIRST_NORM: "kept += hidden  # the first norm",
        },
        "what a norm's input is multiplied by is counted as `hidden` numbers: it is one number a token": {
            _SECOND_NORM: "kept += 2 * hidden  # the second norm",
            _FIRST_NORM: "kept += 2 * hidden  # the first norm",
        },
        "what the first norm's input is multiplied by is counted as `hidden` numbers: it is one number a token": {
            _FIRST_NORM: "kept += 2 * hidden  # the first norm",
        },
        "what the second norm's input is multiplied by is counted as `hidden` numbers: it is one number a token": {
            _SECOND_NORM: "kept += 2 * hidden  # the second norm",
        },
        "each norm's output is counted once: before the gain for the gain's gradient, and after it for the projections'": {
            _NORMED: "kept += 2 * hidden ",
        },
        "the outputs of the norms are left out: the gain and the projections of a trained layer need them": {
            _NORMED: "kept += 0 "
        },
        "frozen norms keep their products here: these are kept for the gradient of a gain, or of a weight that reads them": {
            _FIRST_NORM: "kept += hidden + 1 + (0 if layer in layers else 2 * hidden)  # the first norm",
        },
        "a frozen layer keeps one product of a norm here: it is kept for the gradient of the gain, or of a weight that reads it": {
            _FIRST_NORM: "kept += hidden + 1 + (0 if layer in layers else hidden)  # the first norm",
        },
        "what the second norm's input is multiplied by is left out in the lowest trained layer": {
            _SECOND_NORM: "kept += hidden + (layer > lowest)  # the second norm",
        },
        "the MLP keeps three wide vectors even where it is frozen: gate, up and silu(gate) make the product": {
            _MLP: "kept += (3 if layer in layers else 2) * wide ",
        },
        "the product that down_proj reads is left out: its gradient needs it where it is trained": {
            _PRODUCT: "kept += 0  # what"
        },
        "the product that down_proj reads is counted where down_proj is frozen: only its weight's gradient needs it": {
            _MLP: "kept += 4 * wide ",
            _PRODUCT: "kept += 0  # what",
        },
        "the list begins with the last layer: it should begin with layer 0": {"return answer": "return answer[::-1]"},
        "the sum over the layers is returned: a list, one number a layer": {"return answer": "return sum(answer)"},
        "no trained layer at all is not provided for: then nothing is kept": {_EMPTY: "min(layers)"},
        "bytes are returned: count numbers per token": {"return answer": "return [4 * kept for kept in answer]"},
        "the first entry of `layers` is taken for the lowest: they come in any order": {
            _EMPTY: "(layers[0] if layers else config.num_hidden_layers)",
        },
    },
    variants={
        "a sum of three kinds": """
            def numbers_kept(config, layers, embedding=False):
                h, m, kv = config.hidden_size, config.intermediate_size, config.head_dim * config.num_key_value_heads
                passing = 3 * h + 2 * kv + config.num_attention_heads + 1 + 3 * m
                result, wanted = [], embedding
                for number in range(config.num_hidden_layers):
                    learns = number in set(layers)
                    below, wanted = wanted, wanted or learns
                    result.append(wanted * passing + below * (h + 1) + learns * (4 * h + m))
                return result
        """,
        "a comprehension": """
            def numbers_kept(config, layers, embedding=False):
                h, m, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
                kv = h * config.num_key_value_heads // heads
                wants = [embedding or any(low < number for low in layers) for number in range(config.num_hidden_layers)]
                return [
                    (w or n in layers) * (3 * h + 3 * m + 2 * kv + heads + 1) + w * (h + 1) + (n in layers) * (4 * h + m)
                    for n, w in enumerate(wants)
                ]
        """,
        "tensor by tensor": """
            def numbers_kept(config, layers, embedding=False):
                h, m, d = config.hidden_size, config.intermediate_size, config.head_dim
                kept = []
                input_wants = bool(embedding)
                for number in range(config.num_hidden_layers):
                    trained, count = number in layers, 0
                    inside = input_wants or trained
                    for norm_input_wants in (input_wants, inside):
                        if norm_input_wants:
                            count += h + 1
                        if trained:
                            count += h
                            count += h
                    if inside:
                        count += (config.num_attention_heads + 2 * config.num_key_value_heads) * d
                        count += config.num_attention_heads * (d + 1)
                        for _ in ("gate", "up", "silu"):
                            count += m
                    if trained:
                        count += m
                    kept.append(count)
                    input_wants = inside
                return tuple(kept)
        """,
    },
)


# ======================================================================================================================
# 5. save_trained and load_trained
# ======================================================================================================================
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
        with open(path, "rb") as file:
            content = torch.frombuffer(bytearray(file.read()) or bytearray(1), dtype=torch.uint8).clone()
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


_LOOP = "for name, parameter in model.named_parameters():\n        if parameter.requires_grad:\n            trained[name] = parameter.detach().contiguous()"
_COPY_TRAINED = "for name, tensor in saved.items():\n        own[name].copy_(tensor)"
_FITS = "name not in own or own[name].shape != tensor.shape"
_FIT_LOOP = f'for name, tensor in saved.items():\n        if {_FITS}:\n            raise ValueError(f"{{name}} does not fit this model")\n    '

check_trained_files = Exercise(
    spec=[save_trained, load_trained],
    driver=drive_files,
    reading=read_files,
    cases=lambda generator: [files_case(generator, tied=True)],
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


# ======================================================================================================================
# 6. bug hunt: gradient checkpointing below frozen layers
# ======================================================================================================================
def run_checkpointed(layers: nn.ModuleList, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Run the decoder layers; of those that backward visits, keep the input alone and compute the rest again."""
    for layer in layers:
        visited = x.requires_grad or any(parameter.requires_grad for parameter in layer.parameters())
        x = checkpoint(layer, x, cos, sin, None, use_reentrant=False) if visited else layer(x, cos, sin, None)
    return x


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


OUTPUT, GRADIENTS = "the output of the last layer", "the joined vector of all gradients"


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
    driver=drive_checkpointed,
    reading=read_checkpointed,
    cases=lambda generator: [checkpointed_case(generator, "middle"), checkpointed_case(generator, "embedding")],
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

EXERCISES = {name: exercise for name, exercise in globals().items() if isinstance(exercise, Exercise)}
"""Every exercise of the unit, by the name of its check."""
