"""`merge_rows`: whose rows a comparison may use."""

from collections.abc import Mapping, Sequence

import torch

from autograder.checks.choosing.cases import dice
from autograder.exercise import Exercise
from peftlab.comparison import machine
from peftlab.results import Row


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


_KEPT = "merged[key] = each_once(of_one_machine(group))"

check_merge_rows = Exercise(
    spec=[merge_rows],
    cases=lambda generator: [merge_case(generator)],
    driver=drive_merge,
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
