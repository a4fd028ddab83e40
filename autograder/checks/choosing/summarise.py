"""`summarise`: one line of the table."""

import math
import random
from collections.abc import Sequence
from statistics import mean

import torch

from autograder.checks.choosing.cases import dice
from autograder.exercise import Exercise
from peftlab.comparison import late_loss
from peftlab.results import Row


def summarise(rows: Sequence[Row]) -> dict:
    """Return what the rows of one method on one task say together."""
    by_rate = {}
    for row in rows:
        by_rate.setdefault(row.settings["learning_rate"], []).append(row)
    most = max(map(len, by_rate.values()))
    losses = {}
    for rate, runs in by_rate.items():
        loss = mean(late_loss(row) for row in runs)
        if len(runs) == most:
            losses[rate] = math.inf if math.isnan(loss) else loss
    best = min(losses, key=losses.get)
    chosen = by_rate[best]
    scores = [row.score_after for row in chosen]
    notes = []
    if len(scores) == 1:
        notes.append("one seed")
    if best == min(by_rate) or best == max(by_rate):
        notes.append("untuned")
    return {
        "learning_rate": best,
        "score": mean(scores),
        "spread": max(scores) - min(scores) if len(scores) > 1 else None,
        "seeds": len(scores),
        "share": chosen[0].trainable_parameters / chosen[0].total_parameters,
        "file_bytes": chosen[0].adapter_bytes,
        "peak_bytes": chosen[0].memory.peak,
        "forgetting": mean(row.forgetting for row in chosen),
        "notes": notes,
    }


def losses_of(dicing: random.Random, late: float, early: float, last: float | None = None) -> list[float]:
    """Return a run's losses: their mean over the last ten steps is `late`, before that they lie around `early`.

    Args:
        last: of the last step; four steps before it are not much higher, and the others make up for that.
    """
    tail = [late + dicing.uniform(-0.01, 0.01) for _ in range(10)]
    if last is not None:
        tail[5:] = [last + 0.1, last + 0.09, last + 0.11, last + 0.1, last]
    shift = (10 * late - sum(tail)) / 5
    tail = [loss + shift for loss in tail[:5]] + tail[5:]
    return [early + dicing.uniform(-0.05, 0.05) for _ in range(dicing.randrange(12, 16))] + tail


def summary_case(generator: torch.Generator, scale: float = 1.0) -> dict:
    """Return sets of runs; in the first one every wrong way to choose a learning rate chooses another."""
    dicing = dice(generator)
    rates = [scale * digit * 10.0**power for power in (-5, -4, -3, -2) for digit in (1, 3)]

    def run(rate: int, seed: int, late: float, early: float = 2.0, last: float | None = None, score: float = 0.0) -> list:
        losses = losses_of(dicing, late, early, last)
        return [rates[rate], seed, losses, score or dicing.uniform(0.7, 0.8), dicing.uniform(0.1, 0.9)]

    def sizes() -> list:
        total = dicing.randrange(10**6, 10**7)
        parts = dicing.sample(range(10**5, 10**6), 4)
        return [dicing.randrange(10**3, 10**5), total, dicing.randrange(10**5, 10**6), [*parts, sum(parts) - 777]]

    def diverged(rate: int, seed: int) -> list:
        row = run(rate, seed, 0.2, score=0.5)
        row[2][-3:] = [math.nan] * 3
        return row

    # Six rates have three seeds, and every wrong way to choose chooses one of its own.
    full = [
        run(7, 0, 0.33),  # one run, better than any mean
        run(1, 0, 0.40, score=dicing.uniform(0.74, 0.75)),  # the right one
        run(1, 1, 0.30, score=dicing.uniform(0.77, 0.78)),
        *[run(2, seed, late) for seed, late in ((1, 0.65), (0, 0.25), (2, 0.45))],  # the best with seed 0
        *[run(3, seed, late) for seed, late in ((0, 0.60), (1, 0.15), (2, 0.50))],  # the luckiest run
        *[run(4, seed, 0.5, early=0.7) for seed in range(3)],  # the lowest loss over the whole run
        *[run(5, seed, 0.55, last=0.05) for seed in range(3)],  # the lowest last steps
        *[run(6, seed, 0.6, score=0.9) for seed in range(3)],  # the highest score
        run(0, 0, 0.50),
        run(1, 2, 0.35, score=dicing.uniform(0.71, 0.72)),
    ]
    one_diverged = [run(3, 0, 0.2), diverged(3, 1), run(2, 0, 0.5), run(2, 1, 0.45), run(1, 0, 0.6), run(5, 0, 0.7)]
    upper = [run(1, 0, 0.6), run(2, 0, 0.5), run(3, 0, 0.4), run(3, 1, 0.4)]
    lower = [run(2, 0, 0.6), run(1, 0, 0.5), run(0, 0, 0.4), run(0, 1, 0.4), run(0, 2, 0.4)]
    inside = [diverged(5, 0), run(1, 0, 0.6), run(2, 0, 0.4)]
    two = [run(1, 4, 0.3), run(3, 2, 0.4)]
    labelled = {
        "a set with three seeds at six rates": full,
        "a single row": [run(2, 0, 0.4)],
        "a set in which one of two seeds diverged": one_diverged,
        "a set whose best learning rate is the highest tried": upper,
        "a set whose best learning rate is the lowest tried": lower,
        "a set with a sweep and no other seed, whose highest rate diverged": inside,
        "two rows, of seeds 4 and 2": two,
    }
    return {"sets": [[label, runs, sizes()] for label, runs in labelled.items()]}


