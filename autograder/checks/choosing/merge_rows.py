"""`merge_rows`: whose rows a comparison may use."""

from collections.abc import Mapping, Sequence

import torch

from autograder.checking.exercise import Exercise
from autograder.checks.choosing.cases import dice
from autograder.checks.choosing.helpers import any_row
from peftlab.comparison import machine
from peftlab.results import Row


def merge_rows(own: Sequence[Row], shipped: Sequence[Row], standard: Mapping[str, Mapping]) -> dict[tuple[str, str], list[Row]]:
    """Return, by task and method, the rows that a comparison may use."""

    def counts(row: Row) -> bool:
        if row.short or row.settings.get("variant", "") != "" or row.task not in standard:
            return False
        return all(row.settings[name] == value for name, value in standard[row.task].items() if name in row.settings)

    sets = {}
    for whose, rows in (("own", own), ("shipped", shipped)):
        for row in rows:
            if counts(row):
                key, place = (row.task, row.method), (whose, machine(row))
                run = row.settings["learning_rate"], row.settings["seed"]
                sets.setdefault(key, {}).setdefault(place, {})[run] = row
    merged = {}
    for key, of_key in sets.items():
        largest = max(of_key.values(), key=len)
        merged[key] = list(largest.values())
    return merged


def merge_case(generator: torch.Generator, several: int = 2) -> dict:
    """Return rows among which is everything that may not be mixed up; `several` is how many rows a set has at least."""
    dicing = dice(generator)
    tasks = dicing.sample(["reviews", "calls", "questions", "sums"], 3)
    methods = dicing.sample(["full", "lora", "bitfit", "adapters", "prompt_tuning", "prefix_tuning", "qlora", "freezing"], 8)
    machines = dicing.sample(["Tesla T4", "AMD EPYC", "Apple M2", "NVIDIA A100"], 4)
    steps, rank = dicing.sample(range(30, 90), 3), dicing.choice([4, 8, 16])
    standard = {task: {"steps": count, "rank": rank, "tokens": 16} for task, count in zip(tasks[:2], steps)}
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
    place = (first, methods[0])  # as many of the reader's as shipped ones
    for seed in range(several):
        add("own", place, machines[0], seed=seed, rank=rank)
        add("shipped", place, machines[1], seed=seed, rate=1, rank=rank)
    place = (second, methods[0])  # fewer of the reader's than shipped ones, though two machines' are as many together
    for seed in range(several):
        add("own", place, machines[0], seed=seed, rank=rank)
        add("own", place, machines[2], seed=seed, rate=2, rank=rank)
    for seed in range(several + 1):
        add("shipped", place, machines[0], seed=seed, rate=1, rank=rank)
    place = (second, methods[1])  # the reader has many, but what does not count
    for seed in range(several + 2):
        add("own", place, machines[0], "short", seed=seed, short=True)
        add("own", place, machines[0], "steps of another task", seed=seed, rate=1, steps=steps[2])
        add("own", place, machines[0], "another rank", seed=seed, rate=2, rank=2 * rank)
        add("own", place, machines[0], "other tokens", seed=seed, rate=3, tokens=4)
    for seed in range(several):
        add("shipped", place, machines[1], seed=seed, rank=rank)
    place = (first, methods[2])  # two machines, one of them with one thread and with two
    for seed in range(several):
        add("own", place, machines[0], seed=seed)
        add("own", place, f"{machines[2]}, 2 threads", seed=seed, rate=1, tokens=16)
    add("own", place, f"{machines[2]}, 1 thread", seed=several, rate=1, tokens=16)
    place = (second, methods[3])  # a run repeated
    add("own", place, machines[0], "the first time", rate=2)
    add("own", place, machines[0], "again", rate=2)
    add("own", place, machines[0], rate=1)
    place = (second, methods[6])  # a machine has the most rows, and only because a run was repeated there
    for time in ("first", "second", "third", "fourth"):
        add("own", place, machines[0], f"the {time} time", rank=rank)
    for seed in range(several):
        add("own", place, machines[2], seed=seed, rank=rank)
    place = (first, methods[6])  # the same, of the reader's rows against the shipped ones
    for time in range(several + 2):
        add("own", place, machines[0], f"time {time}")
    for seed in range(several):
        add("shipped", place, machines[2], seed=seed)
    place = (first, methods[4])  # shipped rows of two machines, and one of the reader's
    for seed in range(several + 1):
        add("shipped", place, machines[1], seed=seed, variant="")
    add("shipped", place, machines[3], seed=several + 1, variant="")
    add("own", place, machines[0], seed=several + 2)
    add("own", (second, methods[4]), machines[0], "a variant", variant="random")  # nothing that counts at all
    add("own", (tasks[2], methods[0]), machines[0], "a task that is not compared")
    add("own", (second, methods[5]), machines[dicing.randrange(2)], "as many as the other machine, and first")
    add("own", (second, methods[5]), machines[2], "as many as the other machine, but later")
    add("shipped", (first, methods[5]), machines[1], "of a method of which the reader has the other task only")
    return lists | {"standard": standard}


