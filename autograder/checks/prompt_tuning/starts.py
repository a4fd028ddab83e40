"""Three ways to start a prompt."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from autograder.cases import between, normal
from autograder.drive import Observation
from autograder.exercise import Exercise


def random_start(length: int, hidden: int) -> Tensor:
    """Return standard normal numbers, (length, hidden)."""
    return torch.normal(torch.zeros(length, hidden), 1.0)


def vocabulary_start(embedding: nn.Embedding, length: int) -> Tensor:
    """Return copies of the embeddings of distinct tokens, drawn at random from the whole vocabulary."""
    ids = torch.ones(embedding.num_embeddings).multinomial(length, replacement=False)
    with torch.no_grad():
        return embedding(ids)


def text_start(embedding: nn.Embedding, token_ids: Sequence[int], length: int) -> Tensor:
    """Return copies of the embeddings of the text's tokens, from its beginning, over and over until there are `length`."""
    ids = [token_ids[position % len(token_ids)] for position in range(length)]
    with torch.no_grad():
        return embedding(torch.tensor(ids))


def starts_case(generator: torch.Generator, dtype: torch.dtype = torch.float32) -> dict:
    """Return an embedding, a text, and lengths shorter than it, longer than it and longer than twice; 4,000 random numbers.

    24 of 30 tokens are drawn, twenty times: that these miss one token, or are equal, or distinct by accident, doesn't happen.
    """
    vocabulary, tokens = between(generator, 30, 33), between(generator, 9, 11)
    return {
        "table": normal(generator, vocabulary, between(generator, 12, 14), dtype=dtype),
        "token_ids": torch.randperm(vocabulary, generator=generator)[:tokens].tolist(),
        "lengths": [between(generator, 4, 6), 24, 2 * tokens + 5, between(generator, 60, 62)],
        "hidden": between(generator, 66, 70),
    }


def drive_starts(random_start, vocabulary_start, text_start, table, token_ids, lengths, hidden):
    """Make starts; change one that is a copy, and return whether the embedding has changed with it."""
    import torch
    from torch import nn

    embedding = nn.Embedding(*table.shape, dtype=table.dtype)
    with torch.no_grad():
        embedding.weight.copy_(table)
    starts = {
        "random": random_start(lengths[-1], hidden),
        "random again": random_start(lengths[-1], hidden),
        **{f"vocabulary {draw}": vocabulary_start(embedding, lengths[1]) for draw in range(20)},
        **{f"text {length}": text_start(embedding, token_ids, length) for length in lengths[:-1]},
    }
    seen = {name: start.detach().clone() if torch.is_tensor(start) else repr(start) for name, start in starts.items()}
    asks = {f"{name.split()[0]}_start" for name, start in starts.items() if torch.is_tensor(start) and start.requires_grad}
    with torch.no_grad():
        for start in starts.values():
            if torch.is_tensor(start):
                start += 1
    same = torch.equal(embedding.weight, table) and embedding.weight.requires_grad
    return {"starts": seen, "asks for a gradient": sorted(asks), "embedding as it was": same}


def read_starts(observation: Observation, case: dict) -> Observation:
    """Turn random starts into what any right answer gives."""
    starts, table = observation["starts"], case["table"]
    returned = {f"what {name}_start returns": "a tensor" for name in ("random", "vocabulary", "text")}
    for name, value in starts.items():
        if not isinstance(value, Tensor):
            returned[f"what {name.partition(' ')[0]}_start returns"] = value
    if set(returned.values()) != {"a tensor"}:
        return returned
    short, middle, long = case["lengths"][:-1]
    read = returned | {
        "the shape of random_start": list(starts["random"].shape),
        "the dtype of random_start": str(starts["random"].dtype),
        "the mean of random_start": starts["random"].double().mean().item(),
        "the standard deviation of random_start": starts["random"].double().std().item(),
        "the share of random_start beyond two standard deviations": (starts["random"].abs() > 2).double().mean().item(),
        "two calls of random_start give the same": torch.equal(starts["random"], starts["random again"]),
        f"text_start, {len(case['token_ids'])} tokens cut to {short}": starts[f"text {short}"],
        f"text_start, {len(case['token_ids'])} tokens for {middle}": starts[f"text {middle}"],
        f"text_start, {len(case['token_ids'])} tokens for {long}": starts[f"text {long}"],
        "the shape of vocabulary_start": list(starts["vocabulary 0"].shape),
        "the dtype of vocabulary_start": str(starts["vocabulary 0"].dtype),
        "the list of functions whose start asks for a gradient": observation["asks for a gradient"],
        "the embedding is as it was after the starts were changed": observation["embedding as it was"],
    }
    draws = [start for name, start in starts.items() if name.startswith("vocabulary")]
    if read["the shape of vocabulary_start"] == [middle, table.shape[1]]:
        read["what vocabulary_start draws"] = _drawn([_tokens(start, table) for start in draws], len(table))
    return read


def _drawn(draws: list[list[int | None]], size: int) -> str:
    """Say how several draws of tokens were made."""
    length = len(draws[0])
    if any(None in ids for ids in draws):
        return "rows that the embedding does not have"
    if any(len(set(ids)) < length for ids in draws):
        return "some tokens twice"
    if all(ids == list(range(length)) for ids in draws):
        return "the first tokens, in order"
    if all(ids == list(range(ids[0], ids[0] + length)) for ids in draws):
        return "a run of neighbours"
    if all(ids == draws[0] for ids in draws):
        return "the same tokens at every call"
    if max(map(max, draws)) < length:
        return "among the first tokens only"
    if not any(0 in ids for ids in draws) or not any(size - 1 in ids for ids in draws):
        return "never the first, or never the last token"
    return "different tokens, from the whole vocabulary"