def drive_summarise(summarise, sets):
    """Sum up several sets of rows."""
    from peftlab.memory import StepMemory
    from peftlab.results import Row

    seen = {}
    for label, runs, (trained, total, file_bytes, memory) in sets:
        rows = [
            Row(
                unit="any",
                task="reviews",
                method="lora",
                settings={"learning_rate": rate, "seed": seed, "steps": len(losses)},
                trainable_parameters=trained,
                total_parameters=total,
                adapter_bytes=file_bytes,
                memory=StepMemory(*memory),
                seconds_per_step=1.0,
                metric="accuracy",
                score_before=0.5,
                score_after=score,
                forgetting=forgetting,
                losses=losses,
                versions={},
                hardware="any",
                short=False,
            )
            for rate, seed, losses, score, forgetting in runs
        ]
        answer = summarise(rows)
        if not isinstance(answer, dict):
            return {"what summarise returns": type(answer).__name__}
        seen["what summarise returns"] = "dict"
        for name, value in answer.items():
            seen[f"`{name}` of {label}"] = sorted(value) if name == "notes" else value
    return seen


def summary_tolerance(case: dict) -> dict[str, float]:
    """Allow the rounding of a mean of three numbers below 1 in fp64: a few times 1e-16."""
    names = ("score", "spread", "share", "forgetting")
    return {f"`{name}` of {label}": 1e-12 for label, _, _ in case["sets"] for name in names}


_LOSS = "math.inf if math.isnan(loss) else loss"
_MEAN = "mean(late_loss(row) for row in runs)"
_EDGES = "if best == min(by_rate) or best == max(by_rate):"

