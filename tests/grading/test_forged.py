"""Whatever another process sends back in the place of an answer earns nothing, and fails with a sentence.

`make fuzz` tries thousands: `FUZZ` in the environment says how many.
"""

import io
import os
from dataclasses import dataclass
from functools import cache
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from autograder.checking.drive import Observation, RemoteAnswer, StudentError, drive, read_reply
from autograder.checking.exercise import Exercise
from autograder.checking.failure import CheckFailedError
from autograder.checking.judging import RAISED
from every_exercise import EXERCISES

EXAMPLES = int(os.environ.get("FUZZ", "600"))


class Forger(RemoteAnswer):
    """An answer that sends the bytes that it was given."""

    def __init__(self, name: str, reply: bytes):
        super().__init__(name)
        self.reply = reply

    def run(self, source, driver, answers, arguments, *anything):
        return self.reply

    def run_and_measure(self, source, driver, answers, arguments, *anything):
        return self.reply, 0


class AlmostTensor(Tensor):
    """Equals everything."""

    def __eq__(self, other):
        return True


@dataclass(frozen=True)
class Posed:
    """A question that a check asks: a case, what the spec gives, raw and as it is read, and what it gave to an earlier case."""

    exercise: Exercise
    case: dict
    raw: Observation
    expected: Observation
    earlier: Observation


@cache
def posed(name: str) -> list[Posed]:
    exercise = EXERCISES[name]
    now, before = exercise.fresh_cases(seed=1), exercise.fresh_cases(seed=2)
    return [
        Posed(exercise, case, _raw(exercise, case), exercise.observe(exercise.spec, case), _raw(exercise, earlier))
        for case, earlier in zip(now, before, strict=False)
        if not exercise.measures_peak(case)
    ]


def _raw(exercise: Exercise, case: dict) -> Observation:
    copied = {name: value.clone() if isinstance(value, Tensor) else value for name, value in case.items()}
    try:
        return drive(exercise.driver, exercise.spec, copied)
    except Exception as error:  # some cases ask for an error
        return {RAISED: f"{type(error).__name__}: {error}"}


def saved(value: object) -> bytes:
    reply = io.BytesIO()
    torch.save(value, reply)
    return reply.getvalue()


# ---- Forgeries: each returns what is sent in the place of an observation ----


def noise(question: Posed, chance: Random) -> bytes:
    return chance.randbytes(chance.randint(0, 300))


def part_of_an_archive(question: Posed, chance: Random) -> bytes:
    reply = bytearray(saved(question.earlier))
    for _ in range(chance.randint(1, 20)):
        reply[chance.randrange(len(reply))] = chance.randrange(256)
    return bytes(reply[: chance.choice([len(reply), chance.randrange(len(reply))])])


def no_observation(question: Posed, chance: Random) -> bytes:
    return saved(odd(chance))


def odd_fields(question: Posed, chance: Random) -> bytes:
    return saved({name: odd(chance) for name in question.raw} | {"more": odd(chance)})


def one_odd_field(question: Posed, chance: Random) -> bytes:
    """All of it right but for one field: what a thief could do who knew the answer."""
    name = chance.choice(list(question.raw))
    return saved(question.raw | {name: chance.choice([odd(chance), _near(question.raw[name], chance)])})


def missing_fields(question: Posed, chance: Random) -> bytes:
    names = chance.sample(list(question.raw), chance.randrange(len(question.raw)))
    return saved({name: question.raw[name] for name in names})


def a_claim_to_have_raised(question: Posed, chance: Random) -> bytes:
    texts = ["NotImplementedError", "ValueError: no", "", None, 0, "passed", "StudentError: ", torch.zeros(3), ["ValueError"]]
    return saved(chance.choice([{}, question.earlier]) | {RAISED: chance.choice(texts)})


def what_was_asked(question: Posed, chance: Random) -> bytes:
    """Values copied from the arguments."""
    return saved({name: chance.choice(list(question.case.values())) for name in question.raw})


def the_answer_to_an_earlier_call(question: Posed, chance: Random) -> bytes:
    return saved(question.earlier)


FORGERIES = [
    noise,
    part_of_an_archive,
    no_observation,
    odd_fields,
    one_odd_field,
    missing_fields,
    a_claim_to_have_raised,
    what_was_asked,
    the_answer_to_an_earlier_call,
]

MAY_BE_RIGHT = [a_claim_to_have_raised, what_was_asked, the_answer_to_an_earlier_call]
"""An earlier answer can be right again, where little depends on the case and bytes may be fewer."""

