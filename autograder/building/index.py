"""The course's index, made of the masters' own headers and sources; `autograder.building.build` writes it.

course/README.md has the units with their prerequisites and what each teaches, course/SOURCES.md what each takes from
whom, and the table of the units stands in the project's README as well, between two comments.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import jupytext

from autograder.checking.masters import SOLUTIONS, master_path, units

ROOT = SOLUTIONS.parent
README, INDEX, SOURCES = (Path(name) for name in ("README.md", "course/README.md", "course/SOURCES.md"))
BEGIN, END = "<!-- units: written by `make build` -->", "<!-- end of units -->"
NOTE = "<!-- Written by `make build` from the masters' headers and sources: edit those. -->"


@dataclass(frozen=True)
class Header:
    """What a unit says of itself in its first cell, and its sources.

    Attributes:
        unit: its folder's name.
        title, subtitle: of the heading "08 · title: subtitle".
        minutes, difficulty, points, before: the four cells of its table.
        able: "you can", or "you know".
        objectives: what one can do, or knows, afterwards.
        sources: a Markdown list; empty if the unit has none.
    """

    unit: str
    title: str
    subtitle: str
    minutes: str
    difficulty: str
    points: str
    before: str
    able: str
    objectives: tuple[str, ...]
    sources: str


def header(unit: str) -> Header:
    """Read a master's header.

    Raises:
        ValueError: if the first cell is not as the units' are.
    """
    cells = [cell.source for cell in jupytext.read(master_path(unit)).cells if cell.cell_type == "markdown"]
    heading = re.match(r"# \d\d · (?P<title>[^:\n]+): (?P<subtitle>.+)", cells[0])
    columns = re.escape("| minutes | difficulty | points | before this unit |\n|---|---|---|---|\n")
    table = re.search(rf"^{columns}\| (.+) \|$", cells[0], re.MULTILINE)
    able = re.search(r"^\*\*When you have finished, (you \w+)\*\*$", cells[0], re.MULTILINE)
    objectives = re.findall(r"^\d\. (.+(?:\n   .+)*)", cells[0], re.MULTILINE)
    if not (heading and table and able and objectives):
        raise ValueError(f"{unit}: the first cell needs a heading '# 08 · Title: subtitle', the table, and the objectives")
    minutes, difficulty, points, before = table[1].split(" | ")
    sources = "".join(source.partition("## Sources\n")[2].strip() for source in cells)
    one_line = tuple(" ".join(objective.split()).rstrip(";.") for objective in objectives)
    return Header(
        unit=unit,
        title=heading["title"],
        subtitle=heading["subtitle"],
        minutes=minutes,
        difficulty=difficulty,
        points=points,
        before=before,
        able=able[1],
        objectives=one_line,
        sources=sources,
    )


def table(headers: list[Header], folder: str) -> str:
    """Return the units as a Markdown table, with links from a page that finds the units in `folder`."""
    lines = ["| unit | | minutes | difficulty | points |", "|---|---|---|---|---|"]
    for each in headers:
        link = f"[{each.unit}]({folder}{each.unit}/{each.unit}.ipynb)"
        lines.append(f"| {link} | {each.title}: {each.subtitle} | {each.minutes} | {each.difficulty} | {each.points} |")
    return "\n".join(lines)


def arrows(headers: list[Header]) -> str:
    """Return which unit comes before which, as a Mermaid graph; what only helps is a dotted arrow."""
    lines = ["```mermaid", "graph LR"]
    for each in headers:
        lines.append(f'    {each.unit}["{each.unit[:2]} {each.title}"]')
    for each in headers:
        for part in each.before.split(";"):
            for earlier in re.findall(r"\b\d\d_\w+", part):
                lines.append(f"    {earlier} {'-.->' if 'help' in part else '-->'} {each.unit}")
    return "\n".join([*lines, "```"])


def pages() -> dict[Path, str]:
    """Return the text of every page of the index, by its path below the project's root."""
    headers = [header(unit) for unit in units()]
    taught = [
        f"### {each.unit[:2]} · {each.title}\n\n*Before it:* {each.before}. *Afterwards {each.able}*\n\n"
        + "\n".join(f"{number}. {objective}" for number, objective in enumerate(each.objectives, 1))
        for each in headers
    ]
    sources = [f"## {each.unit}\n\n{each.sources}" for each in headers if each.sources]
    readme = (ROOT / README).read_text(encoding="utf-8")
    before, _, rest = readme.partition(BEGIN)
    after = rest.partition(END)[2]
    if not after:
        raise ValueError(f"{README} has lost the comments between which the table of units stands: {BEGIN} and {END}")
    return {
        README: f"{before}{BEGIN}\n{table(headers, 'course/')}\n{END}{after}",
        INDEX: "\n\n".join(
            [
                NOTE,
                "# The units",
                "Words that you don't know are in the [glossary](GLOSSARY.md); the papers, with what each unit takes from "
                "them, in the [sources](SOURCES.md).",
                table(headers, ""),
                "## What comes before what",
                "An arrow means *needs*, a dotted one *is easier after*. Every unit stands on the lab bench `peftlab`, "
                "never on your answers to an earlier one.",
                arrows(headers),
                "## What each teaches",
                *taught,
            ]
        )
        + "\n",
        SOURCES: "\n\n".join([NOTE, "# Sources, by unit", *sources]) + "\n",
    }


def write() -> None:
    """Write the pages."""
    for path, text in pages().items():
        (ROOT / path).write_text(text, encoding="utf-8")


def differing() -> list[Path]:
    """Return the pages that are not what the masters give."""
    return [
        path
        for path, text in pages().items()
        if not (ROOT / path).is_file() or (ROOT / path).read_text(encoding="utf-8") != text
    ]
