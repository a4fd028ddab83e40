"""The comparison of methods: its rows, read, summed up and shown. `autograder.measuring.methods` measures them."""

import math
import os
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from peftlab import results
from peftlab.memory import MEBIBYTE, step_table
from peftlab.results import Row

TASKS = ("movie_reviews", "tool_calls")
UNIT = "comparison"
LATE = 10
"""How many of the last steps count when a learning rate is chosen."""


def rows(method: str, task: str | None = None, variant: str = "", folder: Path = results.SHIPPED) -> list[Row]:
    """Return the rows of a method's variant, by task, learning rate and seed.

    Args:
        variant: "" is the method's standard form; each unit names its others.
        folder: the shipped rows, or a folder of this reader's own.
    """
    found = [
        row
        for row in results.load(UNIT, folder)
        if row.method == method and row.settings.get("variant", "") == variant and task in (None, row.task)
    ]
    return sorted(found, key=lambda row: (row.task, row.settings["learning_rate"], row.settings["seed"]))


def late_loss(row: Row) -> float:
    """Return the mean training loss of the last ten steps, in nats per label.

    No row of the data comes twice within these runs, so this is a loss on rows that had not been trained on, and a
    learning rate may be chosen by it without a look at the test split.
    """
    return mean(row.losses[-LATE:])


def sweep_rows(found: Sequence[Row]) -> list[Row]:
    """Return the rows of the learning-rate sweep: those with seed 0."""
    return [row for row in found if row.settings["seed"] == 0]


def late_losses(found: Iterable[Row]) -> dict[float, dict[int, float]]:
    """Return the late loss of every run of one task, method and variant, by learning rate and seed; infinite for NaN."""
    late: dict[float, dict[int, float]] = {}
    for row in found:
        loss = late_loss(row)
        late.setdefault(row.settings["learning_rate"], {})[row.settings["seed"]] = math.inf if math.isnan(loss) else loss
    return late


def chosen_rate(found: Sequence[Row]) -> float:
    """Return the learning rate with the lowest mean late loss, of the rates with the most seeds.

    A mean over several seeds is not compared with a single run, which may be a lucky one.

    Args:
        found: rows of one task, method and variant.

    Raises:
        ValueError: if there is no row, or rows of several tasks or methods.
    """
    kinds = {(row.task, row.method, row.settings.get("variant", "")) for row in found}
    if len(kinds) != 1:
        raise ValueError(f"one task, method and variant at a time, not {sorted(kinds) or 'none'}")
    late = late_losses(found)
    most = max(map(len, late.values()))
    return min((rate for rate, losses in late.items() if len(losses) == most), key=lambda rate: mean(late[rate].values()))


@dataclass(frozen=True)
class Summary:
    """What the seeds at the chosen learning rate say together.

    Attributes:
        learning_rate: the one chosen.
        scores: of every seed, in their order.
        score: their mean, between 0 and 1.
        spread: the largest minus the smallest.
        forgetting: the mean, in nats per token.
        row: one of the rows, for what does not depend on the seed: bytes and counts.
    """

    learning_rate: float
    scores: tuple[float, ...]
    score: float
    spread: float
    forgetting: float
    row: Row


def summary(found: Sequence[Row]) -> Summary:
    """Sum up the rows of one task, method and variant at the learning rate that is chosen.

    Raises:
        ValueError: as `chosen_rate`.
    """
    rate = chosen_rate(found)
    chosen = [row for row in found if row.settings["learning_rate"] == rate]
    scores = tuple(row.score_after for row in chosen)
    return Summary(
        learning_rate=rate,
        scores=scores,
        score=mean(scores),
        spread=max(scores) - min(scores),
        forgetting=mean(row.forgetting for row in chosen),
        row=chosen[0],
    )


Shipped = Mapping[tuple[str, str], Sequence[Row]]
"""Rows by task and by the name that a table gives to a method's variant."""


def select(
    compared: Mapping[str, tuple[str, str]], folder: Path = results.SHIPPED, tasks: Sequence[str] = TASKS
) -> dict[tuple[str, str], list[Row]]:
    """Return the rows to compare, by task and name; say what has not been measured, and leave it out.

    Args:
        compared: method and variant, by the name that tables and pictures show.
    """
    found = {
        (task, name): rows(method, task, variant, folder) for task in tasks for name, (method, variant) in compared.items()
    }
    missing = [f"{name} on {task}" for (task, name), of_one_kind in found.items() if not of_one_kind]
    if missing:
        print(f"Not measured yet, and left out: {', '.join(missing)}.")
    return {key: of_one_kind for key, of_one_kind in found.items() if of_one_kind}


def on_task(shipped: Shipped, task: str) -> dict[str, Sequence[Row]]:
    """Return the rows of one task, by the name of their method's variant."""
    return {name: found for (of_task, name), found in shipped.items() if of_task == task}


def sweep_table(shipped: Shipped) -> str:
    """Return, as text, late loss and score at every learning rate of the sweeps; a star marks the rate that is chosen.

    The runs of the sweep are those with seed 0; where other seeds were run too, the rate was chosen by all of them.
    """
    lines = [f"{'':<15}{'':<20}{'rate':>9}{'late loss':>11}{'score':>8}"]
    for (task, name), found in shipped.items():
        chosen = chosen_rate(found)
        for row in sweep_rows(found):
            rate = row.settings["learning_rate"]
            star = " *" if rate == chosen else ""
            lines.append(f"{task:<15}{name:<20}{rate:>9g}{late_loss(row):>11.3f}{row.score_after:>8.1%}{star}")
    return "\n".join(lines)