ODD = {
    "nothing": lambda: None,
    "yes": lambda: True,
    "a number": lambda: -1,
    "infinity": lambda: float("inf"),
    "no number": lambda: float("nan"),
    "text": lambda: "passed",
    "bytes": lambda: b"passed",
    "NaN": lambda: torch.full((2, 2), float("nan")),
    "no elements": lambda: torch.zeros(0, 3),
    "a scalar": lambda: torch.tensor(1.0),
    "an enormous view": lambda: torch.zeros(1).expand(2**40),
    "overlapping rows": lambda: torch.zeros(10).as_strided((5, 5), (1, 1)),
    "a subclass": lambda: torch.zeros(2).as_subclass(AlmostTensor),
    "a parameter": lambda: nn.Parameter(torch.zeros(3)),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "complex": lambda: torch.zeros(3, dtype=torch.complex64),
    "8 bits": lambda: torch.zeros(3, dtype=torch.float8_e4m3fn),
    "without data": lambda: torch.zeros(3, device="meta"),
    "a module": lambda: nn.Linear(1, 1),
    "a function": lambda: print,
    "a dtype": lambda: torch.float32,
    "a shape": lambda: torch.Size([2, 3]),
    "a set": lambda: {1, 2},
}


def odd(chance: Random, depth: int = 3) -> object:
    """Return something that no driver returns."""
    kind = chance.random() if depth else 1.0
    if kind < 0.15:
        return [odd(chance, depth - 1) for _ in range(chance.randint(0, 3))]
    if kind < 0.3:
        return {chance.choice(["a", 1, None, (1,), RAISED]): odd(chance, depth - 1) for _ in range(chance.randint(0, 3))}
    return ODD[chance.choice(list(ODD))]()


def _near(value: object, chance: Random) -> object:
    """Return a value like this one that is not it."""
    if isinstance(value, Tensor) and value.numel():
        changed = value.clone()
        if chance.random() < 0.5 and changed.is_floating_point():
            changed.view(-1)[chance.randrange(changed.numel())] = chance.choice([float("nan"), float("inf"), -1e30])
            return changed
        return chance.choice(
            [changed[None], changed.double() if changed.dtype != torch.float64 else changed.float(), [changed]]
        )
    return chance.choice([[value], {"a": value}, str(value) + " "])


def same(forged: object, right: object, tolerance: float) -> bool:
    """Whether a forgery is the right answer after all, as an earlier one may be where there are few."""
    if isinstance(right, dict):
        return isinstance(forged, dict) and all(
            name in forged and same(forged[name], item, tolerance) for name, item in right.items()
        )
    if isinstance(right, list | tuple):
        return (
            isinstance(forged, list | tuple)
            and len(forged) == len(right)
            and all(same(*pair, tolerance) for pair in zip(forged, right, strict=True))
        )
    if isinstance(right, Tensor):
        is_like_it = isinstance(forged, Tensor) and forged.shape == right.shape and forged.dtype == right.dtype
        return is_like_it and torch.allclose(forged.double(), right.double(), rtol=1e-4, atol=1e-5 + tolerance)
    if isinstance(forged, int | float) and isinstance(right, int | float):
        return abs(forged - right) <= 1e-5 + tolerance
    return forged == right


@settings(max_examples=EXAMPLES)
@given(chance=st.randoms(use_true_random=False), name=st.sampled_from(sorted(EXERCISES)), forge=st.sampled_from(FORGERIES))
def test_a_forged_reply_earns_nothing(chance, name, forge):
    questions = posed(name)
    if not questions:
        return
    question = chance.choice(questions)
    reply = forge(question, chance)
    observed = question.exercise.observe([Forger(part.__name__, reply) for part in question.exercise.spec], question.case)
    difference = question.exercise.difference(question.expected, observed, question.case)
    if difference is None:
        for field in (
            question.expected.keys() - question.exercise.at_most
        ):  # bytes are reported from inside: fewer would be right
            tolerance = question.exercise.tolerance(question.case).get(field, 0.0)
            assert same(observed[field], question.expected[field], tolerance), (forge.__name__, field)
    else:
        assert difference.strip() and len(difference) < 2000


@settings(max_examples=EXAMPLES)
@given(chance=st.randoms(use_true_random=False), forge=st.sampled_from(FORGERIES))
def test_a_forged_reply_is_read_or_refused(chance, forge):
    try:
        observation = read_reply(forge(posed("check_merge")[0], chance))
    except StudentError as error:
        assert str(error).startswith(("the code sent back", "the code returned"))
    else:
        assert isinstance(observation, dict)


@pytest.mark.parametrize("name", EXERCISES)
def test_a_check_says_so_in_a_sentence(name):
    exercise, chance = EXERCISES[name], Random(name)
    questions = posed(name) or [Posed(exercise, {"a": 1}, {"a": 1}, {"a": 1}, {"a": 1})]
    never_right = [forge for forge in FORGERIES if forge not in MAY_BE_RIGHT]
    reply = chance.choice(never_right)(chance.choice(questions), chance)
    with pytest.raises(CheckFailedError) as caught:
        exercise(*[Forger(part.__name__, reply) for part in exercise.spec], seed=3)
    assert len(str(caught.value)) < 3000