check_summarise = Exercise(
    spec=[summarise],
    cases=lambda generator: [summary_case(generator)],
    driver=drive_summarise,
    tolerance=summary_tolerance,
    mistakes={
        "the learning rate is chosen by the test score: then the test split has been trained on, in a way": {
            _MEAN: "mean(-row.score_after for row in runs)"
        },
        "the learning rate is chosen by the loss of the whole run: use `late_loss`": {
            _MEAN: "mean(mean(row.losses) for row in runs)"
        },
        "the learning rate is chosen by the last step alone: one batch is noise; use `late_loss`": {
            _MEAN: "mean(row.losses[-1] for row in runs)"
        },
        "a single run is compared with means of several: only the rates with the most seeds may be chosen": {
            "if len(runs) == most:": "if True:",
        },
        "one seed alone chooses the rate: take the mean over all seeds of a rate": {
            _MEAN: 'late_loss(min(runs, key=lambda row: row.settings["seed"]))',
        },
        "only runs of seed 0 choose the rate, and there need not be any: take the mean over all seeds of a rate": {
            _MEAN: 'mean([late_loss(row) for row in runs if row.settings["seed"] == 0] or [0.0])',
            "if len(runs) == most:": 'if any(row.settings["seed"] == 0 for row in runs):',
        },
        "the luckiest seed chooses the rate: take the mean over all seeds of a rate": {
            _MEAN: "min((late_loss(row) for row in runs), key=lambda loss: (loss != loss, loss))",
        },
        "a seed that diverged is left out of the mean: a rate that diverges now and then is a bad one": {
            _MEAN: "mean([late_loss(row) for row in runs if not math.isnan(late_loss(row))] or [math.inf])",
        },
        "a run that diverged is chosen: its loss is NaN, and NaN compares with nothing; take it for infinite": {_LOSS: "loss"},
        "runs that diverged are left out of what was tried: a learning rate that diverges is an outcome, too": {
            "        by_rate.set": "        if not math.isnan(late_loss(row)):\n            by_rate.set",
        },
        '"untuned" is about all learning rates that were tried, not about those with the most seeds': {
            _EDGES: "if best == min(losses) or best == max(losses):"
        },
        "scores of other learning rates are in the mean: only those at the chosen one count": {
            "scores = [row.score_after for row in chosen]": "scores = [row.score_after for row in rows]"
        },
        "the best seed's score is returned: take the mean over the seeds": {"mean(scores)": "max(scores)"},
        "the score is that of one seed alone: take the mean over the seeds": {'"score": mean(scores)': '"score": scores[0]'},
        "the spread of one seed is given as 0: it is not known, so None": {"len(scores) > 1 else None": "True else None"},
        "the spread is a standard deviation: here it is the largest minus the smallest": {
            "max(scores) - min(scores) if": "(sum((s - mean(scores)) ** 2 for s in scores) / (len(scores) - 1)) ** 0.5 if"
        },
        "the share is in percent: return it as a fraction": {"chosen[0].total_parameters": "chosen[0].total_parameters * 100"},
        "the share is of the frozen parameters: divide by all of the model's": {
            "chosen[0].total_parameters": "(chosen[0].total_parameters - chosen[0].trainable_parameters)"
        },
        "forgetting is that of one seed: take the mean over the seeds": {
            "mean(row.forgetting for row in chosen)": "chosen[0].forgetting"
        },
        "the peak is put together from the categories: `memory.peak` was measured, and is less than their sum": {
            "chosen[0].memory.peak": "sum(vars(chosen[0].memory).values()) - chosen[0].memory.peak"
        },
        'the note "untuned" is missing where the best learning rate is the lowest tried': {_EDGES: "if best == max(by_rate):"},
        'the note "untuned" is missing where the best learning rate is the highest tried': {_EDGES: "if best == min(by_rate):"},
        'the note "one seed" is missing': {"len(scores) == 1:": "False:"},
        '"one seed" is about the chosen learning rate: how many rows there are elsewhere does not matter': {
            "if len(scores) == 1:": "if len(rows) == 1:"
        },
        "the seeds are counted over all learning rates": {'"seeds": len(scores)': '"seeds": len(rows)'},
    },
    variants={
        "from a sorted list": """
            def summarise(rows):
                tried = sorted({row.settings["learning_rate"] for row in rows})
                def runs(rate):
                    return [row for row in rows if row.settings["learning_rate"] == rate]
                def key(rate):
                    late = sum(late_loss(row) for row in runs(rate)) / len(runs(rate))
                    return -len(runs(rate)), late if late == late else float("inf")
                rate = sorted(tried, key=key)[0]
                at_rate = runs(rate)
                scores = sorted(row.score_after for row in at_rate)
                found = dict(
                    learning_rate=rate, score=sum(scores) / len(scores), seeds=len(scores),
                    spread=scores[-1] - scores[0] if scores[1:] else None,
                    share=at_rate[-1].trainable_parameters / at_rate[-1].total_parameters,
                    file_bytes=at_rate[-1].adapter_bytes, peak_bytes=at_rate[-1].memory.peak,
                    forgetting=sum(row.forgetting for row in at_rate) / len(at_rate),
                )
                found["notes"] = ["one seed"] * (len(scores) < 2) + ["untuned"] * (rate in (tried[0], tried[-1]))
                return found
        """,
        "notes in the other order": {
            'notes.append("untuned")': 'notes.insert(0, "untuned")',
        },
        "NaN by comparing": {_LOSS: "loss if loss == loss else float('inf')"},
        "notes as a tuple, edges by a chain": {
            _EDGES: "if not min(by_rate) < best < max(by_rate):",
            '"notes": notes': '"notes": tuple(notes)',
        },
    },
)
