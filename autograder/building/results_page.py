"""The page "Results" of the rendered course: from the shipped rows, what every method reached, and score against memory."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import stdev

import matplotlib.pyplot as plt

from peftlab import comparison, plots, results
from peftlab.memory import MEBIBYTE

SAID = """\
# Results

Every number on this page comes from rows that ship with the course. Each method's learning rate was swept, in steps of about
three, and the best one got three seeds. Scores are means over the seeds, on a test split that the choice of the rate has not
seen. *Spread* is the best seed minus the worst, in points. Bytes are those of one training step of SmolLM2-135M in fp32,
measured by following every allocation. Unit 11 says how to read such a table, and how not to.

"""
COLUMNS = (
    "method",
    "steps",
    "rate",
    "score",
    "spread",
    "seeds",
    "trained numbers",
    "share",
    "peak of a step, MiB",
    "forgetting, nats a token",
)
NAMES = {"full": "full fine-tuning", "lora": "LoRA", "qlora": "QLoRA", "bitfit": "BitFit"}


def name_of(method: str, variant: str) -> str:
    """Return a method's variant as the page names it."""
    name = NAMES.get(method, method.replace("_", " "))
    return f"{name}, {variant.replace('_', ' ')}" if variant else name


def table(shipped: Mapping[str, Sequence[comparison.Row]]) -> str:
    """Return a task's rows as a table in Markdown, the best score first."""
    lines = [COLUMNS, ("---", *["---:"] * (len(COLUMNS) - 1))]
    for name, found in sorted(shipped.items(), key=lambda item: -comparison.summary(item[1]).score):
        total = comparison.summary(found)
        row = total.row
        lines.append(
            (
                name,
                f"{row.settings['steps']}",
                f"{total.learning_rate:g}",
                f"{total.score:.1%}",
                f"{100 * total.spread:.1f}",
                f"{len(total.scores)}",
                f"{row.trainable_parameters:,}",
                f"{row.trainable_parameters / row.total_parameters:.3%}",
                f"{row.memory.peak / MEBIBYTE:,.0f}",
                f"{total.forgetting:+.2f}",
            )
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def points(shipped: Mapping[str, Sequence[comparison.Row]]) -> dict[str, tuple[float, float, float]]:
    """Return the peak of a step in MiB, the score in percent and its standard error, by name."""
    found = {}
    for name, rows in shipped.items():
        total = comparison.summary(rows)
        error = stdev(total.scores) / math.sqrt(len(total.scores)) if len(total.scores) > 1 else 0.0
        found[name] = (total.row.memory.peak / MEBIBYTE, 100 * total.score, 100 * error)
    return found


def not_beaten(compared: Mapping[str, tuple[float, float, float]]) -> list[str]:
    """Return the names for which nothing else has both less cost and a higher score."""
    return [
        name
        for name, (cost, score, _) in compared.items()
        if not any(other_cost <= cost and other > score for other_cost, other, _ in compared.values())
    ]


def write(folder: Path) -> None:
    """Write `results.md` and its pictures to a folder of Sphinx's sources."""
    text = SAID
    kinds = {(row.method, row.settings.get("variant", "")) for row in results.load(comparison.UNIT, results.SHIPPED)}
    names = {name_of(*kind): kind for kind in sorted(kinds)}
    for task in comparison.TASKS:
        found = {name: comparison.rows(method, task, variant) for name, (method, variant) in names.items()}
        shipped = {name: rows for name, rows in found.items() if rows}
        standard = {name: rows for name, rows in shipped.items() if not names[name][1]}
        compared = points(standard)
        title = f"{task}: score against the memory of a training step"
        figure = plots.pareto(compared, not_beaten(compared), title, "peak, MiB", "score (%)")
        figure.savefig(folder / f"results_{task}.png", dpi=150, bbox_inches="tight")
        plt.close(figure)
        best = max(compared, key=lambda name: compared[name][1])
        seen = f"Score against peak memory for {len(compared)} methods on {task}; the highest score is that of {best}."
        text += (
            f"## {task}\n\n![{seen}](results_{task}.png)\n\n*Filled marks: nothing else needs less memory and scores higher. "
            f"Bars: one standard error over three seeds.*\n\n{table(shipped)}\n\n"
        )
    (folder / "results.md").write_text(text, encoding="utf-8")
