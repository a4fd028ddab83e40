"""The loss, over prompt and text."""

import math

import torch
from torch import Tensor

from autograder.cases import between, normal
from autograder.exercise import Exercise
from peftlab.llama import IGNORE


def prompted_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross-entropy of the labels, given logits for the positions of prompt and text."""
    length = logits.shape[1] - labels.shape[1]
    losses = []
    for row in range(labels.shape[0]):
        for place in range(labels.shape[1]):
            label = int(labels[row, place])
            if label != IGNORE:
                predicted_by = length + place - 1
                losses.append(-logits[row, predicted_by].float().log_softmax(-1)[label])
    return torch.stack(losses).mean()


def loss_case(generator: torch.Generator, dtype: torch.dtype = torch.float32, ignored: float = 0.4) -> dict:
    """Return logits and labels; the first token of the first row has a label, and rows have different numbers of them."""
    batch, seq, length, vocabulary = 3, between(generator, 7, 9), between(generator, 4, 6), between(generator, 11, 14)
    labels = torch.randint(0, vocabulary, (batch, seq), generator=generator)
    labels[torch.rand(batch, seq, generator=generator) < ignored] = IGNORE
    labels[0, :2] = torch.tensor([2, 0])
    labels[1, : seq - 2], labels[1, seq - 1] = IGNORE, 1
    labels[2, 1:5] = torch.tensor([3, IGNORE, 0, 5])
    return {"logits": 2 * normal(generator, batch, length + seq, vocabulary, dtype=dtype), "labels": labels}


def drive_loss(prompted_loss, logits, labels):
    """Return the loss and its gradient with respect to the logits."""
    import torch

    given = labels.clone()
    logits.requires_grad_(True)
    loss = prompted_loss(logits, given)
    if not torch.is_tensor(loss):
        return {"what prompted_loss returns": repr(loss)}
    if loss.requires_grad and loss.numel() == 1:
        loss.backward()
    return {
        "what prompted_loss returns": "a tensor",
        "the shape of the loss": list(loss.shape),
        "the loss is in half precision": loss.dtype in (torch.bfloat16, torch.float16),
        "the loss": loss.detach().float(),
        "the gradient of the logits": logits.grad,
        "the labels are left as they were": torch.equal(given, labels),
    }


def loss_tolerance(case: dict) -> dict[str, float]:
    """Bound the rounding, in fp32: a log-softmax over V logits has V + 3 roundings of numbers no larger than twice the largest
    logit plus log V, and the mean one more. A gradient, a softmax divided by the number of labels, is rounded once more to its
    dtype.
    """
    logits, labels = case["logits"], case["labels"]
    vocabulary, counted = logits.shape[-1], (labels != IGNORE).sum().item()
    unit = (vocabulary + counted + 6) * torch.finfo(torch.float32).eps
    return {
        "the loss": unit * (2 * logits.abs().max().item() + math.log(vocabulary)),
        "the gradient of the logits": (unit + torch.finfo(logits.dtype).eps) / counted,
    }


_COUNTED = "if label != IGNORE:"
_PLACE = "length + place - 1"
_LOGITS = "logits[row, predicted_by].float()"
_MEAN = "torch.stack(losses).mean()"

check_prompted_loss = Exercise(
    spec=[prompted_loss],
    cases=lambda generator: [loss_case(generator), loss_case(generator, torch.bfloat16)],
    driver=drive_loss,
    tolerance=loss_tolerance,
    mistakes={
        "each position is compared with its own token: it predicts the next one": {_PLACE: "length + place"},
        "the labels are shifted once too often: the token at t is predicted at t - 1": {_PLACE: "length + place - 2"},
        "the labels are shifted once too often, by the cut and again for the loss: the token at t is predicted at t - 1": {
            _PLACE: "length + place - 2",
            _COUNTED: "if label != IGNORE and place > 0:",
        },
        "the labels are held against the first positions, where the prompt stands: the text's come after these": {
            _PLACE: "place - 1",
            _COUNTED: "if label != IGNORE and place > 0:",
        },
        "the shift goes the wrong way: the token at t is predicted at t - 1, not at t + 1": {
            _PLACE: "min(length + place + 1, logits.shape[1] - 1)"
        },
        "the first token of the text is not counted: the last position of the prompt predicts it": {
            _COUNTED: "if label != IGNORE and place > 0:"
        },
        "the prompt's positions count, with token 0 for a label: extend the labels by IGNORE": {
            "losses = []": "losses = [-logits[row, place].float().log_softmax(-1)[0] for row in range(len(labels)) for place in range(length - 1)]"
        },
        "the mean is taken over all positions: only those with a label count": {
            _MEAN: "torch.stack(losses).sum() / labels.numel()"
        },
        "the mean is taken over the rows' means: every label counts the same, whatever its row": {
            _MEAN: "torch.stack([part.mean() for part in torch.stack(losses).split((labels != IGNORE).sum(1).tolist())]).mean()"
        },
        "the losses are summed: it is their mean": {_MEAN: "torch.stack(losses).sum()"},
        "label 0 is ignored: it is a token as any other, and what is ignored is IGNORE": {
            _COUNTED: "if label not in (IGNORE, 0):"
        },
        "IGNORE is taken for a token: where it stands, nothing is counted": {_COUNTED: "if True:"},
        "the loss is computed in half precision: make the logits fp32 first": {_LOGITS: "logits[row, predicted_by]"},
        "the labels were changed in place: others need them as well": {
            _MEAN: _MEAN + " + 0 * labels.fill_(IGNORE).float().mean()"
        },
    },
    variants={
        "labels extended, as peft does": """
            def prompted_loss(logits, labels):
                length = logits.shape[1] - labels.shape[1]
                extended = torch.cat([labels.new_full((labels.shape[0], length), IGNORE), labels], dim=1)
                shifted = logits[:, :-1].float().flatten(0, 1), extended[:, 1:].flatten()
                return nn.functional.cross_entropy(*shifted, ignore_index=IGNORE)
        """,
        "logits cut": """
            def prompted_loss(logits, labels):
                predicting = logits[:, -labels.shape[1] - 1 : -1].float()
                return nn.functional.cross_entropy(predicting.transpose(1, 2), labels)
        """,
        "gathered": """
            def prompted_loss(logits, labels):
                counted = labels != IGNORE
                log_p = logits.float().log_softmax(-1).narrow(1, logits.shape[1] - labels.shape[1] - 1, labels.shape[1])
                return -log_p[counted].gather(1, labels[counted][:, None]).mean()
        """,
        "in double precision": {_LOGITS: "logits[row, predicted_by].double()"},
    },
)
