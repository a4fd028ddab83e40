"""What a reader has done: checks passed, numbers guessed before they were measured, and how near the guesses came.

It is kept in `progress.jsonl` in the results folder (see `peftlab.results`), on this machine only, and no mark depends on it.
"""

import contextlib
import json
import math
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from peftlab import settings
from peftlab.results import results_folder

FILE = "progress.jsonl"
Guess = float | str | Sequence[str] | set[str] | None
"""A number, a word, several names in their order, or a set of names; None where nobody has guessed."""


@dataclass(frozen=True)
class Tried:
    """A check that was run.

    Attributes:
        unit: the folder name of its unit, without the number.
        check: its name, such as `check_merge`.
        passed: whether it passed.
    """

    unit: str
    check: str
    passed: bool


@dataclass(frozen=True)
class Guessed:
    """A guess that was compared with a measurement.

    Attributes:
        unit: the folder name of its unit, or of the folder in which the notebook ran.
        what: what was guessed, with its unit.
        guess, measured: both as they are shown.
        times: the guess over what was measured, where both are positive numbers; else None.
        right: whether a word, a list or a set was the right one; for a number, whether it is at most a factor of two off.
    """

    unit: str
    what: str
    guess: str
    measured: str
    times: float | None
    right: bool


@dataclass(frozen=True)
class Prediction:
    """One guess, or several with a name each. `predict` makes it."""

    what: str
    guess: Guess | Mapping[object, Guess]

    def compare(self, measured: Guess | Mapping[object, Guess]) -> None:
        """Print the guess beside what was measured, and keep both. Of several tries the first counts.

        Args:
            measured: like the guess; for several guesses, a dict with the same keys.
        """
        if not isinstance(measured, Mapping):
            return self._compare(self.what, self.guess, measured)
        guesses = self.guess if isinstance(self.guess, Mapping) else {}
        for name, value in measured.items():
            self._compare(f"{self.what}, {name}", guesses.get(name), value)

    def _compare(self, what: str, guess: Guess, measured: Guess) -> None:
        found = _shown(measured)
        if guess in (None, "", "..."):
            print(f"{what}: {found} (no guess)")
            return
        times = guess / measured if _positive(guess) and _positive(measured) else None
        right = _alike(guess, measured) if times is None else 0.5 <= times <= 2
        print(f"{what}: {found}; you said {_shown(guess)}, {_verdict(times, right, measured)}")
        row = Guessed(_here().name, what, _shown(guess), found, times, right)
        if not settings.short() and (row.unit, row.what) not in {(each.unit, each.what) for each in load(Guessed)}:
            _keep(row)


def predict(what: str, guess: Guess | Mapping[object, Guess] = None) -> Prediction:
    """Write a guess down before the measurement: `predict("parameters that LoRA trains", 1.2e6)`.

    Args:
        what: what is guessed, with its unit.
        guess: a number, a word, a list or set of names; or a dict of them; None as long as there is no guess.
    """
    return Prediction(what, guess)


def note_check(unit: str, check: str, passed: bool) -> int:
    """Keep what a check said in a notebook; return how many times in a row it has not passed here. Elsewhere do nothing."""
    if not _in_notebook():
        return 0
    _keep(Tried(unit, check, passed))
    tries = [each.passed for each in load(Tried) if (each.unit, each.check) == (unit, check)]
    return len(tries) - max((number for number, each in enumerate(tries, 1) if each), default=0)


def load(kind: type[Tried] | type[Guessed]) -> list:
    """Return what was kept by this notebook and by those of the other units beside it; lines that are no rows are left out."""
    rows = []
    for path in _files():
        with contextlib.suppress(OSError):  # of a file that may not be read
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                with contextlib.suppress(ValueError, TypeError):
                    rows.append(kind(**json.loads(line)))
    return rows


def checks(course: Path | None = None) -> dict[str, list[str]]:
    """Return the names of the checks in each unit's notebook, by the unit's folder name.

    Args:
        course: the folder of the units; without it, the one above the running notebook's.
    """
    found = {}
    for path in sorted((course or _here().parent).glob("[0-9][0-9]_*/[0-9][0-9]_*.ipynb")):
        try:
            cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
            sources = ["".join(cell["source"]) for cell in cells if cell["metadata"].get("nbgrader", {}).get("grade")]
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            continue
        called = [re.search(r"^(check_\w+)\(", source, re.MULTILINE) for source in sources]
        if any(called):
            found[path.parent.name] = [call[1] for call in called if call]
    return found


