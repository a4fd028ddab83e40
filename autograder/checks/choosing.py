"""Checks of unit 11_choosing."""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from statistics import mean

import torch

from autograder.cases import between
from autograder.drive import Observation
from autograder.exercise import Exercise
from peftlab.choosing import ACCESS, Job, Option, Reason, Recommendation, Refusal
from peftlab.comparison import late_loss, machine
from peftlab.memory import StepMemory
from peftlab.results import Row


def dice(generator: torch.Generator) -> random.Random:
    """Return Python's own random numbers, for what is no tensor, from the generator's next one."""
    return random.Random(between(generator, 0, 2**31 - 1))


# ======================================================================================================================
# 1. Whose rows
# ======================================================================================================================
def merge_rows(own: Sequence[Row], shipped: Sequence[Row], standard: Mapping[str, Mapping]) -> dict[tuple[str, str], list[Row]]:
    """Return, by task and method, the rows that a comparison may use."""

    def counts(row: Row) -> bool:
        if row.short or row.settings.get("variant", "") != "" or row.task not in standard:
            return False
        return all(row.settings[name] == value for name, value in standard[row.task].items() if name in row.settings)

    def of_one_machine(rows: list[Row]) -> list[Row]:
        names = [machine(row) for row in rows]
        return [row for row in rows if machine(row) == max(names, key=names.count)]

    def each_once(rows: list[Row]) -> list[Row]:
        by_run = {(row.settings["learning_rate"], row.settings["seed"]): row for row in rows}
        return list(by_run.values())

    merged = {}
    for rows in (own, shipped):
        found = {}
        for row in rows:
            if counts(row):
                found.setdefault((row.task, row.method), []).append(row)
        for key, group in found.items():
            if key not in merged:
                merged[key] = each_once(of_one_machine(group))
    return merged


def drive_merge(merge_rows, own, shipped, standard):
    """Build rows, merge them, and return which of them are found where, by their labels."""
    from peftlab.memory import StepMemory
    from peftlab.results import Row

    def build(line):
        return Row(
            unit="any",
            task=line["task"],
            method=line["method"],
            settings=line["settings"],
            trainable_parameters=1,
            total_parameters=2,
            adapter_bytes=3,
            memory=StepMemory(1, 2, 3, 4, 5),
            seconds_per_step=1.0,
            metric="accuracy",
            score_before=0.5,
            score_after=0.9,
            forgetting=0.1,
            losses=[1.0] * 20,
            versions={"label": line["label"]},
            hardware=line["hardware"],
            short=line["short"],
        )

    lists = [build(line) for line in own], [build(line) for line in shipped]
    merged = merge_rows(*lists, standard)
    if not isinstance(merged, dict):
        return {"what merge_rows returns": type(merged).__name__}
    seen = {"what merge_rows returns": "dict", "the list of keys": sorted(str(key) for key in merged)}
    for key, rows in merged.items():
        seen[f"the list of rows of {key}"] = sorted(row.versions["label"] for row in rows)
    return seen | {"how many rows are in the lists that were given": [len(rows) for rows in lists]}


def merge_case(generator: torch.Generator, several: int = 2) -> dict:
    """Return rows among which is everything that may not be mixed up; `several` is how many rows a set has at least."""
    dicing = dice(generator)
    tasks = dicing.sample(["reviews", "calls", "questions", "sums"], 3)
    methods = dicing.sample(["full", "lora", "bitfit", "adapters", "prompt_tuning", "prefix_tuning", "qlora", "freezing"], 8)
    machines = dicing.sample(["Tesla T4", "AMD EPYC", "Apple M2", "NVIDIA A100"], 4)
    steps, rank = dicing.sample(range(30, 90), 3), dicing.choice([4, 8, 16])
    standard = {task: {"steps": count, "rank": rank} for task, count in zip(tasks[:2], steps)}
    rates = [0.001, 0.003, 0.01, 0.03]
    lists: dict[str, list[dict]] = {"own": [], "shipped": []}

    def add(whose: str, place: tuple[str, str], machine: str, note: str = "", seed: int = 0, rate: int = 0, **changed) -> None:
        task, method = place
        settings = {"steps": standard.get(task, {"steps": 40})["steps"], "learning_rate": rates[rate], "seed": seed}
        short = changed.pop("short", False)
        label = f"{whose}, rate {rates[rate]}, seed {seed}, {machine}" + (f", {note}" if note else "")
        row = {"label": label, "task": task, "method": method, "hardware": machine, "short": short}
        lists[whose].append(row | {"settings": settings | changed})

    first, second = tasks[:2]
    for place in ((first, methods[0]), (second, methods[0])):  # both have rows: the reader's count
        for seed in range(several):
            add("own", place, machines[0], seed=seed, rank=rank)
            add("shipped", place, machines[1], seed=seed, rate=1, rank=rank)
    place = (second, methods[1])  # the reader has only what does not count
    add("own", place, machines[0], "short", short=True)
    add("own", place, machines[0], "steps of another task", steps=steps[2])
    add("own", place, machines[0], "another rank", rank=2 * rank)
    for seed in range(several):
        add("shipped", place, machines[1], seed=seed, rank=rank)
    place = (first, methods[2])  # two machines, one of them with one thread and with two
    for seed in range(several):
        add("own", place, machines[0], seed=seed)
        add("own", place, f"{machines[2]}, 2 threads", seed=seed, rate=1)
    add("own", place, f"{machines[2]}, 1 thread", seed=several, rate=1)
    place = (second, methods[3])  # a run repeated
    add("own", place, machines[0], "the first time", rate=2)
    add("own", place, machines[0], "again", rate=2)
    add("own", place, machines[0], rate=1)
    place = (first, methods[4])  # shipped rows of two machines
    for seed in range(several + 1):
        add("shipped", place, machines[1], seed=seed, variant="")
    add("shipped", place, machines[3], seed=several + 1, variant="")
    add("own", (second, methods[4]), machines[0], "a variant", variant="random")  # nothing that counts at all
    add("own", (tasks[2], methods[0]), machines[0], "a task that is not compared")
    add("own", (second, methods[5]), machines[dicing.randrange(2)], "as many as the other machine, and first")
    add("own", (second, methods[5]), machines[2], "as many as the other machine, but later")
    return lists | {"standard": standard}


_KEPT = "merged[key] = each_once(of_one_machine(group))"

