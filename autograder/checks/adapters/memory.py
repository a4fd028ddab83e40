"""The bytes that an adapter takes."""

import torch

from autograder.cases import between, total_bytes
from autograder.checks.adapters.adapter import CHANGE, DOWN, GELU, SQUEEZED, START_DOWN, START_UP_BIAS, SUM, UP, Adapter
from autograder.checks.adapters.helpers import tensors_kept
from autograder.drive import Observation
from autograder.exercise import Exercise


def adapter_memory_case(generator: torch.Generator) -> dict:
    """Return sizes, no two of them equal."""
    return {"hidden": between(generator, 60, 90), "bottleneck": between(generator, 7, 12), "rows": between(generator, 40, 50)}


def drive_adapter_memory(Adapter, hidden, bottleneck, rows):
    """Take a training step; return what is there after it, and what forward kept for backward."""
    import torch

    from peftlab.memory import tensors_of_step

    adapter = Adapter(hidden, bottleneck)
    h = torch.ones(rows, hidden, requires_grad=True)  # its gradient is wanted by the layers below
    optimizer = torch.optim.AdamW([p for p in adapter.parameters() if p.requires_grad], lr=1e-3)
    returned = adapter(h.detach().clone())
    if not torch.is_tensor(returned):
        return {"returned": repr(returned)[:100]}
    tensors = tensors_of_step(lambda: adapter(h).sum(), adapter.parameters(), optimizer, not_counted=[h])
    return tensors | {"returned": "a tensor", "kept": tensors_kept(adapter)}


WEIGHTS = "the bytes of weights and of tensors that are kept as buffers or attributes"
_SAVED = "the bytes that forward saves for backward besides h and the weights"


def read_adapter_memory(observation: Observation, case: dict) -> Observation:
    """Count the bytes of the tensors that came back."""
    if "kept" not in observation:
        return {"what forward returns": observation["returned"]}
    return {
        "what forward returns": observation["returned"],
        "the bytes of gradients": total_bytes(observation["gradients"]),
        "the bytes of optimizer state": total_bytes(observation["optimizer state"]),
        WEIGHTS: total_bytes(observation["kept"]),
        _SAVED: total_bytes(observation["saved"]),
    }


check_adapter_memory = Exercise(
    spec=[Adapter],
    cases=lambda generator: [adapter_memory_case(generator)],
    driver=drive_adapter_memory,
    helpers=[tensors_kept],
    reading=read_adapter_memory,
    # Gradients and optimizer state belong to the four parameters, and are counted to the byte; a plain number that is kept as
    # a buffer may weigh something.
    tolerance=lambda case: {WEIGHTS: 64},
    at_most=frozenset({WEIGHTS, _SAVED}),
    mistakes={
        "GELU is written out, and every step of it keeps a tensor for backward: F.gelu keeps its input alone": {
            GELU: "squeezed * 0.5 * (1 + torch.erf(squeezed / 2**0.5))"
        },
        "GELU comes last, and keeps `hidden` numbers a token: it belongs between down and up, on the few": {
            SUM: "return F.gelu(h + change) + F.gelu(change)"
        },
        "a copy of h is kept for backward: hand h itself to down": {SQUEEZED: SQUEEZED.replace("(h,", "(h.clone(),")},
        "the computation is done in fp64, and the copies are kept for backward": {
            SQUEEZED: "h.double() @ self.down.weight.double().T + self.down.bias",
            CHANGE: "bent @ self.up.weight.double().T + self.up.bias",
            SUM: "return (h + change).to(h.dtype)",
        },
        "down and up are in fp64: twice the bytes of weights, gradients and optimizer state": {
            SQUEEZED: "h @ self.down.weight.to(h.dtype).T + self.down.bias.to(h.dtype)",
            CHANGE: "bent @ self.up.weight.to(h.dtype).T + self.up.bias.to(h.dtype)",
            START_UP_BIAS: START_UP_BIAS + "\n        self.double()",
        },
        "the bottleneck is not the one asked for: down and up are twice as large as they should be": {
            DOWN: "nn.Linear(hidden, 2 * bottleneck)",
            UP: "nn.Linear(2 * bottleneck, hidden)",
        },
        "there is no bottleneck: down keeps all `hidden` numbers": {
            DOWN: "nn.Linear(hidden, hidden)",
            UP: "nn.Linear(hidden, hidden)",
        },
        "dropout keeps a mask for backward: it has no place in this adapter": {
            GELU: "F.dropout(F.gelu(squeezed), 0.1, self.training)"
        },
        "the change is multiplied by a learned scale, and all of it is kept for backward: an adapter has no scale": {
            START_UP_BIAS: START_UP_BIAS + "\n        self.scale = nn.Parameter(torch.ones(()))",
            SUM: "return h + self.scale * change",
        },
        "the change is made by a whole hidden × hidden matrix: multiply by down first, then by up": {
            CHANGE: "h @ (self.up.weight @ self.down.weight).T + self.up.bias + 0 * bent.sum()",
        },
        "the last change is kept as an attribute: it stays in memory until the next one": {
            SUM: "self.change = change.detach()\n        return h + change"
        },
        "a copy of down.weight is kept beside it: the layer's own is enough": {
            START_UP_BIAS: START_UP_BIAS + "\n        self.start = self.down.weight.detach().clone()",
        },
        "a part of the adapter is frozen: all four parameters are trained": {
            START_DOWN: START_DOWN + "\n        self.down.bias.requires_grad_(False)",
        },
    },
    variants={
        "in one line": {SQUEEZED: "self.down(h)", CHANGE: "self.up(bent)"},
        "F.linear, and nn.GELU": {
            SQUEEZED: "F.linear(h, self.down.weight, self.down.bias)",
            GELU: "nn.GELU()(squeezed)",
            CHANGE: "F.linear(bent, self.up.weight, self.up.bias)",
            SUM: "return change + h",
        },
        "matrix products": {
            SQUEEZED: "h @ self.down.weight.T + self.down.bias",
            CHANGE: "bent @ self.up.weight.T + self.up.bias",
        },
        "computed again in backward": {
            SQUEEZED: "None",
            GELU: "None",
            CHANGE: ("torch.utils.checkpoint.checkpoint(lambda h: self.up(F.gelu(self.down(h))), h, use_reentrant=False)"),
        },
    },
)
