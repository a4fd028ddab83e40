"""Grading a class of 60: killed twice and started again, under load, and against stock nbgrader; no test asserts a time.

    python benchmarks/grading_a_class.py [--students 60] [--only marks] [--folder FOLDER]

With a folder it may be stopped and started again: what has been measured there is not measured again. Don't change the
project while it runs, for a changed unit is graded anew. It prints whether the marks of a run that was killed twice with
SIGKILL, and of a run with all cores kept busy by something else, equal those of an undisturbed run; how many submissions a
minute are graded in the sandbox and by stock `nbgrader autograde`, on the same right and wrong notebooks; and the seconds
that a submission takes, by stage.
"""

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "grading")]

from attacks import ALL, MERGE, SOLUTION, UNIT, WRONG_MERGE, hostile_to  # noqa: E402
from autograder.grading.grade import Settings  # noqa: E402
from classroom import Classroom  # noqa: E402

MIXTURE = (
    *[SOLUTION] * 6,
    *[SOLUTION | {"merge": WRONG_MERGE}] * 3,
    *[SOLUTION | {"lora-linear": SOLUTION["lora-linear"].replace("alpha / rank", "alpha")}] * 3,
    *[{}] * 2,
    SOLUTION | {"merge": MERGE + "\nimport warnings; warnings.warn('mind the gap')"},
)
HOSTILE = ("loops", "exits", "crashes", "patches-torch", "eats-memory", "writes-the-gradebook", "copies-a-check", "colab")