check_merge_rows = Exercise(
    spec=[merge_rows],
    driver=drive_merge,
    cases=lambda generator: [merge_case(generator)],
    mistakes={
        "short rows are kept: their figures mean nothing": {"row.short or ": ""},
        "variants are kept: only a method's standard form is compared here": {'row.settings.get("variant", "") != "" or ': ""},
        "rows of a task that `standard` does not name are kept": {
            " or row.task not in standard": "",
            "standard[row.task].items()": "standard.get(row.task, {}).items()",
        },
        "rows with other settings than the standard ones are kept: a rank of 16 is another experiment than a rank of 8": {
            "standard[row.task].items()": '[("steps", standard[row.task]["steps"])]'
        },
        "rows of longer or shorter training are kept: `steps` is one of the settings that have to agree": {
            "if name in row.settings": 'if name in row.settings and name != "steps"'
        },
        "rows that do not have a setting are thrown away: full fine-tuning has no rank, and may stay": {
            "row.settings[name] == value": "row.settings.get(name) == value",
            " if name in row.settings": "",
        },
        "a reader's rows and the shipped ones are mixed in one set": {
            "if key not in merged:": "if True:",
            _KEPT: "merged[key] = merged.get(key, []) + each_once(of_one_machine(group))",
        },
        "the shipped rows are preferred: a reader's own come first": {"(own, shipped)": "(shipped, own)"},
        "a set holds rows of two machines: keep those of the one with the most rows": {
            " if machine(row) == max(names, key=names.count)": ""
        },
        "the shipped rows of two machines are mixed: the rule holds for them, too": {
            _KEPT: "merged[key] = each_once(of_one_machine(group) if rows is own else group)"
        },
        "a machine with one thread is taken for another than with two: use `machine(row)`, not `row.hardware`": {
            "[machine(row) for row in rows]": "[row.hardware for row in rows]",
            "if machine(row) ==": "if row.hardware ==",
        },
        "of two machines with as many rows the last is taken, instead of the first": {
            "max(names, key=names.count)": "max(reversed(names), key=names.count)"
        },
        "of two machines the one with fewer rows is taken": {
            "max(names, key=names.count)": "min(names, key=names.count)",
        },
        "a run that was repeated counts twice: the same learning rate and seed is one measurement": {
            "return list(by_run.values())": "return rows"
        },
        "of a run that was repeated the first row is kept, instead of the last": {
            "row for row in rows}": "row for row in rows[::-1]}"
        },
        "one seed stands for all learning rates: a run is a learning rate and a seed": {
            '(row.settings["learning_rate"], row.settings["seed"]): row': 'row.settings["seed"]: row'
        },
        "rows that do not count hide the shipped ones: sort out before you choose whose rows to take": {
            "if counts(row):": "if row.task in standard:",
            _KEPT: "merged[key] = [row for row in each_once(of_one_machine(group)) if counts(row)]",
        },
        "the tasks are mixed: the keys are (task, method)": {"(row.task, row.method)": "row.method"},
        "task and method have changed places in the keys": {"(row.task, row.method)": "(row.method, row.task)"},
    },
    variants={
        "in one pass over what counts": """
            def merge_rows(own, shipped, standard):
                merged = {}
                for row in [*own, *shipped]:
                    if row.short or row.settings.get("variant") or row.task not in standard:
                        continue
                    if any(row.settings.get(name, value) != value for name, value in standard[row.task].items()):
                        continue
                    place = merged.setdefault((row.task, row.method), {})
                    place.setdefault(any(row is mine for mine in own), []).append(row)
                for key, sets in merged.items():
                    rows = sets.get(True) or sets[False]
                    per_machine = {}
                    for row in rows:
                        per_machine.setdefault(machine(row), []).append(row)
                    rows = max(per_machine.values(), key=len)
                    merged[key] = list({(row.settings["seed"], row.settings["learning_rate"]): row for row in rows}.values())
                return merged
        """,
        "set by set": """
            def merge_rows(own, shipped, standard):
                def standard_form(row):
                    if row.task not in standard or row.settings.get("variant", ""):
                        return False
                    wanted = standard[row.task]
                    return not row.short and all(row.settings[n] == wanted[n] for n in row.settings.keys() & wanted.keys())
                own, shipped = list(filter(standard_form, own)), list(filter(standard_form, shipped))
                result = {}
                for key in {(row.task, row.method) for row in own + shipped}:
                    mine = [row for row in own if (row.task, row.method) == key]
                    rows = mine if mine else [row for row in shipped if (row.task, row.method) == key]
                    machines = [machine(row) for row in rows]
                    counted = {name: machines.count(name) for name in machines}
                    most = [name for name in counted if counted[name] == max(counted.values())][0]
                    kept = []
                    for row in rows:
                        if machine(row) != most:
                            continue
                        run = row.settings["learning_rate"], row.settings["seed"]
                        kept = [other for other in kept
                                if (other.settings["learning_rate"], other.settings["seed"]) != run] + [row]
                    result[key] = kept
                return result
        """,
        "with unions of dicts": {
            "for rows in (own, shipped):": "for rows in (list(own), list(shipped)):",
            "return list(by_run.values())": "return [*by_run.values()]",
            "            if key not in merged:\n                merged[key] = each_once(of_one_machine(group))": (
                "            merged = {key: each_once(of_one_machine(group))} | merged"
            ),
        },
        "tuples for lists": {"return list(by_run.values())": "return tuple(by_run.values())"},
    },
)


# ======================================================================================================================
# 2. One line of the table
# ======================================================================================================================
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


def summary_tolerance(case: dict) -> dict[str, float]:
    """Allow the rounding of a mean of three numbers below 1 in fp64: a few times 1e-16."""
    names = ("score", "spread", "share", "forgetting")
    return {f"`{name}` of {label}": 1e-12 for label, _, _ in case["sets"] for name in names}


_LOSS = "math.inf if math.isnan(loss) else loss"
_MEAN = "mean(late_loss(row) for row in runs)"
_EDGES = "if best == min(by_rate) or best == max(by_rate):"

