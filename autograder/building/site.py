"""Build the rendered course: prose, pictures and outputs of an executed run, with the solutions folded, and a search.

    python -m autograder.building.site [--folder site] [--keep FOLDER]

Runs every master from top to bottom (cut short with `PEFTLAB_SHORT=1`) and writes HTML. With `--keep`, what was run is kept
in that folder, and a master is run again only if it has changed, or the lab bench, its rows, the checks or a package's version.
It needs the extra `site`.
"""

import argparse
import hashlib
import json
import re
import shutil
import sys
import tempfile
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from autograder.building import results_page
from autograder.building.build import COURSE, ROOT, instructor_notebook
from autograder.building.index import INDEX
from autograder.building.run_masters import run
from autograder.checking.masters import units, without_markers
from peftlab import settings

CONTENTS = """\
# Parameter-efficient fine-tuning, from scratch

```{{include}} introduction.md
```

```{{toctree}}
:hidden:
:caption: Units

{units}
```

```{{toctree}}
:hidden:
:caption: Beside them

results
README
GLOSSARY
SOURCES
CHANGELOG
docs/instructor_guide
docs/anatomy
docs/adding_an_exercise
docs/on_colab
docs/installing
docs/in_a_container
docs/from_here_to_production
```
"""


def page(executed: NotebookNode) -> NotebookNode:
    """Return a notebook as it is shown: solutions and sample answers folded, hidden tests and set-up for Colab left out."""
    shown = nbformat.from_dict(executed)
    shown.cells = [cell for cell in shown.cells if "colab.prepare()" not in cell.source]
    for cell in shown.cells:
        solved = "### BEGIN SOLUTION" in cell.source
        cell.source = re.sub(r"\n?### BEGIN HIDDEN TESTS.*?### END HIDDEN TESTS", "", cell.source, flags=re.DOTALL)
        cell.source = without_markers(cell.source)
        if solved and cell.cell_type == "code":
            cell.metadata["tags"] = [*cell.metadata.get("tags", []), "hide-input"]
        elif solved:
            cell.source = f"<details><summary>The rubric, and sample answers</summary>\n\n{cell.source}\n\n</details>"
    return shown


def lay_out(executed: dict[str, NotebookNode], folder: Path) -> None:
    """Write Sphinx's sources to an empty folder: the pages, and the course's own index, glossary, sources and guides."""
    for unit, notebook in executed.items():
        (folder / unit).mkdir()
        nbformat.write(page(notebook), folder / unit / f"{unit}.ipynb")
    for name in ("README.md", "GLOSSARY.md", "SOURCES.md"):
        text = (COURSE / name).read_text(encoding="utf-8")
        text = re.sub(
            r"## What comes before what.*?```\n\n(?=## )", "", text, flags=re.DOTALL
        )  # GitHub draws it, Sphinx does not
        (folder / name).write_text(text, encoding="utf-8")
    shutil.copy(ROOT / "CHANGELOG.md", folder)
    shutil.copy(ROOT / "docs" / "conf.py", folder)
    (folder / "docs").mkdir()
    for path in (ROOT / "docs").glob("*.md"):
        text = path.read_text(encoding="utf-8").replace(f"../{INDEX}", "../README.md")
        (folder / "docs" / path.name).write_text(text, encoding="utf-8")
    # Up to the table of units: what the course is, and its pictures.
    introduction = (ROOT / "README.md").read_text(encoding="utf-8").partition("\n\n")[2].partition("<!-- units")[0].strip()
    shutil.copytree(ROOT / "docs" / "images", folder / "docs" / "images")
    (folder / "introduction.md").write_text(
        f"{introduction}\n\nBegin with [the index of units](README.md), or look at the [results](results.md).\n",
        encoding="utf-8",
    )
    results_page.write(folder)
    listed = "\n".join(f"{unit}/{unit}" for unit in executed)
    (folder / "index.md").write_text(CONTENTS.format(units=listed), encoding="utf-8")


def build(executed: dict[str, NotebookNode], target: Path) -> int:
    """Render the pages as HTML in `target`; return Sphinx's exit status: not 0 if anything warns, such as a dead link."""
    from sphinx.cmd.build import build_main

    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "source"
        source.mkdir()
        lay_out(executed, source)
        return build_main(["-q", "-W", "--keep-going", "-d", f"{scratch}/doctrees", str(source), str(target)])


def execute(unit: str, keep: Path | None = None) -> NotebookNode:
    """Return a master with the outputs of a run from top to bottom, or of the kept run if nothing has changed since.

    Args:
        keep: the folder of kept runs; None to run in any case.
    """
    notebook = instructor_notebook(unit)
    kept = keep and keep / f"{unit}-{_digest(notebook)}.ipynb"
    if kept and kept.is_file():
        print(f"{unit}: as it was run before", flush=True)
        return nbformat.read(kept, as_version=4)
    with tempfile.TemporaryDirectory() as scratch:
        print(f"{unit}: running", flush=True)
        executed = run(notebook, Path(scratch), short=settings.short())
    if kept:
        keep.mkdir(parents=True, exist_ok=True)
        for older in keep.glob(f"{unit}-*.ipynb"):
            older.unlink()
        nbformat.write(executed, kept)
    return executed


def _digest(notebook: NotebookNode) -> str:
    """Return a digest of all that a run's outputs depend on, but for the machine: shipped rows and checks are printed, too."""
    cells = json.dumps([[cell.source for cell in notebook.cells], settings.short()])
    digest = hashlib.sha256(cells.encode())
    for folder in (COURSE / "peftlab", ROOT / "autograder" / "checks", ROOT / "autograder" / "checking"):
        for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"):
            digest.update(path.read_bytes())
    digest.update((ROOT / "constraints.txt").read_bytes())
    return digest.hexdigest()[:16]


def main(arguments: list[str] | None = None) -> int:
    """Run the command line described in this module's docstring; return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m autograder.building.site", description="Build the rendered course.")
    parser.add_argument("--folder", type=Path, default=ROOT / "site", help="where the pages go (default: site)")
    parser.add_argument("--keep", type=Path, help="a folder of executed notebooks; a master that has not changed is not run")
    options = parser.parse_args(arguments)
    status = build({unit: execute(unit, options.keep) for unit in units()}, options.folder)
    if not status:
        print(f"Open {options.folder / 'index.html'}")
    return status


if __name__ == "__main__":
    sys.exit(main())
