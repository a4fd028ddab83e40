"""Grading a class of 60: killed twice and started again, under load, and against stock nbgrader; no test asserts a time.

    python benchmarks/grading_a_class.py [--students 60]

Prints whether the marks of a run that was killed twice with SIGKILL, and of a run with all cores kept busy by something
else, equal those of an undisturbed run; how many submissions a minute are graded in the sandbox and by stock
`nbgrader autograde`, on the same right and wrong notebooks; and the seconds that a submission takes, by stage.
"""

import argparse
import json
import multiprocessing
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from attacks import ALL, MERGE, SOLUTION, UNIT, WRONG_MERGE, hostile_to  # noqa: E402
from autograder.grade import Settings  # noqa: E402
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
    return [sys.executable, "-m", "autograder.grade", UNIT, "--root", str(root)]


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--students", type=int, default=60)
    parser.add_argument("--compared", type=int, default=16, help="right and wrong ones, for the race with stock nbgrader")
    options = parser.parse_args()
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with tempfile.TemporaryDirectory() as folder:
        count = options.students
        start = time.monotonic()
        undisturbed = graded(a_class(Path(folder) / "a", count, True), count, "undisturbed")
        seconds = time.monotonic() - start
        again = killed_twice(a_class(Path(folder) / "b", count, True), count, seconds / 3)
        print(f"killed twice: marks equal: {again == undisturbed}")

        load = [multiprocessing.Process(target=burn, daemon=True) for _ in range(os.cpu_count() or 1)]
        for process in load:
            process.start()
        busy = graded(a_class(Path(folder) / "c", count, True), count, "with all cores kept busy by something else")
        for process in load:
            process.kill()
        print(f"under load: marks equal: {busy == undisturbed}")

        count = options.compared
        classroom = a_class(Path(folder) / "d", count, False)
        start = time.monotonic()
        stock(classroom)
        stock_seconds = time.monotonic() - start
        stock_marks = marks(classroom, count)
        ours = a_class(Path(folder) / "e", count, False)
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


if __name__ == "__main__":
    main()
