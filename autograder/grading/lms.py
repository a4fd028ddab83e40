"""What learning management systems give out, and what they take back.

    python -m autograder.grading.lms DOWNLOAD 08_lora

sorts a download (a .zip, or the folder that it was unpacked to) into `submitted/STUDENT/UNIT/`: of Moodle, Canvas or
Blackboard, or files and folders that are called like students. Nothing that is there is overwritten.
`report/UNIT_collected.csv` says what came from whom, and is what `write_grades` needs to name students as their system does.
"""

import argparse
import csv
import re
import shutil
import sys
import tempfile
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path, PurePosixPath

from nbgrader.api import Gradebook

from autograder.building.build import ROOT
from autograder.checking.masters import units
from autograder.grading import intake
from autograder.grading.intake import ARCHIVES, NOTEBOOK_BYTES, TIMESTAMP, name_problem, printable

MOODLE, CANVAS, BLACKBOARD, NAMED = "Moodle", "Canvas", "Blackboard", "names"
FORMS = {
    MOODLE: r"(?P<student>[^/]+?)_(?P<id>\d+)_assignsubmission_(?P<kind>[a-z]+)(?:_?/|_)(?P<file>.+)",
    CANVAS: r"(?P<student>[^_/]+)(?P<late>_LATE)?_(?P<id>\d+)_\d+_(?P<file>[^/]+)",
    BLACKBOARD: r"[^/]+_(?P<student>(?P<id>[^_/]+))_attempt_(?P<when>\d{4}(?:-\d\d){5})(?:_(?P<file>[^/]+)|\.txt)",
    NAMED: r"(?P<student>[^/]+?)(?:/(?P<file>.+)|(?P<ending>\.ipynb|\.zip|\.tar|\.tar\.gz|\.tgz))",
}
"""How each calls a file; the last takes anything."""
COLLECTED, THERE, KEPT, UNREADABLE, MISSING = (
    "collected",
    "there already",
    "left alone: something else is there",
    "not readable",
    "missing",
)
COLUMNS = ("student", "status", "system", "id", "late", "files", "note")


@dataclass
class Piece:
    """A file that somebody has handed in.

    Attributes:
        path: in the student's folder.
        identity: of the student in the system, or "".
        when: of the attempt, as the system writes it, or "".
        read: returns the content.
    """

    student: str
    path: PurePosixPath
    read: Callable[[], bytes]
    identity: str = ""
    late: bool = False
    when: str = ""


@dataclass
class Collected:
    """What came of one student's files: a line of the table."""

    student: str
    status: str
    system: str = ""
    id: str = ""
    late: str = ""
    files: int = 0
    note: str = field(default="")


