"""Bug hunt: `answer_labels`, and the model that never stops (trl issue 976, transformers issue 23530)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from autograder.checking.cases import between
from autograder.checking.exercise import Exercise
from peftlab.llama import IGNORE


def answer_labels(conversations: Sequence[Sequence[tuple[str, Sequence[int]]]], pad: int) -> tuple[Tensor, Tensor]:
    """Return `input_ids` and `labels`, filled in one token at a time."""
    lengths = [sum(len(ids) for _, ids in turns) for turns in conversations]
    input_ids = torch.full((len(conversations), max(lengths)), pad)
    labels = torch.full((len(conversations), max(lengths)), IGNORE)
    for row, turns in enumerate(conversations):
        place = 0
        for role, ids in turns:
            for token in ids:
                input_ids[row, place] = token
                if role == "assistant":
                    labels[row, place] = token
                place += 1
    return input_ids, labels


ROLES = [
    ["user", "assistant"],
    ["system", "user", "assistant", "user", "assistant", "user"],
    ["user", "assistant", "tool", "assistant"],
    ["system", "user"],
]


def chat_case(generator: torch.Generator, pad: str, roles: list[list[str]] = ROLES, fewest: int = 3, top: int = 900) -> dict:
    """Return conversations with these roles, of turns with `fewest` tokens or one more, which all end with one token.

    Token 0, which is a token like any other, or the pad token stands in the first turn of each role, if `fewest` is above 2.

    Args:
        pad: "end", the end token; "inside", a token that no turn ends with; or "unused", one that occurs nowhere.
        top: the largest token.
    """
    order = iter((top - torch.randperm(700, generator=generator)).tolist())
    end, padding = next(order), next(order)
    padding = end if pad == "end" else padding
    conversations = []
    for number, row in enumerate(roles):
        turns = []
        for role in row:
            ids = [next(order) for _ in range(fewest - 1 + between(generator, 0, 1))] + [end]
            if fewest > 2 and role not in [earlier for earlier, _ in turns]:
                ids[1] = padding if pad == "inside" else 0
            turns.append((role, tuple(ids) if number % 2 else ids))
        conversations.append(turns)
    return {"conversations": conversations, "pad": padding}


def drive_answer_labels(answer_labels, conversations, pad):
    """Return both tensors, and whether the conversations are as they were."""
    import copy

    import torch

    given = copy.deepcopy(conversations)
    returned = answer_labels(given, pad)
    if not isinstance(returned, tuple | list) or len(returned) != 2 or not all(map(torch.is_tensor, returned)):
        what = [type(part).__name__ for part in returned] if isinstance(returned, tuple | list) else type(returned).__name__
        return {"what answer_labels returns": str(what)}
    return {
        "what answer_labels returns": "two tensors",
        "input_ids": returned[0],
        "labels": returned[1],
        "the conversations are as they were": given == conversations,
    }


_LENGTHS = "[sum(len(ids) for _, ids in turns) for turns in conversations]"
_PADDED = "input_ids = torch.full((len(conversations), max(lengths)), pad)"
_TURNS, _NUMBERED = "for role, ids in turns:", "for number, (role, ids) in enumerate(turns):"
_ANSWER = 'if role == "assistant":'
_RETURN = "return input_ids, labels"

check_answer_labels = Exercise(
    spec=[answer_labels],
    cases=lambda generator: (
        [chat_case(generator, pad) for pad in ("end", "inside", "unused")]
        + [chat_case(generator, "end", [["system", "user", "assistant"]])]
    ),
    driver=drive_answer_labels,
    mistakes={
        "an answer's end token has no label where it is the pad token too: find the padding by its place": {
            _RETURN: "labels[input_ids == pad] = IGNORE\n    " + _RETURN
        },
        "the padding has labels: the model would learn to write pad tokens": {
            _RETURN: "for row, length in enumerate(lengths):\n        labels[row, length:] = pad\n    " + _RETURN
        },
        "the first place of the padding has a label: an answer's last label is that of its own end token": {
            _RETURN: "for row, length in enumerate(lengths):\n        labels[row, length : length + 1] = pad\n    " + _RETURN
        },
        "every place has a label, padding too: only the assistant's tokens should": {
            _RETURN: "return input_ids, input_ids.clone()"
        },
        "every turn has labels: only the assistant's should": {_ANSWER: "if True:"},
        "the labels are on the wrong turns: the assistant's tokens have them, and no others": {
            _ANSWER: 'if role != "assistant":'
        },
        "the user's turns have labels as well: only the assistant's should": {_ANSWER: 'if role in ("user", "assistant"):'},
        "system and tool turns have labels: only the assistant's should": {_ANSWER: 'if role != "user":'},
        "system turns have labels: only the assistant's should": {_ANSWER: 'if role in ("assistant", "system"):'},
        "tool turns have labels: only the assistant's should": {_ANSWER: 'if role in ("assistant", "tool"):'},
        "everything after the first answer begins has a label: later turns of others need IGNORE too": {
            _TURNS: _NUMBERED,
            _ANSWER: 'if "assistant" in [earlier for earlier, _ in turns[: number + 1]]:',
        },
        "every second turn is taken for an answer: ask for its role": {
            _TURNS: _NUMBERED,
            _ANSWER: "if number % 2 == 1:",
        },
        "every turn's end token has a label: of other roles' tokens none should": {
            _ANSWER: 'if role == "assistant" or token == ids[-1]:'
        },
        "only the last answer of a conversation has labels: all should": {
            _TURNS: _NUMBERED,
            _ANSWER: 'if role == "assistant" and "assistant" not in [later for later, _ in turns[number + 1 :]]:',
        },
        "only the first answer of a conversation has labels: all should": {
            _TURNS: _NUMBERED,
            _ANSWER: 'if role == "assistant" and "assistant" not in [earlier for earlier, _ in turns[:number]]:',
        },
        "the end token of an answer has no label: without it the model does not learn to stop": {
            _RETURN: (
                "for row, turns in enumerate(conversations):\n"
                "        ends = torch.tensor([len(ids) for _, ids in turns]).cumsum(0) - 1\n"
                "        labels[row, ends] = IGNORE\n    " + _RETURN
            )
        },
        "the first token of an answer has no label: the loss shifts, and needs it": {
            _RETURN: (
                "for row, turns in enumerate(conversations):\n"
                "        starts = torch.tensor([0, *(len(ids) for _, ids in turns)]).cumsum(0)[:-1]\n"
                "        labels[row, starts] = IGNORE\n    " + _RETURN
            )
        },
        "the labels are shifted by one place: the loss does that, so a label stands where its token does": {
            _RETURN: "return input_ids, nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE)"
        },
        "the rows are padded on the left: the tokens come first": {"place = 0": "place = max(lengths) - lengths[row]"},
        "the rows are padded with 0: pad them with `pad`": {_PADDED: _PADDED.replace("pad)", "0)")},
        "the rows are padded with IGNORE, which is no token: pad `input_ids` with `pad`": {
            _PADDED: _PADDED.replace("pad)", "IGNORE)")
        },
        "the labels are 0 where there is none: 0 is a token, and IGNORE stands for none": {
            "max(lengths)), IGNORE)": "max(lengths)), 0)"
        },
        "input_ids and labels have changed places: return input_ids first": {_RETURN: "return labels, input_ids"},
        "the rows are cut to the shortest conversation: pad them to the longest": {
            _RETURN: "return input_ids[:, : min(lengths)], labels[:, : min(lengths)]"
        },
        "every row has one place more than the longest conversation": {_LENGTHS: _LENGTHS.replace("[sum(", "[1 + sum(")},
        "the tensors are int32: token ids and labels are int64": {_RETURN: "return input_ids.int(), labels.int()"},
        "lists came back: make tensors of them": {_RETURN: "return input_ids.tolist(), labels.tolist()"},
        "nothing is returned: write `return` in front of the two tensors": {_RETURN: "input_ids, labels"},
        "the conversations were changed, by padding them in place: make new lists": {
            _RETURN: (
                "for turns, length in zip(conversations, lengths):\n"
                "        turns.append(('padding', [pad] * (max(lengths) - length)))\n    " + _RETURN
            )
        },
    },
    variants={
        "lists": """
            def answer_labels(conversations, pad):
                pairs = [
                    [(token, token if role == "assistant" else IGNORE) for role, ids in turns for token in ids]
                    for turns in conversations
                ]
                longest = max(len(row) for row in pairs)
                return torch.tensor([row + [(pad, IGNORE)] * (longest - len(row)) for row in pairs]).unbind(-1)
        """,
        "pad_sequence": """
            def answer_labels(conversations, pad):
                rows = [torch.tensor([token for _, ids in turns for token in ids]) for turns in conversations]
                spoken = [torch.tensor([r == "assistant" for r, ids in turns for _ in ids]) for turns in conversations]
                input_ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)
                spoken = nn.utils.rnn.pad_sequence(spoken, batch_first=True)
                return [input_ids, torch.where(spoken, input_ids, IGNORE)]
        """,
        "the padding masked by its place": {
            _RETURN: (
                "places = torch.arange(max(lengths))\n"
                "    labels[places >= torch.tensor(lengths)[:, None]] = IGNORE\n    " + _RETURN
            ),
        },
        "column by column": """
            def answer_labels(conversations, pad):
                from itertools import zip_longest

                rows = [[t for _, ids in turns for t in ids] for turns in conversations]
                answers = [[(r == "assistant") for r, ids in turns for _ in ids] for turns in conversations]
                input_ids = torch.tensor(list(zip_longest(*rows, fillvalue=pad))).T
                return input_ids, input_ids.masked_fill(~torch.tensor(list(zip_longest(*answers, fillvalue=False))).T, -100)
        """,
    },
)