def _tokens(start: Tensor, table: Tensor) -> list[int | None]:
    """Return which row of the table each row is, or None."""
    same = (start[:, None] == table).all(-1)
    return [place if found else None for place, found in zip(same.int().argmax(1).tolist(), same.any(1).tolist())]


_MULTINOMIAL = "torch.ones(embedding.num_embeddings).multinomial(length, replacement=False)"
_NORMAL = "torch.normal(torch.zeros(length, hidden), 1.0)"
_CYCLED = "[token_ids[position % len(token_ids)] for position in range(length)]"
_DRAWN = "with torch.no_grad():\n        return embedding(ids)"
_TEXT = "with torch.no_grad():\n        return embedding(torch.tensor(ids))"

check_starts = Exercise(
    spec=[random_start, vocabulary_start, text_start],
    cases=lambda generator: [starts_case(generator), starts_case(generator, torch.bfloat16)],
    driver=drive_starts,
    reading=read_starts,
    # Over 4,000 normal numbers the mean scatters by 0.016, the standard deviation by 0.011 and the share beyond two of them,
    # 4.6%, by 0.33%, for two answers 1.4 times as much; these are about six times that.
    tolerance=lambda case: {
        "the mean of random_start": 0.13,
        "the standard deviation of random_start": 0.1,
        "the share of random_start beyond two standard deviations": 0.028,
    },
    mistakes={
        "random_start is uniform between 0 and 1: `torch.randn` gives normal numbers, `torch.rand` does not": {
            _NORMAL: "torch.rand(length, hidden)"
        },
        "random_start is uniform between -0.5 and 0.5, as in Lester et al.: here its numbers should be standard normal": {
            _NORMAL: "torch.rand(length, hidden) - 0.5"
        },
        "random_start has standard deviation 0.02, as a model's weights when they start: it should be 1": {
            _NORMAL: _NORMAL.replace("1.0", "0.02")
        },
        "random_start is the same at every call: do not set a seed inside": {
            _NORMAL: "torch.manual_seed(0).seed() and torch.randn(length, hidden, generator=torch.Generator().manual_seed(0))"
        },
        "vocabulary_start may draw a token twice: its tokens must be distinct": {
            _MULTINOMIAL: "torch.randint(embedding.num_embeddings, (length,))"
        },
        "vocabulary_start takes the first tokens: it draws them at random": {_MULTINOMIAL: "torch.arange(length)"},
        "vocabulary_start takes a run of neighbours: every token is drawn by itself": {
            _MULTINOMIAL: "torch.randint(embedding.num_embeddings - length, ()) + torch.arange(length)"
        },
        "vocabulary_start draws numbers that look like embeddings: it copies rows of the embedding": {
            _DRAWN: "with torch.no_grad():\n        return embedding(ids) * 0 + embedding.weight.std() * torch.randn(length, embedding.embedding_dim).to(embedding.weight)"
        },
        "text_start has fewer rows than asked for: where the text is too short, it begins again": {
            _CYCLED: "list(token_ids)[:length]"
        },
        "text_start fills up with its last token: where the text is too short, it begins again": {
            _CYCLED: "(list(token_ids) + [token_ids[-1]] * length)[:length]"
        },
        "text_start repeats every token on the spot: the whole text is repeated, in its order": {
            _CYCLED: "sorted(range(length), key=lambda place: place % len(token_ids))",
            "torch.tensor(ids)": "torch.tensor([token_ids[place % len(token_ids)] for place in ids])",
        },
        "text_start keeps the end of the text: it is cut at the end, its first tokens stay": {
            _CYCLED: "(list(token_ids) * length)[-length:]"
        },
        "vocabulary_start hangs on the embedding: detach it": {_DRAWN: "return embedding(ids)"},
        "text_start hangs on the embedding: detach it": {_TEXT: "return embedding(torch.tensor(ids))"},
        "vocabulary_start and text_start hang on the embedding: detach them": {
            _DRAWN: "return embedding(ids)",
            _TEXT: "return embedding(torch.tensor(ids))",
        },
        "the dtype is not the embedding's: a copy keeps it": {
            _DRAWN: "with torch.no_grad():\n        return embedding(ids).double()"
        },
    },
    variants={
        "by index": {
            _NORMAL: "torch.randn((length, hidden))",
            _DRAWN: "return embedding.weight[ids].detach().clone()",
            _TEXT: "return embedding.weight.data[torch.tensor(ids)]",
        },
        "repeat and cut": """
            def random_start(length, hidden):
                return torch.empty(length, hidden).normal_()

            def vocabulary_start(embedding, length):
                ids = torch.randperm(embedding.num_embeddings)[:length]
                return embedding.weight.detach()[ids]

            def text_start(embedding, token_ids, length):
                ids = torch.tensor(token_ids).repeat(math.ceil(length / len(token_ids)))[:length]
                return embedding.weight.index_select(0, ids).detach()
        """,
        "row by row": """
            def random_start(length, hidden):
                return torch.stack([nn.init.normal_(torch.empty(hidden)) for _ in range(length)])

            def vocabulary_start(embedding, length):
                import random

                rows = random.sample(range(embedding.weight.shape[0]), length)
                return torch.stack([embedding.weight[row].detach() for row in rows])

            def text_start(embedding, token_ids, length):
                import itertools

                ids = list(itertools.islice(itertools.cycle(token_ids), length))
                start = torch.empty(length, embedding.embedding_dim, dtype=embedding.weight.dtype)
                for place, token in enumerate(ids):
                    start[place] = embedding.weight[token].detach()
                return start
        """,
    },
)