def show() -> None:
    """Print which checks have passed, and what was guessed and measured; draw how near the guesses came."""
    passed = {(each.unit, each.check) for each in load(Tried) if each.passed}
    of_passed = {unit: [check for of, check in sorted(passed) if of == unit] for unit in sorted({unit for unit, _ in passed})}
    print(f"{'unit':<26}{'checks passed':>14}   still to pass")
    for unit, wanted in (checks() or of_passed).items():
        waiting = [check for check in wanted if (unit.lstrip("0123456789_"), check) not in passed]
        listed = ", ".join(waiting[:2]) + (f" and {len(waiting) - 2} more" if len(waiting) > 2 else "")
        print(f"{unit:<26}{f'{len(wanted) - len(waiting)} of {len(wanted)}':>14}   {listed}")
    guesses = load(Guessed)
    if not guesses:
        short = " (A short run, as here, keeps none: its measurements mean nothing.)" if settings.short() else ""
        print(f"\nNo guess yet. Each unit asks for one or more before it measures: write yours in the place of None.{short}")
        return
    print(f"\n{'you said':>14}{'measured':>14}{'times':>8}   guessed")
    for each in guesses:
        beside = f"{each.times:.2f}" if each.times else ("right" if each.right else "no")
        print(f"{each.guess[:13]:>14}{each.measured[:13]:>14}{beside:>8}   {each.unit[:2]} · {each.what}")
    print(f"\n{summary(guesses)}")
    if any(each.times for each in guesses):
        from peftlab import plots  # matplotlib takes a second, and `predict` is imported by every unit

        plots.show(
            plots.guesses({f"{each.unit[:2]} · {each.what}": each.times for each in guesses if each.times}),
            alt="One dot for each number that was guessed: the guess over what was measured, on a logarithmic axis.",
        )
        print("A dot on the line is a number guessed exactly; in the grey band it is at most a factor of two off.")


def summary(guesses: Iterable[Guessed]) -> str:
    """Return in two sentences how well numbers and words were guessed."""
    guesses = list(guesses)
    factors = sorted(max(each.times, 1 / each.times) for each in guesses if each.times)
    others = [each.right for each in guesses if not each.times]
    said = []
    if factors:
        near, middle = sum(factor <= 2 for factor in factors), factors[len(factors) // 2]
        said.append(f"Of {_count(factors, 'number')} {_were(near)} within a factor of two; half were within {middle:.2g}.")
    if others:
        said.append(f"Of {_count(others, 'other guess')} {_were(sum(others))} right.")
    return " ".join(said)


def _count(things: Sequence, name: str) -> str:
    plural = "" if len(things) == 1 else "es" if name.endswith("s") else "s"
    return f"{len(things)} {name}{plural}"


def _were(count: int) -> str:
    return f"{count} was" if count == 1 else f"{count} were"


def _in_notebook() -> bool:
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return getattr(shell, "kernel", None) is not None


def _here() -> Path:
    """Return the folder in which the notebook runs; the root, if it has been removed meanwhile."""
    try:
        return Path.cwd()
    except FileNotFoundError:
        return Path("/")


def _files() -> list[Path]:
    own = (_here() / results_folder() / FILE).resolve()
    others = [path for path in sorted(_here().parent.glob(f"*/results/{FILE}")) if path.resolve() != own]
    return [path for path in (*others, own) if path.is_file()]


def _keep(row: Tried | Guessed) -> None:
    try:
        results_folder().mkdir(parents=True, exist_ok=True)
        with (results_folder() / FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(row)) + "\n")
    except OSError:  # a folder that cannot be written must not cost a check or a measurement
        return


def _positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _alike(guess: Guess, measured: Guess) -> bool:
    if isinstance(measured, set | frozenset) and isinstance(guess, list | tuple | set | frozenset):
        return set(guess) == measured
    return guess == measured


def _verdict(times: float | None, right: bool, measured: Guess) -> str:
    if times is None and _positive(measured):
        return "which is no number above zero"
    if times is None or round(times, 2) == 1:
        return "right" if right else "which it is not"
    return f"{times:.3g} times too much" if times > 1 else f"{1 / times:.3g} times too little"


def _shown(value: Guess) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        if isinstance(value, set | frozenset):
            return ", ".join(sorted(map(str, value))) or "none"
        return (", ".join(map(str, value)) or "none") if isinstance(value, list | tuple) else str(value)
    return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 1000 else f"{value:.4g}"