def main(arguments: list[str] | None = None) -> int:
    """Collect; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("download", type=Path, help="the archive, or the folder that it was unpacked to")
    parser.add_argument("unit", help="what was handed in")
    parser.add_argument("--root", type=Path, default=ROOT, help="the folder with `submitted/` and the gradebook")
    options = parser.parse_args(arguments)
    if options.unit not in units():
        parser.error(f"there is no unit {options.unit}; there are {', '.join(units())}")
    try:
        found = collect(options.download, options.unit, options.root)
    except (OSError, zipfile.BadZipFile, ValueError) as error:
        print(f"{options.download} cannot be read: {error}", file=sys.stderr)
        return 1
    counts = defaultdict(int)
    for line in found:
        counts[line.status] += 1
        if line.status != COLLECTED or line.note:
            print(f"{line.student}: {line.status}{f' ({line.note})' if line.note else ''}")
    print(", ".join(f"{count} {status}" for status, count in counts.items()) or "nothing was found")
    print(f"All of it is in report/{options.unit}_collected.csv.")
    return 0


def collect(download: Path, unit: str, root: Path) -> list[Collected]:
    """Sort a download into `root/submitted`; return what became of everybody, and write it down.

    Raises:
        ValueError: if there is nothing in it.
        OSError, zipfile.BadZipFile: if it cannot be read.
    """
    with tempfile.TemporaryDirectory() as folder:
        members = list(_members(download, Path(folder)))
        if not members:
            raise ValueError("there is no file in it")
        system = system_of([name for name, _ in members])
        pieces, strangers = _pieces(members, system)
        lines = [_store(student, files, system, unit, root) for student, files in sorted(_by_student(pieces).items())]
    lines += [Collected(printable(name, 100), UNREADABLE, note=f"{system} does not call a file so") for name in strangers]
    there = {student for student, _ in intake.students(root / "submitted", unit)}
    with Gradebook(f"sqlite:///{root / 'gradebook.db'}") as gradebook:
        lines += [Collected(student.id, MISSING) for student in gradebook.students if student.id not in there]
    _write(root / "report" / f"{unit}_collected.csv", COLUMNS, [vars(line) for line in lines])
    return lines


def system_of(names: Iterable[str]) -> str:
    """Return which system has given files these names: the one whose form most of them have."""
    names = list(names)
    fitting = {system: sum(bool(re.fullmatch(FORMS[system], name)) for name in names) for system in FORMS if system != NAMED}
    best = max(fitting, key=fitting.get)
    return best if 2 * fitting[best] > len(names) else NAMED


def _members(download: Path, folder: Path) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """Yield the name of every file, from where the students' own names begin, and what reads it."""
    if download.is_dir():
        found = {
            path.relative_to(download).as_posix(): path.read_bytes
            for path in sorted(download.rglob("*"))
            if path.is_file() and not path.is_symlink()
        }
    else:
        archive = zipfile.ZipFile(download)
        found = {
            member.filename.replace("\\", "/"): lambda member=member: _unzipped(archive, member)
            for member in archive.infolist()
            if not member.is_dir()
        }
    found = {name: read for name, read in found.items() if intake._plain(name)}
    parts = [PurePosixPath(name).parts for name in found]
    together = bool(parts) and len({first for first, *_ in parts}) == 1
    if together and all(len(each) > 1 for each in parts) and _holds_a_class(parts):
        found = {name.split("/", 1)[1]: read for name, read in found.items()}
    yield from found.items()


def _holds_a_class(parts: list[tuple[str, ...]]) -> bool:
    """Whether the one folder that everything lies in is the class's, and not a student's."""
    inside = ["/".join(rest) for _, *rest in parts]
    return system_of(inside) != NAMED or all(len(each) > 2 for each in parts)