def a_class(root: Path, students: int, hostile: bool) -> Classroom:
    """Hand in for a class: one in four is hostile or unusual, if that is wanted."""
    classroom = Classroom(root, UNIT)
    for number in range(students):
        if hostile and number % 4 == 3:
            attack = hostile_to(ALL[HOSTILE[number // 4 % len(HOSTILE)]], root, 9)
            notebook = classroom.answered(SOLUTION | attack.answers)
            attack.notebook(notebook)
        else:
            notebook = classroom.answered(MIXTURE[number % len(MIXTURE)])
        classroom.submit(f"student{number:03}", notebook)
    return classroom


def grading(root: Path) -> list[str]:
    return [sys.executable, "-m", "autograder.grading.grade", UNIT, "--root", str(root)]


def marks(classroom: Classroom, students: int) -> dict[str, dict]:
    return {name: classroom.mark(name).scores for name in (f"student{number:03}" for number in range(students))}


def graded(classroom: Classroom, students: int, label: str) -> dict[str, dict]:
    start = time.monotonic()
    subprocess.run(grading(classroom.root), cwd=ROOT, check=True)
    seconds = time.monotonic() - start
    print(f"{label}: {seconds:.0f} s, {60 * students / seconds:.1f} submissions a minute", flush=True)
    return marks(classroom, students)


def killed_twice(classroom: Classroom, students: int, seconds: float) -> dict[str, dict]:
    """Kill the grading twice, somewhere on its way, then let it finish."""
    for _ in range(2):
        run = subprocess.Popen(grading(classroom.root), cwd=ROOT, start_new_session=True)
        time.sleep(seconds)
        run.send_signal(signal.SIGKILL)
        run.wait()
        kept = list((classroom.root / "grading" / UNIT / "records").glob("*.json"))
        print(f"killed after {seconds:.0f} s with {len(kept)} of {students} done", flush=True)
    before = {path: path.stat().st_mtime_ns for path in kept}
    outcome = graded(classroom, students, "the rest")
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in before.items()), "something was graded twice"
    return outcome


def burn() -> None:
    while True:
        random.random()


def stock(classroom: Classroom) -> None:
    """Grade with nbgrader's own preprocessors, in one process, as `nbgrader autograde` does; experiments left out."""
    config = classroom.root / "nbgrader_config.py"
    config.write_text(
        f"""
from nbgrader import utils
from nbgrader.converters import Autograde
from nbgrader.preprocessors import Execute
class Stock(Execute):
    def preprocess_cell(self, cell, resources, index):
        skip = "experiment" in cell.metadata.get("tags", []) and not utils.is_grade(cell)
        return (cell, resources) if skip else super().preprocess_cell(cell, resources, index)
c = get_config()
c.CourseDirectory.root = {str(classroom.root)!r}
c.CourseDirectory.source_directory, c.CourseDirectory.release_directory = "solutions", "release"
c.Autograde.autograde_preprocessors = [
    Stock if step is Execute else step for step in Autograde.autograde_preprocessors.default_args[0]]
c.Stock.timeout, c.Stock.iopub_timeout = 120, 60
"""
    )
    subprocess.run(
        ["nbgrader", "autograde", UNIT, "--force"], cwd=classroom.root, check=True, capture_output=True, env=os.environ
    )


def compare_marks(folder: Path, count: int) -> None:
    """Grade one class three times: undisturbed, killed twice, and with all cores kept busy by something else."""

    def undisturbed(classroom: Classroom) -> dict[str, dict]:
        return graded(classroom, count, "undisturbed")

    def killed(classroom: Classroom) -> dict[str, dict]:
        return killed_twice(classroom, count, seconds / 3)

    def loaded(classroom: Classroom) -> dict[str, dict]:
        load = [multiprocessing.Process(target=burn, daemon=True) for _ in range(os.cpu_count() or 1)]
        for process in load:
            process.start()
        try:
            return graded(classroom, count, "with all cores kept busy by something else")
        finally:
            for process in load:
                process.kill()

    outcomes = {}
    for run in (undisturbed, killed, loaded):
        kept = folder / f"{run.__name__}.json"
        if not kept.exists():
            shutil.rmtree(folder / run.__name__, ignore_errors=True)  # half of a class that was stopped
            start = time.monotonic()
            found = run(a_class(folder / run.__name__, count, True))
            kept.write_text(json.dumps({"seconds": time.monotonic() - start, "marks": found}))
        outcomes[run.__name__] = json.loads(kept.read_text())
        seconds = outcomes["undisturbed"]["seconds"]
    for name in ("killed", "loaded"):
        print(f"{name}: marks equal to the undisturbed run's: {outcomes[name]['marks'] == outcomes['undisturbed']['marks']}")


def race(folder: Path, count: int) -> None:
    """Grade the same right and wrong notebooks with stock nbgrader and in the sandbox, and list where the time goes."""
    classroom = a_class(folder / "d", count, False)
    start = time.monotonic()
    stock(classroom)
    stock_seconds = time.monotonic() - start
    stock_marks = marks(classroom, count)
    ours = a_class(folder / "e", count, False)
    start = time.monotonic()
    our_marks = graded(ours, count, "sandboxed")
    our_seconds = time.monotonic() - start
    differing = [name for name in our_marks if our_marks[name] != stock_marks[name]]
    print(f"stock nbgrader: {stock_seconds:.0f} s; sandboxed, on {Settings.workers} cores: {our_seconds:.0f} s")
    print(f"throughput: {stock_seconds / our_seconds:.2f} times stock's; marks that differ: {differing or 'none'}")
    records = [json.loads(path.read_text()) for path in (ours.root / "grading" / UNIT / "records").glob("*.json")]
    for stage in dict.fromkeys(stage for record in records for stage in record["seconds"]):
        seconds = statistics.mean(record["seconds"].get(stage, 0.0) for record in records)
        print(f"  {stage:<22}{seconds:6.2f} s a submission")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--students", type=int, default=60)
    parser.add_argument("--compared", type=int, default=16, help="right and wrong ones, for the race with stock nbgrader")
    parser.add_argument("--only", choices=("marks", "race"), help="one of the two halves; by default both")
    parser.add_argument("--folder", type=Path, help="where classes and marks are kept; default: nowhere")
    options = parser.parse_args()
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        if options.only != "race":
            compare_marks(folder, options.students)
        if options.only != "marks":
            race(Path(scratch), options.compared)


if __name__ == "__main__":
    main()