check_summarise = Exercise(
    spec=[summarise],
    driver=drive_summarise,
    cases=lambda generator: [summary_case(generator)],
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


# ======================================================================================================================
# 3. What nobody beats
# ======================================================================================================================
def pareto_front(points: Mapping[str, tuple[float, float, float]]) -> list[str]:
    """Return the names of the points that nothing on the front beats."""
    measured = [(name, *point) for name, point in points.items() if not (math.isnan(point[0]) or math.isnan(point[1]))]
    front = []
    for name, cost, score, noise in sorted(measured, key=lambda point: (point[1], -point[2])):
        beaten = False
        for _, other_cost, other_score, other_noise in front:
            clearly = max(noise, other_noise)
            if other_cost < cost and score - other_score <= clearly:
                beaten = True
            if other_cost == cost and other_score - score > clearly:
                beaten = True
        if not beaten:
            front.append((name, cost, score, noise))
    return [point[0] for point in front]


def drive_pareto(pareto_front, names, points, costs_only):
    """Ask for the front of all points, of one, of none, and of what is not measured at all."""
    everything = {name: tuple(point) for name, point in zip(names, points)}
    asked = {
        "all points": everything,
        "points exactly a noise apart": {
            "a": (1.0, 0.5, 0.0625),
            "b, not clearly above a": (2.0, 0.5625, 0.0625),
            "c": (3.0, 0.875, 0.125),
            "d, not clearly below c": (3.0, 0.75, 0.125),
        },
        "a single point": {"lora": (3.0, 0.5, 0.1)},
        "no points": {},
        "points without scores": {name: (cost, float("nan"), 0.1) for name, cost in zip(names, costs_only)},
    }
    seen = {}
    for label, given in asked.items():
        front = pareto_front(dict(given))
        if not isinstance(front, list | tuple | set | dict):
            return {"what pareto_front returns": type(front).__name__}
        seen[f"the front of {label}"] = sorted(str(name) for name in front)
    return seen


def pareto_case(generator: torch.Generator, scale: float = 1.0) -> dict:
    """Return points among which is every kind of tie and of noise; a name says what its point is there for."""
    dicing = dice(generator)
    unit, lift = scale * dicing.uniform(0.5, 2.0), dicing.uniform(-0.02, 0.02)
    points = {
        "cheapest": (1, 0.700, 0.010),
        "dearer and better": (3, 0.800, 0.018),
        "its twin": (3, 0.800, 0.018),
        "dearer, better by less than the noise": (4, 0.815, 0.010),
        "clearly better than all on the front": (5, 0.8195, 0.010),
        "dearer and worse": (6, 0.600, 0.010),
        "as dear, a little better": (7, 0.900, 0.010),
        "as dear, a little worse": (7, 0.895, 0.010),
        "as dear, clearly worse": (7, 0.850, 0.010),
        "better by less than its own noise": (8, 0.930, 0.050),
        "noisy, but clearly better": (9, 0.960, 0.045),
        "better by less than the other's noise": (10, 0.990, 0.010),
        "without a score": (0.5, math.nan, 0.010),
        "without a cost": (math.nan, 0.999, 0.010),
        "cheap and worse": (0.75, 0.400, 0.010),
    }
    order = dicing.sample(list(points), len(points))
    order.sort(key=lambda name: name != "as dear, clearly worse")  # first, so that the walk's order shows
    return {
        "names": order,
        "points": [[unit * points[name][0], points[name][1] + lift, points[name][2]] for name in order],
        "costs_only": [1.0, 2.0],
    }


_CLEARLY = "clearly = max(noise, other_noise)"
_ORDER = "key=lambda point: (point[1], -point[2])"
_MEASURED = "if not (math.isnan(point[0]) or math.isnan(point[1]))"

check_pareto_front = Exercise(
    spec=[pareto_front],
    driver=drive_pareto,
    cases=lambda generator: [pareto_case(generator)],
    mistakes={
        "noise is not looked at: a difference that two seeds can make is none": {_CLEARLY: "clearly = 0.0"},
        "only the point's own noise is looked at: take the larger of the two": {_CLEARLY: "clearly = noise"},
        "only the other point's noise is looked at: take the larger of the two": {_CLEARLY: "clearly = other_noise"},
        "the two noises are added: take the larger": {_CLEARLY: "clearly = noise + other_noise"},
        "the smaller of the two noises is taken: take the larger": {_CLEARLY: "clearly = min(noise, other_noise)"},
        "what is off the front still beats others: compare with what is on the front": {
            "for _, other_cost, other_score, other_noise in front:": (
                "for other, other_cost, other_score, other_noise in measured:\n"
                "            if other == name or other_cost > cost: continue"
            ),
        },
        "points that cost the same throw each other out, though neither is clearly better": {
            "if other_cost < cost and": "if other_cost <= cost and"
        },
        "a point stays although another costs the same and is clearly better": {"if other_cost == cost and": "if False and"},
        "a point without a score or a cost is on the front: what is not measured proves nothing": {
            "        if not beaten:\n            front.append((name, cost, score, noise))\n    return [point[0] for point in front]": (
                "        if not beaten:\n            front.append((name, cost, score, noise))\n"
                "    return [point[0] for point in front] + [name for name, p in points.items() if math.isnan(p[0] + p[1])]"
            )
        },
        "low scores win: score is to be high, cost to be low": {
            "measured = [(name, *point)": "measured = [(name, point[0], -point[1], point[2])",
        },
        "high costs win: cost is to be low, score to be high": {
            "measured = [(name, *point)": "measured = [(name, -point[0], point[1], point[2])",
        },
        "only the highest score is returned: the front holds every point for which something would have to be given up": {
            "return [point[0] for point in front]": "return [max(front, key=lambda point: point[2])[0]] if front else []"
        },
        "the cheapest point is missing: nothing that costs less beats it": {
            "return [point[0] for point in front]": "return [point[0] for point in front[1:]] or [point[0] for point in front]"
        },
        "a point has to be beaten on both axes at once, strictly: to cost more and bring no more is to be beaten": {
            "and score - other_score <= clearly": "and score < other_score",
        },
    },
    variants={
        "keep what is clearly better": """
            def pareto_front(points):
                front = {}
                known = {n: p for n, p in points.items() if p[0] == p[0] and p[1] == p[1]}
                for name in sorted(known, key=lambda n: (known[n][0], -known[n][1])):
                    cost, score, noise = known[name]
                    def stays(other):
                        margin = max(noise, other[2])
                        return score > other[1] + margin if other[0] < cost else not other[1] > score + margin
                    if all(stays(other) for other in front.values()):
                        front[name] = known[name]
                return list(front)
        """,
        "cost by cost": """
            def pareto_front(points):
                front = []
                costs = sorted({cost for cost, score, _ in points.values() if not math.isnan(cost + score)})
                for price in costs:
                    group = [(s, n, name) for name, (c, s, n) in points.items() if c == price and not math.isnan(s)]
                    cheaper = list(front)
                    for score, noise, name in sorted(group, key=lambda g: -g[0]):
                        if any(score - points[f][1] <= max(noise, points[f][2]) for f in cheaper):
                            continue
                        if any(points[f][1] - score > max(noise, points[f][2]) for f in front if f not in cheaper):
                            continue
                        front.append(name)
                return front
        """,
        "as a set": {"return [point[0] for point in front]": "return {point[0] for point in front}"},
        "NaN by arithmetic": {_MEASURED: "if point[0] + point[1] == point[0] + point[1]"},
    },
)


# ======================================================================================================================
# 4. The largest batch
# ======================================================================================================================
def largest_batch(peak: Callable[[int], float], usable: float, limit: int) -> int:
    """Return the largest batch up to `limit` whose peak is within `usable` bytes; 0 if not even one sequence fits."""
    if peak(1) > usable:
        return 0
    fits, too_large = 1, 2
    while too_large <= limit and peak(too_large) <= usable:
        fits, too_large = too_large, 2 * too_large
    too_large = min(too_large, limit + 1)
    while too_large - fits > 1:
        middle = (fits + too_large) // 2
        if peak(middle) <= usable:
            fits = middle
        else:
            too_large = middle
    return fits


def drive_largest(largest_batch, situations):
    """Ask for several machines; the peak is the largest of a step's stages, each of which grows along a line."""
    import math

    seen = {}
    for label, stages, usable, limit in situations:
        asked = []

        def peak(batch, stages=stages, asked=asked):
            asked.append(batch)
            if len(asked) > 10_000:
                raise RuntimeError("10,000 measurements and no end")
            return max(fixed + each * batch for fixed, each in stages)

        answer = largest_batch(peak, usable, limit)
        seen |= {
            f"the type of the answer {label}": type(answer).__name__,
            f"the largest batch {label}": answer if isinstance(answer, int | float) else repr(answer),
            f"a batch below 1 or above the limit is measured {label}": any(not 1 <= batch <= limit for batch in asked),
            f"more than 2 log2(limit) + 2 measurements are made {label}": len(asked) > 2 * math.log2(limit) + 2,
        }
    return seen


def batch_case(generator: torch.Generator, limit: int = 200) -> dict:
    """Return stages of training steps, [bytes at any batch, bytes a sequence], and what may be used."""
    fixed, each = between(generator, 10_000, 20_000), between(generator, 500, 900)
    batch = between(generator, limit // 3, limit // 2 - 3)
    batch += batch in (64, 128)  # no power of two
    flat = fixed + each * 9 + each // 2  # the optimizer's stage is the largest up to a batch of nine
    exactly = fixed + each * batch
    return {
        "situations": [
            ["where it just fits", [[fixed, each]], exactly, limit],
            ["where one byte is missing", [[fixed, each]], exactly - 1, limit],
            ["where the first batches have the same peak", [[flat, 0], [fixed, each]], exactly + each // 2, limit],
            ["where it grows faster later on", [[fixed, each], [fixed - 20 * each, 3 * each]], exactly, limit],
            ["where one sequence is too long", [[fixed, each]], fixed + each - 1, limit],
            ["where only one sequence fits", [[fixed, each]], fixed + each, limit],
            ["where more than the limit would fit", [[fixed, each]], fixed + 3 * each * limit, limit],
            ["where the limit itself just fits", [[fixed, each]], fixed + each * limit, limit],
            ["where the limit is 1", [[fixed, each]], fixed + 5 * each, 1],
        ]
    }


_BEGIN = "if peak(1) > usable:\n        return 0\n"
_SEARCH = "while too_large - fits > 1:"
_ANSWER = "    return fits\n"

check_largest_batch = Exercise(
    spec=[largest_batch],
    driver=drive_largest,
    cases=lambda generator: [batch_case(generator), batch_case(generator, limit=90)],
    mistakes={
        "what just fits is refused: the peak may be as large as what is usable": {
            "if peak(middle) <= usable:": "if peak(middle) < usable:",
            "and peak(too_large) <= usable": "and peak(too_large) < usable",
            "if peak(1) > usable:": "if peak(1) >= usable:",
        },
        "a batch of 1 is returned where not even one sequence fits: that is 0": {
            _BEGIN: "pass\n",
            "fits, too_large = 1, 2": "fits, too_large = 1, 2",
        },
        "a line is drawn through the peaks of 1 and 2 sequences: a step's peak is the largest of several stages, and no line": {
            _SEARCH: "first, each = peak(1), max(peak(2) - peak(1), 1e-9) if limit > 1 else 1\n    "
            "return min(limit, int((usable - first) // each) + 1)\n    while too_large - fits > 1:",
            "while too_large <= limit and peak(too_large) <= usable:": "while False:",
        },
        "the batch is what is usable, divided by the peak of one sequence: weights are there only once": {
            _SEARCH: "return min(limit, int(usable // peak(1)))\n    while too_large - fits > 1:",
            "while too_large <= limit and peak(too_large) <= usable:": "while False:",
        },
        "only powers of two are tried: search between the last that fits and the first that does not": {
            _SEARCH: "while False:"
        },
        "every batch is measured one after the other: each costs seconds; double, then halve the interval": {
            "fits, too_large = too_large, 2 * too_large": "fits, too_large = too_large, too_large + 1"
        },
        "the first batch that does not fit is returned: the answer is the one before it": {_ANSWER: "    return too_large\n"},
        "the answer is one too small": {_ANSWER: "    return max(fits - 1, 1)\n"},
        "the limit is passed: nothing above it is asked for": {
            "while too_large <= limit and peak(too_large) <= usable:": "while peak(too_large) <= usable:",
            "    too_large = min(too_large, limit + 1)\n": "",
        },
        "the limit itself is never tried": {"min(too_large, limit + 1)": "min(too_large, max(limit, 2))"},
        "the answer is a float: use // where you halve": {"return fits\n": "return float(fits)\n"},
        "the peak is measured at a batch of 0, which there is not": {
            "if peak(1) > usable:": "if peak(0) > usable or peak(1) > usable:"
        },
    },
    variants={
        "halving alone": """
            def largest_batch(peak, usable, limit):
                low, high = 0, limit + 1
                while high - low > 1:
                    middle = (low + high) // 2
                    low, high = (middle, high) if peak(middle) <= usable else (low, middle)
                return low
        """,
        "with bisect": """
            def largest_batch(peak, usable, limit):
                from bisect import bisect_right
                return bisect_right(range(1, limit + 1), usable, key=peak)
        """,
        "recursively": """
            def largest_batch(peak, usable, limit):
                def between(low, high):
                    if low == high:
                        return low
                    middle = low + (high - low + 1) // 2
                    return between(middle, high) if peak(middle) <= usable else between(low, middle - 1)
                return between(0, limit)
        """,
        "by bits": """
            def largest_batch(peak, usable, limit):
                batch = 0
                for bit in reversed(range(limit.bit_length())):
                    larger = batch + 2**bit
                    if larger <= limit and peak(larger) <= usable:
                        batch = larger
                return batch
        """,
    },
)


# ======================================================================================================================
# 5. What one more rank costs
# ======================================================================================================================
def cost_of_rank(measure: Callable[[int], StepMemory], ranks: Sequence[int]) -> list[dict[str, float]]:
    """Return, from each rank to the next, the bytes that one more of them costs, by category and in the file."""
    steps = [measure(rank) for rank in ranks]
    costs = []
    for (low, before), (high, after) in pairwise(zip(ranks, steps)):
        cost = {}
        for category in ("parameters", "gradients", "optimizer_state", "activations"):
            cost[category] = (getattr(after, category) - getattr(before, category)) / (high - low)
        cost["file"] = cost["gradients"]
        costs.append(cost)
    return costs


def drive_cost(cost_of_rank, ranks, sizes):
    """Ask for the costs; the measurement is a table here, and counts how often it is looked up."""
    from peftlab.memory import StepMemory

    asked = []

    def measure(rank):
        asked.append(rank)
        return StepMemory(*sizes[ranks.index(rank)])

    costs = cost_of_rank(measure, list(ranks))
    if not isinstance(costs, list):
        return {"what cost_of_rank returns": type(costs).__name__}
    seen = {"how many steps from one rank to the next": len(costs)}
    for number, cost in enumerate(costs):
        if not isinstance(cost, dict):
            return seen | {"what the list holds": type(cost).__name__}
        seen["the list of names in each dict"] = sorted(str(name) for name in cost)
        for name, value in cost.items():
            seen[f"`{name}` of step {number + 1}"] = value
    return seen | {"a rank is measured more than once": len(set(asked)) < len(asked)}


def rank_case(generator: torch.Generator, ranks: Sequence[int] = (2, 5, 16, 24)) -> dict:
    """Return a table of measurements; no two steps cost the same, so that no mean can hide."""
    dicing = dice(generator)
    sizes = [[10**6, 10**3, 3 * 10**3, 10**5, 2 * 10**6]]
    for low, high in pairwise(ranks):
        trained, kept = dicing.randrange(50, 90), dicing.randrange(10, 40)
        step = [2 * trained, 2 * trained, 4 * trained, kept, 3 * trained + kept]
        sizes.append([before + (high - low) * each for before, each in zip(sizes[-1], step)])
    return {"ranks": list(ranks), "sizes": sizes}


_DIFFERENCE = "(getattr(after, category) - getattr(before, category)) / (high - low)"

check_cost_of_rank = Exercise(
    spec=[cost_of_rank],
    driver=drive_cost,
    cases=lambda generator: [rank_case(generator)],
    # A quotient of two integers in fp64.
    tolerance=lambda case: {
        f"`{name}` of step {number}": 1e-6
        for name in ("parameters", "gradients", "optimizer_state", "activations", "file")
        for number in range(1, len(case["ranks"]))
    },
    mistakes={
        "the difference is for the whole step: divide by the number of ranks between": {" / (high - low)": ""},
        "the difference is divided by the higher rank: divide by the number of ranks between": {"(high - low)": "high"},
        "every rank is compared with the first: marginal cost is from one rank to the next": {
            "getattr(before, category)": "getattr(steps[0], category)",
            "(high - low)": "(high - ranks[0])",
        },
        "this is the average cost of a rank, the base model included: take the difference to the rank before": {
            _DIFFERENCE: "getattr(after, category) / high"
        },
        "the sign is wrong: the higher rank minus the lower": {
            _DIFFERENCE: "(getattr(before, category) - getattr(after, category)) / (high - low)"
        },
        "activations are the peak's difference: the peak holds the other categories as well": {
            _DIFFERENCE: "(getattr(after, c := category.replace('activations', 'peak')) - getattr(before, c)) / (high - low)"
        },
        "the file holds the factors once; it is as large as their gradients, and has no optimizer state in it": {
            'cost["file"] = cost["gradients"]': 'cost["file"] = cost["gradients"] + cost["optimizer_state"]'
        },
        "the file is counted in fp32: it has the dtype of the weights, and so the bytes of the gradients": {
            'cost["file"] = cost["gradients"]': 'cost["file"] = 2 * cost["gradients"]'
        },
        "the file's whole size is given: what one more rank adds to it is wanted": {
            'cost["file"] = cost["gradients"]': 'cost["file"] = after.gradients'
        },
        "`file` is missing": {'cost["file"] = cost["gradients"]': "pass"},
        "the optimizer's state is missing: AdamW keeps two numbers for each trained one": {'"optimizer_state", ': ""},
        "bytes are rounded down: use / rather than //": {"/ (high - low)": "// (high - low) + 0.4"},
        "every rank but the ends is measured twice: measure once and keep it, for a measurement takes seconds": {
            "getattr(before, category)": "getattr(measure(low), category)",
        },
        "there is one entry too many: between n ranks are n - 1 steps": {
            "pairwise(zip(ranks, steps))": "[((0, steps[0]), (ranks[0], steps[0])), *pairwise(zip(ranks, steps))]"
        },
    },
    variants={
        "by index": """
            def cost_of_rank(measure, ranks):
                measured = {rank: measure(rank) for rank in ranks}
                found = []
                for i in range(1, len(ranks)):
                    more = ranks[i] - ranks[i - 1]
                    a, b = measured[ranks[i - 1]], measured[ranks[i]]
                    found.append({
                        "parameters": (b.parameters - a.parameters) / more,
                        "gradients": (b.gradients - a.gradients) / more,
                        "optimizer_state": (b.optimizer_state - a.optimizer_state) / more,
                        "activations": (b.activations - a.activations) / more,
                        "file": (b.gradients - a.gradients) / more,
                    })
                return found
        """,
        "from the fields of the dataclass": """
            def cost_of_rank(measure, ranks):
                from dataclasses import asdict
                steps = [asdict(measure(rank)) for rank in ranks]
                costs = []
                for low, high, before, after in zip(ranks, ranks[1:], steps, steps[1:]):
                    cost = {name: (after[name] - before[name]) / (high - low) for name in after if name != "peak"}
                    costs.append(cost | {"file": cost["gradients"]})
                return costs
        """,
        "measured as it goes": """
            def cost_of_rank(measure, ranks):
                costs, last = [], None
                for rank in ranks:
                    now = rank, measure(rank)
                    if last:
                        per = 1 / (now[0] - last[0])
                        cost = {n: per * (getattr(now[1], n) - getattr(last[1], n))
                                for n in ("gradients", "parameters", "activations", "optimizer_state")}
                        cost["file"] = cost["gradients"]
                        costs.append(cost)
                    last = now
                return costs
        """,
    },
)


# ======================================================================================================================
# 6. The rules
# ======================================================================================================================
def broken_rules(option: Option, job: Job) -> list[Reason]:
    """Return a reason for every rule that the option breaks, in the order of the rules."""
    broken = []
    if job.wish is not None and job.wish != option.method:
        broken.append(Reason("wish", option.method, job.wish))
    if ACCESS.index(option.access) > ACCESS.index(job.access):
        broken.append(Reason("access", option.access, job.access))
    if job.access == "weights":
        if option.peak_bytes > job.gpu_bytes:
            broken.append(Reason("training memory", option.peak_bytes, job.gpu_bytes))
        serving = option.base_bytes + job.tasks * option.task_bytes
        if serving > job.gpu_bytes:
            broken.append(Reason("serving memory", serving, job.gpu_bytes))
    added = 0.0 if option.mergeable and job.tasks == 1 else option.latency
    if added > job.latency:
        broken.append(Reason("latency", added, job.latency))
    if job.quality > 0 and (option.quality is None or option.quality + option.spread < job.quality):
        broken.append(Reason("quality", option.quality, job.quality))
    return broken


def drive_rules(broken_rules, pairs):
    """Ask which rules each option breaks in each job."""
    from peftlab.choosing import Job, Option

    seen = {}
    for label, option, job in pairs:
        broken = broken_rules(Option(**option), Job(**job))
        if not isinstance(broken, list | tuple):
            return {"what broken_rules returns": type(broken).__name__}
        seen[f"the list of reasons {label}"] = [list(reason) for reason in broken]
    return seen


def rules_case(generator: torch.Generator, unit: int = 10**9) -> dict:
    """Return pairs of an option and a job around every border. Shares are sixty-fourths, so that sums of them are exact."""
    dicing = dice(generator)
    base, file, gpu = dicing.randrange(20, 30) * unit, dicing.randrange(1, 4) * unit, dicing.randrange(60, 90) * unit
    spread, target, added = (dicing.randrange(*ends) / 64 for ends in ((1, 4), (50, 60), (4, 12)))
    option = {
        "method": "lora",
        "access": "weights",
        "peak_bytes": base + 5 * unit,
        "base_bytes": base,
        "task_bytes": file,
        "quality": 63 / 64,
        "spread": spread,
        "latency": added,
        "mergeable": True,
    }
    job = {
        "gpu_bytes": gpu,
        "access": "weights",
        "tasks": 1,
        "quality": 0.0,
        "latency": math.inf,
        "prefer": "quality",
        "wish": None,
    }
    prompt = {"method": "prompt_tuning", "access": "embeddings", "mergeable": False, "task_bytes": unit // 1000}
    many = (gpu - base) // file
    pairs = {
        "where nothing is broken": ({}, {}),
        "where the training step just fits": ({"peak_bytes": gpu}, {}),
        "where the training step is one byte too large": ({"peak_bytes": gpu + 1}, {}),
        "where all the tasks just fit": ({"base_bytes": gpu - many * file}, {"tasks": many}),
        "where all the tasks are one byte too many": ({"base_bytes": gpu - many * file + 1}, {"tasks": many}),
        "where nothing is shared, and each task is a whole model": (
            {"method": "full", "base_bytes": 0, "task_bytes": base, "latency": 0.0},
            {"tasks": 4, "latency": 0.0},
        ),
        "where one task is merged": ({}, {"latency": 0.0}),
        "where two tasks cannot both be merged": ({}, {"latency": 0.0, "tasks": 2}),
        "where nothing can be merged": ({"mergeable": False}, {"latency": added / 2}),
        "where as much is added as is allowed": ({"mergeable": False}, {"latency": added}),
        "where the spread reaches the target": ({"quality": target - spread}, {"quality": target}),
        "where the spread does not reach the target": ({"quality": target - spread - 1 / 64}, {"quality": target}),
        "where the target is just reached": ({"quality": target}, {"quality": target}),
        "where the target is passed": ({"quality": target + 1 / 64}, {"quality": target}),
        "where the quality is not known and something is demanded": ({"quality": None}, {"quality": target}),
        "where the quality is not known and nothing is demanded": ({"quality": None}, {}),
        "where LoRA is wished for": ({}, {"wish": "lora"}),
        "where another method is wished for": ({}, {"wish": "adapters"}),
        "where weights are out of reach": ({}, {"access": "embeddings"}),
        "where embeddings are enough": (prompt, {"access": "embeddings"}),
        "where embeddings are enough and weights within reach": (prompt, {"access": "weights"}),
        "where only text goes in": (prompt, {"access": "text"}),
        "where others run a model too large for one's own GPU": (prompt | {"peak_bytes": 3 * gpu}, {"access": "embeddings"}),
        "where others serve a model too large for one's own GPU": (prompt | {"base_bytes": 3 * gpu}, {"access": "embeddings"}),
        "where everything is broken": (
            {"peak_bytes": 2 * gpu, "base_bytes": gpu, "mergeable": False, "quality": target / 2},
            {"wish": "bitfit", "latency": added / 4, "quality": target},
        ),
        "where everything that an API can break is broken": (
            {"peak_bytes": 2 * gpu, "mergeable": False, "quality": target / 2},
            {"wish": "bitfit", "latency": added / 4, "quality": target, "access": "text"},
        ),
    }
    return {"pairs": [[label, option | changed, job | demanded] for label, (changed, demanded) in pairs.items()]}


_ADDED = "0.0 if option.mergeable and job.tasks == 1 else option.latency"
_SERVING = "serving = option.base_bytes + job.tasks * option.task_bytes"
_QUALITY = "if job.quality > 0 and (option.quality is None or option.quality + option.spread < job.quality):"

check_broken_rules = Exercise(
    spec=[broken_rules],
    driver=drive_rules,
    cases=lambda generator: [rules_case(generator)],
    mistakes={
        "a training step that just fits is refused: as many bytes as there are may be used": {
            "option.peak_bytes > job.gpu_bytes": "option.peak_bytes >= job.gpu_bytes"
        },
        "tasks that just fit are refused: as many bytes as there are may be used": {
            "serving > job.gpu_bytes": "serving >= job.gpu_bytes"
        },
        "each task is counted with a base of its own: the base is there once": {
            _SERVING: "serving = job.tasks * (option.base_bytes + option.task_bytes)"
        },
        "one task is served, whatever the job says": {_SERVING: "serving = option.base_bytes + option.task_bytes"},
        "serving is not looked at: twenty copies of a model do not fit where one trains": {_SERVING: "serving = 0"},
        "memory is demanded where others run the model: these rules hold only with access to the weights": {
            'if job.access == "weights":': "if True:"
        },
        "prompt tuning is refused where weights can be reached: whoever has the weights has the embeddings": {
            "ACCESS.index(option.access) > ACCESS.index(job.access)": "option.access != job.access"
        },
        "levels of access are compared as words, in the order of the alphabet: use their place in ACCESS": {
            "ACCESS.index(option.access) > ACCESS.index(job.access)": "option.access > job.access"
        },
        "several tasks are taken to be merged at once: one copy of the weights holds one of them": {
            _ADDED: "0.0 if option.mergeable else option.latency"
        },
        "what can be merged is charged for latency with one task, too": {_ADDED: "option.latency"},
        "a single task is taken to add nothing though it cannot be merged": {
            _ADDED: "0.0 if job.tasks == 1 else option.latency"
        },
        "as much latency as is allowed is refused": {"if added > job.latency:": "if added >= job.latency and added > 0:"},
        "the spread is not looked at: what a third seed could reach is not clearly below the target": {
            "option.quality + option.spread < job.quality": "option.quality < job.quality"
        },
        "the spread is held against the method: it is out if it is clearly below the target": {
            "option.quality + option.spread < job.quality": "option.quality - option.spread < job.quality"
        },
        "an unmeasured quality passes a demand: what has not been measured cannot be promised": {
            _QUALITY: "if option.quality is not None and option.quality + option.spread < job.quality:"
        },
        "an unmeasured quality is refused though nothing is demanded": {
            "if job.quality > 0 and (": "if (job.quality >= 0) and ("
        },
        "only the first reason is returned: return all of them": {"return broken\n": "return broken[:1]\n"},
        "the reasons are in another order than the rules": {"return broken\n": "return broken[::-1]\n"},
        "no wish is taken for a wish": {"job.wish is not None and ": ""},
        "wishes are not looked at": {"job.wish is not None and ": "False and "},
        "figure and limit have changed places: first what the option has, then what the job allows": {
            "return broken\n": "return [Reason(rule, limit, figure) for rule, figure, limit in broken]\n"
        },
    },
    variants={
        "a table of rules": """
            def broken_rules(option, job):
                serving = option.base_bytes + option.task_bytes * job.tasks
                added = option.latency * (not (option.mergeable and job.tasks == 1))
                own = job.access == "weights"
                short = option.quality is None or option.quality + option.spread < job.quality
                table = [
                    (job.wish not in (None, option.method), "wish", option.method, job.wish),
                    (ACCESS.index(job.access) < ACCESS.index(option.access), "access", option.access, job.access),
                    (own and job.gpu_bytes < option.peak_bytes, "training memory", option.peak_bytes, job.gpu_bytes),
                    (own and job.gpu_bytes < serving, "serving memory", serving, job.gpu_bytes),
                    (job.latency < added, "latency", added, job.latency),
                    (bool(job.quality) and short, "quality", option.quality, job.quality),
                ]
                return [Reason(*rest) for is_broken, *rest in table if is_broken]
        """,
        "plain tuples": {"return broken\n": "return tuple(tuple(reason) for reason in broken)\n"},
        "with a generator": """
            def broken_rules(option, job):
                def rules():
                    if job.wish and option.method != job.wish:
                        yield Reason("wish", option.method, job.wish)
                    within = ACCESS[: ACCESS.index(job.access) + 1]
                    if option.access not in within:
                        yield Reason("access", option.access, job.access)
                    if within == ACCESS:
                        needed = {"training memory": option.peak_bytes,
                                  "serving memory": option.base_bytes + sum([option.task_bytes] * job.tasks)}
                        for rule, size in needed.items():
                            if not size <= job.gpu_bytes:
                                yield Reason(rule, size, job.gpu_bytes)
                    if not (option.mergeable and job.tasks == 1) and option.latency > job.latency:
                        yield Reason("latency", option.latency, job.latency)
                    if job.quality and (option.quality is None or job.quality - option.quality > option.spread):
                        yield Reason("quality", option.quality, job.quality)
                return list(rules())
        """,
    },
)


# ======================================================================================================================
# 7. The recommendation
# ======================================================================================================================
def recommend(
    job: Job, options: Sequence[Option], broken_rules: Callable[[Option, Job], list[Reason]]
) -> Recommendation | Refusal:
    """Return the option to take, or why there is none and what comes nearest."""

    def choice(demands: Job) -> Option | None:
        fitting = [option for option in options if not broken_rules(option, demands)]
        if not fitting:
            return None
        if job.prefer == "file":
            return min(fitting, key=lambda option: option.task_bytes)
        if job.prefer == "quality":
            measured = [option for option in fitting if option.quality is not None]
            if measured:
                best = max(measured, key=lambda option: option.quality)
                fitting = [option for option in measured if best.quality - option.quality <= max(best.spread, option.spread)]
        return min(fitting, key=lambda option: option.peak_bytes)

    rejected = {}
    for option in options:
        reasons = broken_rules(option, job)
        if reasons:
            rejected[option.method] = reasons[0]
    chosen = choice(job)
    if chosen is not None:
        return Recommendation(chosen.method, rejected)
    relaxed, given_up = job, []
    for demand, nothing in (("wish", None), ("latency", math.inf), ("quality", 0.0)):
        if getattr(relaxed, demand) == nothing:
            continue
        relaxed = replace(relaxed, **{demand: nothing})
        given_up.append(demand)
        chosen = choice(relaxed)
        if chosen is not None:
            return Refusal(rejected, chosen.method, tuple(given_up))
    sizes = {}
    for option in options:
        if ACCESS.index(option.access) <= ACCESS.index(job.access):
            sizes[option.method] = max(option.peak_bytes, option.base_bytes + job.tasks * option.task_bytes)
    if not sizes:
        return Refusal(rejected, None)
    nearest = min(sizes, key=sizes.get)
    return Refusal(rejected, nearest, (*given_up, "memory"), sizes[nearest])


def drive_recommend(recommend, options, jobs):
    """Ask for every job; the rules are the driver's own."""
    from peftlab.choosing import ACCESS, Job, Option, Reason

    def rules(option, job):
        broken, serving = [], option.base_bytes + job.tasks * option.task_bytes
        added = option.latency if job.tasks > 1 or not option.mergeable else 0.0
        if job.wish not in (None, option.method):
            broken.append(Reason("wish", option.method, job.wish))
        if ACCESS.index(option.access) > ACCESS.index(job.access):
            broken.append(Reason("access", option.access, job.access))
        if job.access == "weights" and option.peak_bytes > job.gpu_bytes:
            broken.append(Reason("training memory", option.peak_bytes, job.gpu_bytes))
        if job.access == "weights" and serving > job.gpu_bytes:
            broken.append(Reason("serving memory", serving, job.gpu_bytes))
        if added > job.latency:
            broken.append(Reason("latency", added, job.latency))
        if job.quality > 0 and (option.quality is None or option.quality + option.spread < job.quality):
            broken.append(Reason("quality", option.quality, job.quality))
        return broken

    built = [Option(**option) for option in options]
    seen = {}
    for label, job in jobs:
        answer = recommend(Job(**job), list(built), rules)
        kind = type(answer).__name__
        seen[f"what is returned {label}"] = kind
        if kind not in ("Recommendation", "Refusal"):
            return seen
        if kind == "Recommendation":
            seen[f"the method {label}"] = answer.method
        else:
            seen[f"the nearest method {label}"] = answer.nearest
            seen[f"the demands given up {label}"] = list(answer.given_up)
            seen[f"the memory it takes {label}"] = answer.gpu_bytes
        seen[f"why options are out {label}"] = {name: list(reason) for name, reason in sorted(answer.rejected.items())}
    return seen


def evidence_case(generator: torch.Generator, measured: bool = True, unit: int = 10**9) -> dict:
    """Return options in the proportions that LLaMA-7B has, in random order, and jobs of every kind.

    Args:
        measured: whether the quality of QLoRA and of prefix tuning is known.
        unit: bytes of a gigabyte of these.
    """
    dicing = dice(generator)

    def gigabytes(size: float) -> int:
        return round(size * unit * dicing.uniform(0.99, 1.01))

    base, small, tie = gigabytes(13.5), gigabytes(4.2), gigabytes(15.5)
    names = ("method", "access", "peak_bytes", "base_bytes", "task_bytes", "quality", "spread", "latency", "mergeable")
    rows = [
        ("full", "weights", gigabytes(54), 0, base, 1.0, 1 / 64, 0.0, True),
        ("layer_freezing", "weights", gigabytes(20), base, gigabytes(1.7), 60 / 64, 1 / 64, 0.0, True),
        ("lora", "weights", gigabytes(17), base, gigabytes(0.08), 63 / 64, 1 / 128, 0.15, True),
        ("qlora", "weights", gigabytes(7), small, gigabytes(0.08), 61 / 64 if measured else None, 1 / 64, 0.4, False),
        ("adapters", "weights", gigabytes(16.5), base, gigabytes(0.03), 62 / 64, 1 / 64, 0.2, False),
        ("prefix_tuning", "weights", tie, base, gigabytes(0.008), 57 / 64 if measured else None, 3 / 64, 0.05, False),
        ("prompt_tuning", "embeddings", gigabytes(15.8), base, unit // 8000, 54 / 64, 1 / 64, 0.06, False),
        ("bitfit", "weights", tie, base, gigabytes(0.003), 58 / 64, 1 / 64, 0.03, False),
    ]
    options = [dict(zip(names, row)) for row in rows]
    of = {option["method"]: option for option in options}
    full, qlora = of["full"], of["qlora"]
    jobs = {
        "where there is plenty of memory": {"gpu_bytes": 80 * unit},
        "where there is plenty of memory, and memory is to be saved": {"gpu_bytes": 80 * unit, "prefer": "memory"},
        "where there is plenty of memory, and files are to be small": {"gpu_bytes": 80 * unit, "prefer": "file"},
        "where two methods need the same memory": {"gpu_bytes": 24 * unit, "latency": 0.05, "prefer": "memory"},
        "where memory is limited": {"gpu_bytes": 12 * unit},
        "where one method just fits": {"gpu_bytes": qlora["peak_bytes"]},
        "where one byte is missing": {"gpu_bytes": qlora["peak_bytes"] - 1},
        "where all is demanded, and one byte is missing": {
            "gpu_bytes": qlora["peak_bytes"] - 1, "wish": "lora", "latency": 0.0, "quality": 1.0,
        },
        "where 20 tasks are served at once": {"gpu_bytes": 40 * unit, "tasks": 20, "quality": 62 / 64},
        "where 20 tasks are served at once, and nothing may be added": {"gpu_bytes": 80 * unit, "tasks": 20, "latency": 0.0},
        "where 1,000 tasks are served at once": {"gpu_bytes": 30 * unit, "tasks": 1000, "quality": 60 / 64},
        "where 100,000 tasks are served at once": {"gpu_bytes": 20 * unit, "tasks": 100_000, "prefer": "file"},
        "where a little may be added": {"gpu_bytes": 24 * unit, "latency": 0.04},
        "where nothing may be added, and one task is merged": {"gpu_bytes": 24 * unit, "latency": 0.0},
        "where embeddings go in and gradients come back": {"gpu_bytes": unit, "access": "embeddings"},
        "where QLoRA is wished for through an API": {"gpu_bytes": unit, "access": "embeddings", "wish": "qlora"},
        "where nothing may be added, through an API": {"gpu_bytes": unit, "access": "embeddings", "latency": 0.0},
        "where full quality is demanded, through an API": {"gpu_bytes": unit, "access": "embeddings", "quality": 1.0},
        "where only text goes in": {"gpu_bytes": 80 * unit, "access": "text"},
        "where only text goes in, and full fine-tuning is wished for": {"gpu_bytes": 80 * unit, "access": "text", "wish": "full"},
        "where full fine-tuning is wished for, and fits": {"gpu_bytes": full["peak_bytes"], "wish": "full"},
        "where full fine-tuning is wished for, on 24 GB": {"gpu_bytes": 24 * unit, "wish": "full"},
        "where full fine-tuning is wished for, on 4 GB": {"gpu_bytes": 4 * unit, "wish": "full"},
        "where adapters are wished for, and nothing may be added": {"gpu_bytes": 24 * unit, "wish": "adapters", "latency": 0.0},
        "where adapters, no latency and full quality are wished for, on 12 GB": {
            "gpu_bytes": 12 * unit, "wish": "adapters", "latency": 0.0, "quality": 1.0,
        },
        "where nearly full quality is demanded, on 12 GB": {"gpu_bytes": 12 * unit, "quality": 62 / 64},
        "where full quality and little latency are demanded, on 16.2 GB": {
            "gpu_bytes": round(16.25 * unit), "quality": 1.0, "latency": 0.04,
        },
        "where full quality and some latency are demanded, with 20 tasks": {
            "gpu_bytes": 24 * unit, "quality": 63 / 64, "latency": 0.1, "tasks": 20,
        },
    }  # fmt: skip
    asked = [[label, job] for label, job in jobs.items() if measured or "memory" in label or "demanded" in label]
    return {"options": dicing.sample(options, len(options)), "jobs": asked}


_AS_GOOD = "best.quality - option.quality <= max(best.spread, option.spread)"
_DEMANDS = '(("wish", None), ("latency", math.inf), ("quality", 0.0))'
_NEEDS = "max(option.peak_bytes, option.base_bytes + job.tasks * option.task_bytes)"

check_recommend = Exercise(
    spec=[recommend],
    driver=drive_recommend,
    cases=lambda generator: [evidence_case(generator), evidence_case(generator, measured=False)],
    mistakes={
        "the highest score wins even where another is not clearly below it and costs less": {
            _AS_GOOD: "option is best",
        },
        "the spread of the best alone decides what is clearly below it: take the larger of the two spreads": {
            _AS_GOOD: "best.quality - option.quality <= best.spread"
        },
        "the preference is not looked at": {
            'if job.prefer == "file":': "if False:",
            'if job.prefer == "quality":': "if True:",
        },
        "who wants small files gets the smallest training step": {'if job.prefer == "file":': "if False:"},
        "who wants to save memory gets the best quality": {'if job.prefer == "quality":': 'if job.prefer != "file":'},
        "an option whose quality is not known beats measured ones: it comes after all that are measured": {
            "            if measured:\n": "            if measured and len(measured) == len(fitting):\n"
        },
        "an option whose quality is not known is never taken: where nothing is demanded, it may be": {
            "            if measured:\n": "            if not measured:\n                return None\n            if measured:\n"
        },
        "the last reason is given for what is out: give the first rule that an option breaks": {
            "rejected[option.method] = reasons[0]": "rejected[option.method] = reasons[-1]"
        },
        "reasons are missing: every option that breaks a rule is in `rejected`": {
            "return Recommendation(chosen.method, rejected)": (
                'return Recommendation(chosen.method, {n: r for n, r in rejected.items() if r.rule != "latency"})'
            )
        },
        "options that break no rule are in `rejected`": {
            "        if reasons:\n            rejected[option.method] = reasons[0]": (
                '        rejected[option.method] = reasons[0] if reasons else Reason("preference", 0.0, 0.0)'
            )
        },
        "of equals the last one given is taken: take the first": {
            "return min(fitting, key=lambda option: option.peak_bytes)": (
                "return min(reversed(fitting), key=lambda option: option.peak_bytes)"
            )
        },
        "a refusal names nothing that would be possible": {
            "return Refusal(rejected, chosen.method, tuple(given_up))": "return Refusal(rejected, None)",
            'return Refusal(rejected, nearest, (*given_up, "memory"), sizes[nearest])': "return Refusal(rejected, None)",
        },
        "demands are given up in another order: first the wish, then latency, then quality": {
            _DEMANDS: '(("quality", 0.0), ("latency", math.inf), ("wish", None))'
        },
        "each demand is given up alone and then taken back: they go one after the other, and stay away": {
            "relaxed = replace(relaxed, **{demand: nothing})": "relaxed = replace(job, **{demand: nothing})"
        },
        "all demands are given up at once: stop as soon as something is possible": {
            "        chosen = choice(relaxed)\n        if chosen is not None:\n": (
                "        chosen = None\n"
                '        if demand == [d for d in ("wish", "latency", "quality") if getattr(job, d) not in (None, math.inf, 0.0)][-1]:\n'
                "            chosen = choice(relaxed)\n        if chosen is not None:\n"
            )
        },
        "demands are given up that nobody had made": {
            "        if getattr(relaxed, demand) == nothing:\n            continue\n": ""
        },
        "the reasons are those of the relaxed job: say why an option is out of the job as it was asked": {
            "return Refusal(rejected, chosen.method, tuple(given_up))": (
                "return Refusal({o.method: broken_rules(o, relaxed)[0] for o in options if broken_rules(o, relaxed)}, "
                "chosen.method, tuple(given_up))"
            )
        },
        "serving is forgotten in the memory that it takes: what is trained has to be served, too": {
            _NEEDS: "option.peak_bytes"
        },
        "where nothing fits, the best method is named: name the one that takes the least memory": {
            "nearest = min(sizes, key=sizes.get)": (
                "nearest = max((o for o in options if o.method in sizes), key=lambda o: o.quality or 0.0).method"
            )
        },
        "a method is named that the API does not admit": {
            "        if ACCESS.index(option.access) <= ACCESS.index(job.access):\n    ": "        if True:\n    "
        },
        'what is given up lacks "memory", where more of it is the only way': {'(*given_up, "memory")': "tuple(given_up)"},
        "a refusal is returned where something is possible, or the other way round": {
            "return Recommendation(chosen.method, rejected)": "return Refusal(rejected, chosen.method)"
        },
    },
    variants={
        "with a sort": """
            def recommend(job, options, broken_rules):
                reasons = {option.method: broken_rules(option, job) for option in options}
                rejected = {method: broken[0] for method, broken in reasons.items() if broken}

                def best_of(found):
                    if job.prefer == "file":
                        return sorted(found, key=lambda o: o.task_bytes)[0]
                    known = [o for o in found if o.quality is not None]
                    if job.prefer == "quality" and known:
                        top = sorted(known, key=lambda o: -o.quality)[0]
                        found = [o for o in known if o.quality >= top.quality - max(o.spread, top.spread)]
                    return sorted(found, key=lambda o: o.peak_bytes)[0]

                demands, gone = job, ()
                steps = [{}, {"wish": None}, {"latency": math.inf}, {"quality": 0.0}]
                for step in steps:
                    for name, value in step.items():
                        if getattr(job, name) != value:
                            gone += (name,)
                    demands = replace(demands, **step)
                    found = [o for o in options if not broken_rules(o, demands)]
                    if found and not step:
                        return Recommendation(best_of(found).method, rejected)
                    if found:
                        return Refusal(rejected, best_of(found).method, gone)
                within = [o for o in options if ACCESS.index(o.access) <= ACCESS.index(job.access)]
                if not within:
                    return Refusal(rejected=rejected, nearest=None)
                needs = [(max(o.peak_bytes, o.base_bytes + o.task_bytes * job.tasks), o.method) for o in within]
                size, method = min(needs)
                return Refusal(rejected, method, gone + ("memory",), size)
        """,
        "recursively": """
            def recommend(job, options, broken_rules):
                firsts = [(o, broken_rules(o, job)) for o in options]
                rejected = {o.method: broken[0] for o, broken in firsts if broken}
                fitting = [o for o, broken in firsts if not broken]
                if fitting:
                    if job.prefer == "quality":
                        measured = [o for o in fitting if o.quality is not None]
                        highest = max((o.quality for o in measured), default=0.0)
                        tops = [o for o in measured if o.quality == highest]
                        near = [o for o in measured if any(highest - o.quality <= max(o.spread, t.spread) for t in tops[:1])]
                        fitting = near or fitting
                    size = {"file": "task_bytes"}.get(job.prefer, "peak_bytes")
                    best = fitting[0]
                    for option in fitting[1:]:
                        if getattr(option, size) < getattr(best, size):
                            best = option
                    return Recommendation(best.method, rejected)
                for name, nothing in [("wish", None), ("latency", math.inf), ("quality", 0.0)]:
                    if getattr(job, name) != nothing:
                        again = recommend(replace(job, **{name: nothing}), options, broken_rules)
                        if isinstance(again, Recommendation):
                            return Refusal(rejected, again.method, (name,))
                        return Refusal(rejected, again.nearest, (name, *again.given_up) if again.nearest else (), again.gpu_bytes)
                within = ACCESS[: ACCESS.index(job.access) + 1]
                sizes = {
                    o.method: max(o.peak_bytes, o.base_bytes + job.tasks * o.task_bytes) for o in options if o.access in within
                }
                if not sizes:
                    return Refusal(rejected, None, (), None)
                return Refusal(rejected, min(sizes, key=sizes.get), ("memory",), min(sizes.values()))
        """,
        "lists, and the peak by sorting": {
            "return min(fitting, key=lambda option: option.peak_bytes)": "return sorted(fitting, key=lambda o: o.peak_bytes)[0]",
            "tuple(given_up))": "list(given_up))",
            '(*given_up, "memory")': 'given_up + ["memory"]',
        },
    },
)


# ======================================================================================================================
# 8. Questions
# ======================================================================================================================
def choose_for() -> dict[str, str]:
    """Return the method for each of the situations A to H, or "none"."""
    return {
        "A": "qlora",
        "B": "lora",
        "C": "lora",
        "D": "prompt_tuning",
        "E": "none",
        "F": "full",
        "G": "prompt_tuning",
        "H": "layer_freezing",
    }


def drive_choices(choose_for, letters):
    """Return the choices for some of the letters."""
    choices = choose_for()
    if not isinstance(choices, dict):
        return {"what choose_for returns": type(choices).__name__}
    return {f"the choice for {letter}": str(choices.get(letter)) for letter in letters}


_CHOICES = ["full", "lora", "qlora", "adapters", "prefix_tuning", "prompt_tuning", "bitfit", "layer_freezing", "none"]
_AS_GOOD_IN_B = ("adapters", "qlora")


def read_choices(observation: Observation, case: dict) -> Observation:
    """In B, adapters and QLoRA are as good a choice as LoRA."""
    read = dict(observation)
    if read.get("the choice for B") in _AS_GOOD_IN_B:
        read["the choice for B"] = "lora"
    return read


def other_choices(named: Mapping[str, Mapping[str, str]]) -> dict[str, dict[str, str]]:
    """Return every wrong choice that has no sentence of its own: the message must not say what the right one is."""
    explained = {edit for edits in named.values() for edit in edits.values()}
    explained |= {f'"B": "{choice}"' for choice in _AS_GOOD_IN_B}
    return {
        f"{letter}: {choice} does not do what is asked: compare its figures, and what it must reach, with the situation": {
            f'"{letter}": "{right}"': f'"{letter}": "{choice}"'
        }
        for letter, right in choose_for().items()
        for choice in _CHOICES
        if choice != right and f'"{letter}": "{choice}"' not in explained
    }


_EXPLAINED = {
    "A: LoRA keeps the base in 16 bits, and these 26 GB are more than the card has": {'"A": "qlora"': '"A": "lora"'},
    "A: full fine-tuning adds gradients and optimizer state to weights that do not fit by themselves": {
        '"A": "qlora"': '"A": "full"'
    },
    "A: a soft prompt is tiny, but the base in front of it is still 26 GB": {'"A": "qlora"': '"A": "prompt_tuning"'},
    "B: forty copies of the whole model do not fit on one card": {'"B": "lora"': '"B": "full"'},
    "B: forty times the last four layers, 1.6 GB each, and the base beside them are more than 72 GB": {
        '"B": "lora"': '"B": "layer_freezing"'
    },
    "B: a soft prompt serves forty customers well, but its quality is not near full fine-tuning's": {
        '"B": "lora"': '"B": "prompt_tuning"'
    },
    "C: adapters have a nonlinearity and cannot be merged: they stay in every forward pass": {'"C": "lora"': '"C": "adapters"'},
    "C: QLoRA's base is in 4 bits: merging into it changes the outputs, and here LoRA fits": {'"C": "lora"': '"C": "qlora"'},
    "C: full fine-tuning adds nothing at inference, but does not fit into 18 GB": {'"C": "lora"': '"C": "full"'},
    "C: the last four layers with their gradients and moments need more than LoRA does, and more than the 18 GB": {
        '"C": "lora"': '"C": "layer_freezing"'
    },
    "D: prefix tuning sets keys and values inside every layer, which this API does not reach": {
        '"D": "prompt_tuning"': '"D": "prefix_tuning"'
    },
    "D: LoRA sits inside the layers, whose weights this API does not reach": {'"D": "prompt_tuning"': '"D": "lora"'},
    "D: something is possible here: the API takes embeddings and returns their gradients": {
        '"D": "prompt_tuning"': '"D": "none"'
    },
    "E: a soft prompt is made of embeddings that are no tokens' and is trained by their gradients: text carries neither": {
        '"E": "none"': '"E": "prompt_tuning"'
    },
    "F: LoRA learns less: where there are billions of new tokens to learn and memory for it, train everything": {
        '"F": "full"': '"F": "lora"'
    },
    "G: a LoRA of rank 8 on LLaMA-7B is a file of tens of megabytes; 200 kB were allowed": {
        '"G": "prompt_tuning"': '"G": "lora"'
    },
    "G: BitFit's biases of LLaMA-7B are 1.4 million numbers, megabytes; 200 kB were allowed": {
        '"G": "prompt_tuning"': '"G": "bitfit"'
    },
    "G: keys and values in each of 32 layers make a prefix 64 times as large as a soft prompt of its length": {
        '"G": "prompt_tuning"': '"G": "prefix_tuning"'
    },
    "H: LoRA in every layer sends the gradient through all of them, so that all keep their activations": {
        '"H": "layer_freezing"': '"H": "lora"'
    },
    "H: QLoRA makes the weights smaller; activations, which fill the memory here, stay as they are": {
        '"H": "layer_freezing"': '"H": "qlora"'
    },
    "H: a soft prompt lies before the first layer, so that the gradient passes all of them, and all keep their activations": {
        '"H": "layer_freezing"': '"H": "prompt_tuning"'
    },
}

check_choose_for = Exercise(
    spec=[choose_for],
    driver=drive_choices,
    reading=read_choices,
    cases=lambda generator: [{"letters": "ABCDEFGH"}],
    mistakes=_EXPLAINED | other_choices(_EXPLAINED),
    variants={
        "adapters in B": {'"B": "lora"': '"B": "adapters"'},
        "QLoRA in B": {'"B": "lora"': '"B": "qlora"'},
        "from a string": """
            def choose_for():
                text = "A qlora B adapters C lora D prompt_tuning E none F full G prompt_tuning H layer_freezing".split()
                return dict(zip(text[::2], text[1::2]))
        """,
        "by method": """
            def choose_for():
                by_method = {"lora": "BC", "prompt_tuning": "DG", "full": "F", "qlora": "A", "none": "E", "layer_freezing": "H"}
                return {letter: method for method, letters in by_method.items() for letter in letters}
        """,
    },
)


# ======================================================================================================================
# 9. Bug hunt: out of memory in the middle of the night
# ======================================================================================================================
def heaviest_batch(lengths: Sequence[int], batch_size: int) -> tuple[int, int]:
    """Return rows and padded length of the batch with the most tokens, padding included (transformers issue 11388)."""
    most = (0, 0)
    for start in range(0, len(lengths), batch_size):
        batch = lengths[start : start + batch_size]
        rows, longest = len(batch), max(batch)
        if rows * longest > most[0] * most[1]:
            most = rows, longest
    return most


def drive_heaviest(heaviest_batch, lengths, batch_size):
    """Ask for one epoch."""
    given = list(lengths)
    answer = heaviest_batch(given, batch_size)
    if not isinstance(answer, tuple | list) or len(answer) != 2:
        return {"what heaviest_batch returns": type(answer).__name__}
    return {
        "the list of rows and padded length": [int(number) for number in answer],
        "the lengths that were given are changed": given != list(lengths),
    }


def lengths_case(generator: torch.Generator, kind: str = "a long row") -> dict:
    """Return the lengths of an epoch's rows, in the order in which they are trained on.

    One batch has many middling rows. Of the others

    - with "a long row", one has a single long one, and the last, of one row, the longest of all;
    - with "a long row at the end", the last one, one row short of a full batch, has a row that makes it the heaviest;
    - with "middling rows", none has anything longer.
    """
    dicing = dice(generator)
    size = dicing.randrange(5, 9)
    batches = [[dicing.randrange(20, 60) for _ in range(size)] for _ in range(6)]
    batches[0][0] = 65  # so that the first batch is not the lightest
    batches[2] = dicing.sample(range(90, 110), size)
    last = [dicing.randrange(40, 60)]
    if kind != "middling rows":
        batches[4][dicing.randrange(size)] = dicing.randrange(190, 210)
        last = [dicing.randrange(300, 320)]
    if kind == "a long row at the end":
        last = [dicing.randrange(500, 520), *(30 for _ in range(size - 2))]
    return {"lengths": [length for batch in [*batches, last] for length in batch], "batch_size": size}


_LOOP = "for start in range(0, len(lengths), batch_size):"

check_heaviest_batch = Exercise(
    spec=[heaviest_batch],
    driver=drive_heaviest,
    cases=lambda generator: [
        lengths_case(generator, kind) for kind in ("a long row", "a long row at the end", "middling rows")
    ],
    mistakes={
        "only the first batch is looked at: the heaviest one may come an hour later": {_LOOP: "for start in [0]:"},
        "the last batch is left out because it has fewer rows: it can be the heaviest all the same": {
            _LOOP: "for start in range(0, len(lengths) - batch_size + 1, batch_size):"
        },
        "padding is not counted: every row of a batch is as long as its longest": {
            _LOOP: "heaviest = max((lengths[i : i + batch_size] for i in range(0, len(lengths), batch_size)), key=sum)\n"
            "    return len(heaviest), max(heaviest)\n    " + _LOOP
        },
        "the batch with the longest row is taken: with few rows it can be light": {
            "if rows * longest > most[0] * most[1]:": "if longest > most[1]:"
        },
        "the longest row of all is put into a full batch: that is safe, and more than is needed": {
            "    return most": "    return batch_size, max(lengths)"
        },
        "the rows are sorted by length first: they are trained on in the order given": {
            "most = (0, 0)": "most = (0, 0)\n    lengths = sorted(lengths)"
        },
        "the given list was sorted in place": {"most = (0, 0)": "most = (0, 0)\n    lengths.sort()"},
        "rows and length have changed places": {"    return most": "    return most[::-1]"},
        "the lightest batch is returned": {"most = (0, 0)": "most = (10**4, 10**4)", "* longest > most": "* longest < most"},
        "the shortest row of a batch is taken for its length": {"max(batch)": "min(batch)"},
        "a batch has one row too many": {"start + batch_size]": "start + batch_size + 1]"},
    },
    variants={
        "with max": """
            def heaviest_batch(lengths, batch_size):
                batches = [lengths[i : i + batch_size] for i in range(0, len(lengths), batch_size)]
                heaviest = max(batches, key=lambda batch: len(batch) * max(batch))
                return len(heaviest), max(heaviest)
        """,
        "row by row": """
            def heaviest_batch(lengths, batch_size):
                sizes, rows, longest = [], 0, 0
                for length in lengths:
                    rows, longest = rows + 1, max(longest, length)
                    if rows == batch_size:
                        sizes.append((rows, longest))
                        rows, longest = 0, 0
                if rows:
                    sizes.append((rows, longest))
                return max(sizes, key=lambda size: size[0] * size[1])
        """,
        "with itertools": """
            def heaviest_batch(lengths, batch_size):
                from itertools import islice
                rest, best = iter(lengths), None
                while batch := list(islice(rest, batch_size)):
                    size = [len(batch), max(batch)]
                    if best is None or size[0] * size[1] > best[0] * best[1]:
                        best = size
                return best
        """,
    },
)

EXERCISES = {name: exercise for name, exercise in globals().items() if isinstance(exercise, Exercise)}
"""Every exercise of the unit, by the name of its check."""
