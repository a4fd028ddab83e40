"""Seconds from `git clone` to the first passed check, step by step, as a newcomer takes them; no test asserts a time.

    python benchmarks/first_check.py [--repository ADDRESS]

Clones the repository (by default the one that this file is in, as far as it is committed) into an empty folder, does what
`make lab` does, and drives its JupyterLab in Chromium: opens the first graded unit, runs its first cell, has its first exercise
answered, and runs the check. Everything but the browser and pip's package cache is new.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import sync_playwright

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "grading")]

from autograder.checks.why_peft import EXERCISES  # noqa: E402
from browser import CHROMIUM, SECONDS, NotebookPage, jupyterlab  # noqa: E402
from peftlab.results import describe_hardware  # noqa: E402

UNIT, ANSWER = "01_why_peft", "count-parameters"


@contextmanager
def step(what: str) -> Iterator[None]:
    """Print how long it took."""
    started = time.monotonic()
    yield
    print(f"{what:<52}{time.monotonic() - started:>7.1f} s", flush=True)


def first_check(repository: str, folder: Path) -> None:
    """Take every step, and print its seconds.

    Raises:
        subprocess.CalledProcessError: if cloning or setting up fails.
        RuntimeError: if JupyterLab does not start, or the check does not pass.
    """
    clone, home = folder / "clone", folder / "home"
    home.mkdir()
    with step("git clone"):
        subprocess.run(["git", "clone", "--quiet", repository, clone], check=True)
    with step("make lab: virtual environment, packages, model, texts"):
        subprocess.run(["make", "--silent", ".venv/.lab"], cwd=clone, check=True)
    with sync_playwright() as playwright:
        page = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"]).new_page()
        page.set_default_timeout(SECONDS * 1000)
        started = time.monotonic()
        with jupyterlab(clone / "course", home, clone / ".venv" / "bin" / "python") as address:
            print(f"{'make lab: JupyterLab answers':<52}{time.monotonic() - started:>7.1f} s", flush=True)
            with step(f"{UNIT} is open, its kernel ready"):
                notebook = NotebookPage(page, address, f"{UNIT}/{UNIT}.ipynb")
            with step("the first cell: imports"):
                notebook.run("setup")
            notebook.write(ANSWER, EXERCISES["check_count_parameters"].source({}))
            with step("an answer, and its check"):
                notebook.run(ANSWER)
                said = notebook.run(f"check-{ANSWER}").inner_text()
    if "passed" not in said:
        raise RuntimeError(f"the check did not pass: {said}")


def main() -> None:
    """Run the command line described in this module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repository", default=str(ROOT), help="what to clone (default: this one)")
    options = parser.parse_args()
    if CHROMIUM is None:
        parser.error("there is no Chromium: make browser")
    print(describe_hardware())
    with tempfile.TemporaryDirectory() as folder, step("together"):
        first_check(options.repository, Path(folder))


if __name__ == "__main__":
    main()
