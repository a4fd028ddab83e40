"""`train_last` and `train_first`: what learns."""

import torch

from autograder.cases import between
from autograder.checks.layer_freezing.cases import parts, sizes_of_a_llama
from autograder.checks.layer_freezing.last_and_first import (
    FREEZE_FIRST,
    FREEZE_LAST,
    IS_FIRST,
    IS_FIRST_BY_PREFIX,
    IS_LAST,
    NORM_FIRST,
    NORM_LAST,
    THAW_FIRST,
    THAW_LAST,
    train_first,
    train_last,
)
from autograder.drive import Observation
from autograder.exercise import Exercise


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


_REFUSE_LAST = 'if count < 0 or count > total:\n        raise ValueError(f"there are {total} layers, not {count}")\n    '

check_train_last = Exercise(
    spec=[train_last, train_first],
    cases=lambda generator: [freezing_case(generator, tied=False)],
    driver=drive_freezing,
    reading=read_freezing,
    mistakes={
        "train_last trains the first layers: layer 0 reads the embedding, and the last one has the highest number": {
            IS_LAST: IS_FIRST.replace("position", "number"),
        },
        "train_first trains the last layers: layer 0, which reads the embedding, is the first": {
            IS_FIRST: "position >= depth - count",
        },
        "with a count of 0 every layer is trained: `layers[-0:]` is the whole list": {
            IS_LAST: f"count == 0 or {IS_LAST}",
        },
        "train_last trains one layer too many": {IS_LAST: "number >= total - count - 1"},
        "train_first trains one layer too many": {IS_FIRST: "position <= count"},
        "`model.layers.1` also begins the names of layers 10 to 19: put the dot after the number": {
            IS_FIRST: IS_FIRST_BY_PREFIX,
        },
        "a count of 0 is refused: it is allowed, and trains the final norm alone": {
            "if count < 0 or": "if count <= 0 or",
            "if not 0 <= count": "if not 0 < count",
        },
        "the number of layers is refused as a count: it is allowed, and trains them all": {
            "or count > total:": "or count >= total:",
            "<= count <= depth:": "<= count < depth:",
        },
        "the final norm, `model.model.norm`, stays frozen: both functions train it": {NORM_LAST: "pass", NORM_FIRST: "pass"},
        "nothing is frozen: set `requires_grad` of every parameter to False before you thaw some": {
            FREEZE_LAST: "pass",
            FREEZE_FIRST: "pass",
        },
        "the embedding is not frozen: freeze the whole model, not its decoder layers alone": {
            FREEZE_LAST: FREEZE_LAST.replace("model.parameters()", "model.model.layers.parameters()"),
            FREEZE_FIRST: FREEZE_FIRST.replace("model.parameters()", "model.model.layers.parameters()"),
        },
        "the head is not frozen: it is no part of `model.model`, so freeze `model`": {
            FREEZE_LAST: FREEZE_LAST.replace("model.parameters()", "model.model.parameters()"),
            FREEZE_FIRST: FREEZE_FIRST.replace("model.parameters()", "model.model.parameters()"),
        },
        "what an earlier call froze stays frozen: a layer that is chosen has to be thawed": {
            THAW_LAST: "pass",
            THAW_FIRST: "pass",
            FREEZE_LAST: (
                "for name, own in model.named_parameters():\n"
                "        own.requires_grad &= name.split('.')[2] in [str(n) for n in range(total - count, total)]"
            ),
            FREEZE_FIRST: (
                "for name, own in model.named_parameters():\n"
                "        own.requires_grad &= name.split('.')[2] in [str(n) for n in range(count)]"
            ),
        },
        "`requires_grad = True` was set on a layer, which has no such switch: use `layer.requires_grad_(True)`": {
            THAW_LAST: "model.model.layers[number].requires_grad = True",
            THAW_FIRST: "model.model.layers[position].requires_grad = True",
        },
        "the parameters were replaced by new ones: an optimizer that holds the old ones would train nothing": {
            FREEZE_LAST: (
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
            NORM_LAST: _REFUSE_LAST + NORM_LAST,
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
            FREEZE_LAST: "model.requires_grad_(False)",
            f"if {IS_LAST}:\n            {THAW_LAST}": f"model.model.layers[number].requires_grad_({IS_LAST})",
        },
    },
)