def score_table(shipped: Shipped) -> str:
    """Return, as text, what the seeds at the chosen rate give: score and spread, what is trained, its file, forgetting."""
    heads = f"{'rate':>9}{'score':>8}{'spread':>8}{'seeds':>7}{'trained':>13}{'share':>9}{'file, kB':>11}{'forgetting':>12}"
    lines = [f"{'':<15}{'':<20}{heads}"]
    for (task, name), found in shipped.items():
        total = summary(found)
        row = total.row
        lines.append(
            f"{task:<15}{name:<20}{total.learning_rate:>9g}{total.score:>8.1%}"
            f"{format(total.spread, '.1%') if len(total.scores) > 1 else '-':>8}{len(total.scores):>7}"
            f"{row.trainable_parameters:>13,}{row.trainable_parameters / row.total_parameters:>9.3%}"
            f"{row.adapter_bytes / 1e3:>11,.0f}{total.forgetting:>+12.2f}"
        )
    return "\n".join(lines)


def late_table(shipped: Shipped) -> str:
    """Return, as text, the chosen rate, the late loss of every seed at it in nats per label, their mean, and the mean score."""
    lines = [f"{'':<15}{'':<22}{'rate':>8}{'late loss':>11}{'of each seed':>24}{'score':>8}"]
    for (task, name), found in shipped.items():
        total = summary(found)
        late = [late_loss(row) for row in found if row.settings["learning_rate"] == total.learning_rate]
        each = "".join(f"{loss:8.3f}" for loss in late)
        lines.append(f"{task:<15}{name:<22}{total.learning_rate:>8g}{mean(late):>11.3f}{each:>24}{total.score:>8.1%}")
    return "\n".join(lines)


def lowest(shipped: Shipped, task: str) -> str:
    """Return the name with the lowest late loss on a task, each at its chosen rate, as a mean over the seeds."""
    late = {name: mean(late_losses(found)[chosen_rate(found)].values()) for name, found in on_task(shipped, task).items()}
    return min(late, key=late.__getitem__)


def memory_table(shipped: Shipped) -> str:
    """Return, as text, the measured MiB of one training step by category."""
    return step_table({f"{task:<15}{name}": summary(found).row.memory for (task, name), found in shipped.items()})


HOW_TO_READ = """
Lines, and the table of the sweep, show the runs with seed 0; small marks are the other seeds. A ring, or a star, marks the
rate that is chosen: of those with three seeds, the one with the lowest mean late loss. The spread is the largest score of a
seed minus the smallest.""".lstrip()


def machine(row: Row) -> str:
    """Return the processor or the GPU that a row was measured on: its `hardware` without the number of threads."""
    return re.sub(r", \d+ threads?$", "", row.hardware)


def own_rows(folders: Iterable[Path] | None = None) -> list[Row]:
    """Return the rows that this reader has measured, in any unit; say which files are not rows, and leave these out.

    Args:
        folders: results folders. By default those that `fine_tune` writes to: the one that `PEFTLAB_RESULTS` names, or
            else `results` beside every unit's notebook, this one's neighbours.
    """
    if folders is None:
        folders = [results.results_folder()] if os.environ.get("PEFTLAB_RESULTS") else sorted(Path("..").glob("*/results"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = [
            row for folder in folders for place in sorted(Path(folder).glob("*/")) for row in results.load(place.name, folder)
        ]
    for warning in caught:
        print(warning.message)
    return found


def twins(own: Iterable[Row], others: Iterable[Row]) -> list[tuple[Row, Row]]:
    """Return the pairs of rows that were trained in the same way: task, method and every setting that both of them name."""
    others = list(others)
    return [(mine, other) for mine in own for other in others if _trained_alike(mine, other)]


def _trained_alike(first: Row, second: Row) -> bool:
    kind = [(row.task, row.method, row.settings.get("variant", ""), row.short) for row in (first, second)]
    named = first.settings.keys() & second.settings.keys()
    return kind[0] == kind[1] and all(first.settings[name] == second.settings[name] for name in named)


def twin_table(pairs: Iterable[tuple[Row, Row]]) -> str:
    """Return each pair of `twins` side by side: what was measured here, and what comes with the course."""
    lines = []
    for mine, other in pairs:
        run = f"{mine.task}, {mine.method}, learning rate {mine.settings['learning_rate']:g}, seed {mine.settings['seed']}"
        lines += ["", run, f"{'':<20}{'here':>12}{'shipped':>12}"]
        lines += [f"{name:<20}{show(mine):>12}{show(other):>12}" for name, show in _COMPARED.items()]
        lines += [f"here: {mine.hardware}; shipped: {other.hardware}"]
    return "\n".join(lines[1:])


_COMPARED: dict[str, Callable[[Row], str]] = {
    "score": lambda row: f"{row.score_after:.1%}",
    "late loss": lambda row: f"{late_loss(row):.4f}",
    "trained numbers": lambda row: f"{row.trainable_parameters:,}",
    "file, bytes": lambda row: f"{row.adapter_bytes:,}",
    "peak, MiB": lambda row: f"{row.memory.peak / MEBIBYTE:,.0f}",
    "seconds a step": lambda row: f"{row.seconds_per_step:.2f}",
}
