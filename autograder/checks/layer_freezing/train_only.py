"""`train_only`, and ties."""

from collections.abc import Sequence

import torch

from autograder.cases import between
from autograder.checks.layer_freezing.cases import parts, sizes_of_a_llama
from autograder.drive import Observation
from autograder.exercise import Exercise
from peftlab.llama import Llama


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


TIES = {
    (False, False): "untied",
    (True, True): "tied",
    (True, False): "untied by hand against the config",
    (False, True): "tied by hand against the config",
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


_TIED = "head_weight is embedding_weight"
_REFUSE_TIE = f'if {_TIED} and embedding != head:\n        raise ValueError("embedding and head are tied, one parameter: train both or none")\n    '
_FREEZE_ONLY = "for parameter in model.parameters():\n        parameter.requires_grad = False"
_ENDS = "embedding_weight.requires_grad = embedding\n    head_weight.requires_grad = head"

check_train_only = Exercise(
    spec=[train_only],
    cases=lambda generator: [train_only_case(generator, tie) for tie in TIES],
    driver=drive_train_only,
    reading=read_train_only,
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