def drive_merge(merge_rows, own, shipped, standard):
    """Build rows, merge them, and return which of them are found where, by their labels."""

    def build(line):
        return any_row(**{name: line[name] for name in line if name != "label"}, versions={"label": line["label"]})

    lists = [build(line) for line in own], [build(line) for line in shipped]
    merged = merge_rows(*lists, standard)
    if not isinstance(merged, dict):
        return {"what merge_rows returns": type(merged).__name__}
    seen = {"what merge_rows returns": "dict", "the list of keys": sorted(str(key) for key in merged)}
    for key, rows in merged.items():
        seen[f"the list of rows of {key}"] = sorted(row.versions["label"] for row in rows)
    return seen | {"how many rows are in the lists that were given": [len(rows) for rows in lists]}


_LARGEST = "largest = max(of_key.values(), key=len)"

check_merge_rows = Exercise(
    spec=[merge_rows],
    cases=lambda generator: [merge_case(generator)],
    driver=drive_merge,
    helpers=[any_row],
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
        "only a missing rank is forgiven: a row may lack any of the settings": {
            "row.settings[name] == value": "row.settings.get(name) == value",
            " if name in row.settings": ' if name in row.settings or name != "rank"',
        },
        "a reader's rows and the shipped ones are mixed in one set": {
            "(whose, machine(row))": "machine(row)",
        },
        "the reader's rows are taken although more of the shipped ones count": {
            _LARGEST: 'mine = {p: s for p, s in of_key.items() if p[0] == "own"}\n'
            "        largest = max((mine or of_key).values(), key=len)"
        },
        "the shipped rows are taken although as many of the reader's count": {
            '(("own", own), ("shipped", shipped))': '(("shipped", shipped), ("own", own))'
        },
        "whose rows are taken is decided once for a method: decide for each task by itself": {
            _LARGEST: "whose = {p[0] for k, o in sets.items() if k[1] == key[1] for p in o}\n"
            '        mine = {p: s for p, s in of_key.items() if p[0] == "own" or "own" not in whose}\n'
            "        largest = max((mine or {0: {}}).values(), key=len)"
        },
        "the reader's rows are counted over all machines: a set is of one machine": {
            _LARGEST: 'owned = {p: s for p, s in of_key.items() if p[0] == "own"}\n'
            "        theirs = [len(s) for p, s in of_key.items() if p not in owned]\n"
            "        enough = sum(map(len, owned.values())) >= max(theirs, default=0)\n"
            "        largest = max((owned if enough and owned else of_key).values(), key=len)"
        },
        "a set holds rows of two machines: take those of one": {"(whose, machine(row))": "(whose, 0)"},
        "the shipped rows of two machines are mixed: the rule holds for them, too": {
            "(whose, machine(row))": '(whose, machine(row) if whose == "own" else 0)'
        },
        "a machine with one thread is taken for another than with two: use `machine(row)`, not `row.hardware`": {
            "(whose, machine(row))": "(whose, row.hardware)"
        },
        "of sets of the same size the last is taken, not the first": {
            _LARGEST: "largest = max(reversed(of_key.values()), key=len)"
        },
        "the smallest set is taken": {_LARGEST: "largest = min(of_key.values(), key=len)"},
        "a run that was repeated counts twice: the same learning rate and seed is one measurement": {
            'row.settings["learning_rate"], row.settings["seed"]\n': "id(row)\n"
        },
        "the largest set is chosen by its rows: a run that was repeated counts once there, too": {
            "merged = {}": "rows_in = {}\n"
            '    for whose, rows in (("own", own), ("shipped", shipped)):\n'
            "        for row in filter(counts, rows):\n"
            "            place = (row.task, row.method), (whose, machine(row))\n"
            "            rows_in[place] = rows_in.get(place, 0) + 1\n"
            "    merged = {}",
            _LARGEST: "largest = of_key[max(of_key, key=lambda place: rows_in[key, place])]",
        },
        "of a run that was repeated the first row is kept: keep the last": {
            ".setdefault(place, {})[run] = row": ".setdefault(place, {}).setdefault(run, row)"
        },
        "one seed stands for all learning rates: a run is a learning rate and a seed": {
            'run = row.settings["learning_rate"], row.settings["seed"]': 'run = row.settings["seed"]'
        },
        "rows that do not count decide which set is the largest: sort them out first": {
            "            if counts(row):": "            if row.task in standard:",
            "merged[key] = list(largest.values())": "merged[key] = [row for row in largest.values() if counts(row)]",
        },
        "the tasks are mixed: the keys are (task, method)": {"key, place = (row.task, row.method)": "key, place = row.method"},
        "task and method have changed places in the keys": {
            "key, place = (row.task, row.method)": "key, place = (row.method, row.task)"
        },
    },
    variants={
        "set by set": """
            def merge_rows(own, shipped, standard):
                def standard_form(row):
                    if row.task not in standard or row.settings.get("variant", ""):
                        return False
                    wanted = standard[row.task]
                    return not row.short and all(row.settings[n] == wanted[n] for n in row.settings.keys() & wanted.keys())
                lists = [list(filter(standard_form, own)), list(filter(standard_form, shipped))]
                result = {}
                for key in {(row.task, row.method) for rows in lists for row in rows}:
                    best = []
                    for rows in lists:
                        here = [row for row in rows if (row.task, row.method) == key]
                        for name in dict.fromkeys(machine(row) for row in here):
                            kept = []
                            for row in here:
                                if machine(row) == name:
                                    run = row.settings["learning_rate"], row.settings["seed"]
                                    kept = [k for k in kept if (k.settings["learning_rate"], k.settings["seed"]) != run] + [row]
                            if len(kept) > len(best):
                                best = kept
                    result[key] = best
                return result
        """,
        "from the end, with the keys of all runs": """
            def merge_rows(own, shipped, standard):
                runs = {}
                for whose, rows in enumerate((own, shipped)):
                    for row in rows:
                        s, wanted = row.settings, standard.get(row.task)
                        if wanted is None or row.short or s.get("variant"):
                            continue
                        if any(s.get(name, value) != value for name, value in wanted.items()):
                            continue
                        runs[row.task, row.method, whose, machine(row), s["learning_rate"], s["seed"]] = row
                merged = {}
                for task, method in {key[:2] for key in runs}:
                    places = [key[2:4] for key in runs if key[:2] == (task, method)]
                    most = max(dict.fromkeys(places), key=places.count)
                    merged[task, method] = [row for key, row in runs.items() if key[:4] == (task, method, *most)]
                return merged
        """,
        "sorted by size": {
            _LARGEST: "largest = sorted(of_key.values(), key=lambda runs: -len(runs))[0]",
        },
        "tuples for lists": {"list(largest.values())": "tuple(largest.values())"},
    },
)
