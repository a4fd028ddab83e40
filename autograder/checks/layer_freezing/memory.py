"""`train_last` and `train_first`: measured bytes."""

import torch

from autograder.cases import between, total_bytes
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
from autograder.checks.layer_freezing.train_last import check_train_last
from autograder.drive import Observation
from autograder.exercise import Exercise


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


SAVED = "bytes that forward saves for backward"


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


_AT_THE_END = "\n    model.model.embed_tokens.register_forward_hook(lambda module, ids, x: x.requires_grad_())"

check_freezing_memory = Exercise(
    spec=[train_last, train_first],
    cases=lambda generator: [freezing_memory_case(generator), freezing_memory_case(generator, layers=(12, 12), count=2)],
    driver=drive_freezing_memory,
    reading=read_freezing_memory,
    at_most=frozenset(f"{SAVED} after {name}({count})" for name in ("train_last", "train_first") for count in range(9)),
    mistakes={
        "nothing is frozen: there are gradients and optimizer state for the whole model": {
            FREEZE_LAST: "pass",
            FREEZE_FIRST: "pass",
        },
        "frozen parameters have gradients of zeros, and AdamW keeps two more zeros for each: ask for none, with requires_grad": {
            FREEZE_LAST: "for parameter in model.parameters():\n        parameter.register_hook(torch.zeros_like)",
            FREEZE_FIRST: "for weight in model.parameters():\n        weight.register_hook(torch.zeros_like)",
            THAW_LAST: "for parameter in model.model.layers[number].parameters():\n                parameter._backward_hooks.clear()",
            THAW_FIRST: "for weight in model.model.layers[position].parameters():\n                weight._backward_hooks.clear()",
        },
        "gradients of frozen parameters are computed and then thrown away: forward still saves all that they take": {
            FREEZE_LAST: (
                "keep = ('model.norm.', *(f'model.layers.{number}.' for number in range(total - count, total)))\n"
                "    for name, own in model.named_parameters():\n        if not name.startswith(keep): "
                "own.register_post_accumulate_grad_hook(lambda p: setattr(p, 'grad', None))"
            ),
        },
        "train_last trains one layer too many": {IS_LAST: "number >= total - count - 1"},
        "train_first trains one layer too many": {IS_FIRST: "position <= count"},
        "`model.layers.1` also begins the names of layers 10 to 19: put the dot after the number": {
            IS_FIRST: IS_FIRST_BY_PREFIX,
        },
        "train_last trains the first layers: as many gradients, but backward goes all the way down": {
            IS_LAST: IS_FIRST.replace("position", "number"),
        },
        "train_first trains the last layers": {IS_FIRST: "position >= depth - count"},
        "the embedding is trained, so that backward goes all the way down": {
            FREEZE_LAST: FREEZE_LAST.replace("model.parameters()", "model.model.layers.parameters()"),
            FREEZE_FIRST: FREEZE_FIRST.replace("model.parameters()", "model.model.layers.parameters()"),
        },
        "the head is trained: it is no part of `model.model`, so freeze `model`": {
            FREEZE_LAST: FREEZE_LAST.replace("model.parameters()", "model.model.parameters()"),
            FREEZE_FIRST: FREEZE_FIRST.replace("model.parameters()", "model.model.parameters()"),
        },
        "every norm is trained: they are tiny, but the lowest of them makes backward go all the way down": {
            NORM_LAST: 'for name, own in model.named_parameters(): own.requires_grad |= "norm" in name',
            NORM_FIRST: 'for name, own in model.named_parameters(): own.requires_grad |= "norm" in name',
        },
        "the embedding's output is made to require a gradient, so that backward goes all the way down for nothing": {
            NORM_LAST: NORM_LAST + _AT_THE_END,
            NORM_FIRST: NORM_FIRST + _AT_THE_END,
        },
        "the parameters were replaced by new ones, and the optimizer, which holds the old ones, trains nothing": {
            FREEZE_LAST: (
                "for module in model.modules():\n        for own, old in list(module._parameters.items()):\n"
                "            if old is not None: module._parameters[own] = nn.Parameter(old.detach(), requires_grad=False)"
            ),
        },
    },
    variants=check_train_last.variants,
)