def _unzipped(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
    if member.file_size > NOTEBOOK_BYTES:
        raise ValueError(f"it has {member.file_size / 2**20:.0f} MiB, more than {NOTEBOOK_BYTES // 2**20}")
    with archive.open(member) as stream:
        return stream.read(member.file_size)


def _pieces(members: list[tuple[str, Callable]], system: str) -> tuple[list[Piece], list[str]]:
    """Return what students handed in, and the names of files that the system would not call so."""
    pieces, strangers = [], []
    for name, read in members:
        found = re.fullmatch(FORMS[system], name)
        if found is None:
            strangers.append(name)
            continue
        parts = found.groupdict()
        if parts.get("kind", "file") != "file" or (system == BLACKBOARD and parts["file"] is None):
            continue  # what was written into the system's own page; Blackboard's note on an attempt
        file = parts["file"] or name
        if system == CANVAS:
            file = re.sub(r"-\d+(?=(\.\w+)+$)", "", file)  # Canvas numbers what is handed in again
        student = parts["student"].strip().replace("+", "-")
        late, when = bool(parts.get("late")), parts.get("when") or ""
        pieces.append(Piece(student, PurePosixPath(file), read, parts.get("id") or "", late, when))
    return pieces, strangers


def _by_student(pieces: list[Piece]) -> dict[str, list[Piece]]:
    """Return the pieces of each student; where two have one name, with their numbers."""
    identities = defaultdict(set)
    for piece in pieces:
        identities[piece.student].add(piece.identity)
    found = defaultdict(list)
    for piece in pieces:
        alone = len(identities[piece.student]) == 1
        found[piece.student if alone else f"{piece.student} {piece.identity}"].append(piece)
    return found


def _store(student: str, pieces: list[Piece], system: str, unit: str, root: Path) -> Collected:
    """Put a student's files in their place, all or none; of several attempts the last."""
    line = Collected(student, COLLECTED, "" if system == NAMED else system, pieces[0].identity)
    line.late = "late" if any(piece.late for piece in pieces) else ""
    last = max(piece.when for piece in pieces)
    if len({piece.when for piece in pieces}) > 1:
        line.note = f"of {len({piece.when for piece in pieces})} attempts the last, of {last}"
    problem = name_problem(student)
    if problem:
        line.status, line.note = UNREADABLE, problem
        return line
    try:
        files = {piece.path: piece.read() for piece in pieces if piece.when == last}
    except Exception as error:  # a damaged archive can fail in any way
        line.status, line.note = UNREADABLE, printable(str(error), 200) or type(error).__name__
        return line
    line.files = len(files)
    if last:
        moment = datetime.strptime(last, "%Y-%m-%d-%H-%M-%S").astimezone()
        files[PurePosixPath(TIMESTAMP)] = moment.strftime("%Y-%m-%d %H:%M:%S %z\n").encode()
    home = root / "submitted" / student
    place = next(
        (home / f"{unit}{ending}" for ending in ("", *ARCHIVES, ".ipynb") if (home / f"{unit}{ending}").exists()), None
    )
    if place is not None:
        line.status = THERE if _content_of(place) == {str(path): content for path, content in files.items()} else KEPT
        return line
    home.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=".collecting-", dir=home))
    try:
        for path, content in files.items():
            (new / path).parent.mkdir(parents=True, exist_ok=True)
            (new / path).write_bytes(content)
        new.chmod(0o755)
        new.rename(home / unit)
    except OSError as error:
        shutil.rmtree(new, ignore_errors=True)
        line.status, line.note = UNREADABLE, printable(str(error), 200)
    return line


def _content_of(place: Path) -> dict[str, bytes]:
    files = [path for path in place.rglob("*") if path.is_file()] if place.is_dir() else [place]
    return {path.relative_to(place).as_posix() if place.is_dir() else path.name: path.read_bytes() for path in files}


def write_grades(unit: str, scores: dict[str, float | None], most: float, root: Path) -> list[Path]:
    """Write the marks of a unit as the system that its submissions came from takes them; return the files' paths.

    Args:
        scores: by student; None where there is no mark.
        most: the points that the unit has.
    """
    collected = root / "report" / f"{unit}_collected.csv"
    if not collected.is_file():
        return []
    with collected.open(newline="", encoding="utf-8") as file:
        known = [line for line in csv.DictReader(file) if line["id"]]
    written = []
    for system in {line["system"] for line in known}:
        path = root / "report" / f"{unit}_{system.lower()}.csv"
        lines = [(line, scores.get(line["student"])) for line in known if line["system"] == system]
        marks = [(line, "" if score is None else f"{score:g}") for line, score in lines]
        if system == MOODLE:
            columns = ("Identifier", "Full name", "Grade", "Maximum Grade")
            rows = [(f"Participant {line['id']}", line["student"], mark, f"{most:g}") for line, mark in marks]
        elif system == CANVAS:
            columns = ("Student", "ID", "SIS User ID", "SIS Login ID", "Section", unit)
            rows = [("    Points Possible", "", "", "", "", f"{most:g}")]
            rows += [(line["student"], line["id"], "", "", "", mark) for line, mark in marks]
        else:
            columns = ("Username", unit)
            rows = [(line["id"], mark) for line, mark in marks]
        _write(path, columns, [dict(zip(columns, row, strict=True)) for row in rows])
        written.append(path)
    return written


def _write(path: Path, columns: Iterable[str], rows: list[dict]) -> None:
    path.parent.mkdir(exist_ok=True)
    part = path.with_suffix(".part")
    with part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(columns))
        writer.writeheader()
        writer.writerows(rows)
    part.replace(path)


if __name__ == "__main__":
    sys.exit(main())
