"""What students hand in, as it comes: found, read with care, and never changed.

A submission is `submitted/STUDENT/UNIT/`, with the unit's notebook in it under any name, or an archive of it; or
`submitted/STUDENT/UNIT.ipynb` or `.zip` at once. Nothing is followed out of that folder, only regular files are opened,
nothing is executed, and what cannot be read becomes a sentence for the report.
"""

import gzip
import hashlib
import io
import json
import os
import re
import stat
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import nbformat
from nbformat import NotebookNode
from nbgrader.utils import parse_utc

from autograder.sandbox.plain import bounded, whole

NOTEBOOK_BYTES = 500 * 2**20
CELLS_BYTES = 50 * 2**20
"""Of a notebook without its outputs."""
FILES_BYTES = 20 * 2**20
FILES = 2000
FOLDERS_DEEP = 20
NAME_BYTES = 200
"""Of a file's, a folder's or a student's name: file systems take 255, and the grader puts endings behind it."""
NOTEBOOKS = 20
ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz")
OTHER_ARCHIVES = (".rar", ".7z", ".gz", ".bz2", ".xz")
TIMESTAMP = "timestamp.txt"
LISTED = 5


class UnusableError(Exception):
    """A submission cannot be graded as it is; the message is a sentence that tells its author why."""


@dataclass
class Submission:
    """What one student handed in for one unit.

    Attributes:
        notebook: without its outputs.
        files: what else lay in the folder, by its path as seen from the notebook.
        notes: sentences for the report.
        digest: of all of it.
    """

    notebook: NotebookNode
    files: dict[str, bytes] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    digest: str = ""

    def write(self, folder: Path, name: str) -> None:
        """Write it out as nbgrader expects it: `folder/name.ipynb`, and the files beside it."""
        folder.mkdir(parents=True, exist_ok=True)
        write_files(self.files, folder)
        (folder / f"{name}.ipynb").write_text(json.dumps(self.notebook), encoding="utf-8")


def write_files(files: dict[str, bytes], folder: Path) -> None:
    """Write files below a folder."""
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)


def printable(text: str, characters: int = 500) -> str:
    """Return a text that can be written anywhere: on one line, encodable, and not endless."""
    line = " ".join(re.sub(r"[\x00-\x1f\x7f\u2028\u2029]", " ", whole(text)).split())
    return line if len(line) <= characters else line[: characters - 1] + "…"


def students(submitted: Path, unit: str) -> Iterator[tuple[str, Path]]:
    """Yield each student's name and the folder, archive or notebook that was handed in for a unit, in order."""
    for home in _homes(submitted):
        place = _place(home, unit)
        if place is not None:
            yield whole(home.name), place


def unknown(submitted: Path, units: Iterable[str]) -> list[str]:
    """Return what lies in `submitted/` and is nobody's: in it there is no unit under the name that is looked for."""
    units = list(units)
    return [printable(home.name, 100) for home in _homes(submitted) if not any(_place(home, unit) for unit in units)]


def layout(names: Iterable[str]) -> str:
    """Return what to do with names that a learning management system has given to what it let download; empty if none has."""
    said = {
        r".+_\d+_assignsubmission_file.*": "Moodle names so (NAME_NUMBER_assignsubmission_file)",
        r"[^_]+(_late)?_\d+_\d+_.+": "Canvas names so (NAME_NUMBER_NUMBER_FILE)",
    }
    for pattern, system in said.items():
        if any(re.fullmatch(pattern, name, re.IGNORECASE) for name in names):
            return f"{system}: let `make collect ARCHIVE=... UNIT=...` sort what it let you download."
    if any(name.lower().endswith(ARCHIVES) for name in names):
        return "Unpack an archive that holds a whole class, and give each student a folder STUDENT/UNIT/."
    return ""


def _homes(submitted: Path) -> list[Path]:
    return [home for home in sorted(submitted.iterdir()) if not home.name.startswith(".")] if submitted.is_dir() else []


def _place(home: Path, unit: str) -> Path | None:
    places = [home / unit, *(home / f"{unit}{suffix}" for suffix in (*ARCHIVES, ".ipynb"))]
    return next((place for place in places if _mode(place)), None)


def name_problem(student: str) -> str | None:
    """Return why nbgrader cannot take a student's name; None if it can."""
    if student != student.strip() or re.search(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\ufffd]", student):
        why = "it begins or ends with a space, or holds a line break or what is no character"
    elif len(student.encode()) > NAME_BYTES:
        why = f"it is longer than {NAME_BYTES} bytes"
    else:
        return None
    return f"the name of this student's folder cannot stand in nbgrader's gradebook: {why}; rename the folder"


def read(place: Path, unit: str, answers: Callable[[NotebookNode], int] | None = None) -> Submission:
    """Read a submission.

    Args:
        answers: counts the answers in a notebook, to tell the one that is meant from others that were handed in with it.

    Raises:
        UnusableError: if there is no notebook in it that can be read.
    """
    mode = _mode(place)
    if stat.S_ISLNK(mode) or stat.S_ISLNK(_mode(place.parent)):
        raise UnusableError(f"{place.name} is a symbolic link, which is not followed")
    notes: list[str] = []
    files = _read_folder(place, notes) if stat.S_ISDIR(mode) else {place.name: _content(place)}
    files = _unpacked(files, notes)
    name, notebook = _choose_notebook(files, unit, notes, answers)
    digest = hashlib.sha256(files[name])
    others = {path: content for path, content in files.items() if not path.lower().endswith(".ipynb") and path != name}
    others = _seen_from(PurePosixPath(name).parent, others)
    _check_timestamp(others, notes)
    others = _that_can_be_written(others, f"{unit}.ipynb", notes)
    others = _small_enough(others, notes)
    for path, other in sorted(others.items()):
        digest.update(path.encode() + other)
    return Submission(notebook, others, notes, digest.hexdigest())


def _mode(path: Path) -> int:
    """Return what lstat says of a path; 0 if there is nothing that could be looked at."""
    try:
        return path.lstat().st_mode
    except (OSError, ValueError):
        return 0


def _content(path: Path) -> bytes:
    """Return what a regular file holds. Anything else is not opened: a pipe would never end."""
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            raise UnusableError(f"{printable(path.name)} is no regular file: there is no notebook in it")
        with open(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0)), "rb") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise UnusableError(f"{printable(path.name)} is no regular file: there is no notebook in it")
            if found.st_size > NOTEBOOK_BYTES:
                size = f"{found.st_size / 2**20:.0f} MiB"
                raise UnusableError(f"{printable(path.name)} has {size}: more than {NOTEBOOK_BYTES // 2**20} are not read")
            return file.read(NOTEBOOK_BYTES + 1)
    except OSError as error:
        raise UnusableError(f"{printable(path.name)} cannot be read as a notebook ({error.strerror})") from error


def _read_folder(folder: Path, notes: list[str]) -> dict[str, bytes]:
    """Return the regular files below a folder, by path."""
    files, read_bytes, left_out = {}, 0, []
    for path in _walk(folder, notes):
        mode, name = _mode(path), path.relative_to(folder).as_posix()
        if stat.S_ISREG(mode):
            is_notebook = name.lower().endswith(".ipynb")
            if (len(files) >= FILES or read_bytes + path.lstat().st_size > NOTEBOOK_BYTES) and not is_notebook:
                left_out.append(name)
                continue
            try:
                files[name] = _content(path)
            except UnusableError as error:
                if is_notebook:
                    raise
                notes.append(f"{error}, and was left out")
                continue
            read_bytes += len(files[name])
        elif not stat.S_ISDIR(mode):
            kind = "symbolic link" if stat.S_ISLNK(mode) else "special file"
            notes.append(f"{printable(name, 100)} is a {kind}, and was left out")
    if left_out:
        notes.append(f"{_listed(left_out)} left out: the submission is too large")
    return files


def _walk(folder: Path, notes: list[str]) -> Iterator[Path]:
    """Yield all paths below a folder, in order, without recursion and not endlessly deep."""
    waiting, seen = [(folder, 0)], 0
    while waiting:
        here, depth = waiting.pop(0)
        try:
            inside = sorted(here.iterdir())
        except OSError as error:
            notes.append(f"the folder {printable(here.name, 100)} cannot be read ({error.strerror}), and was left out")
            continue
        for path in inside:
            if path.name.startswith(".ipynb_checkpoints") or path.name == "__MACOSX":
                continue
            seen += 1
            if seen > 10 * FILES:
                notes.append(f"the submission has more than {10 * FILES:,} files; the rest was left out")
                return
            if stat.S_ISDIR(_mode(path)):
                if depth < FOLDERS_DEEP:
                    waiting.append((path, depth + 1))
                else:
                    notes.append(f"folders more than {FOLDERS_DEEP} deep were left out")
            yield path


def _unpacked(files: dict[str, bytes], notes: list[str], depth: int = 0) -> dict[str, bytes]:
    """Return the files with those of an archive, if the notebook can only be in there."""
    archives = [name for name in files if name.lower().endswith(ARCHIVES)]
    if any(name.lower().endswith(".ipynb") for name in files) or len(archives) != 1 or depth == 2:
        return files
    (name,) = archives
    try:
        inside = dict(_zip_members(files[name]) if name.lower().endswith(".zip") else _tar_members(files[name]))
    except UnusableError:
        raise
    except Exception as error:  # any bytes may stand there
        raise UnusableError(f"{printable(name, 100)} cannot be unpacked ({printable(str(error), 200)})") from error
    notes.append(f"the notebook was taken from {printable(name, 100)}")
    outside = {path: content for path, content in files.items() if path != name}
    return _unpacked(inside | outside, notes, depth + 1)


def _zip_members(content: bytes) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = [member for member in archive.infolist() if not member.is_dir()]
        _refuse_bombs(sum(member.file_size for member in members), len(members))
        for member in members:
            name = member.filename.replace("\\", "/")  # as some programs on Windows write it
            if _plain(name):
                with archive.open(member) as stream:
                    yield PurePosixPath(name).as_posix(), stream.read(member.file_size + 1)[: member.file_size]


def _tar_members(content: bytes) -> Iterator[tuple[str, bytes]]:
    if content[:2] == b"\x1f\x8b":
        with gzip.open(io.BytesIO(content)) as stream:
            content = stream.read(2 * NOTEBOOK_BYTES)
            _refuse_bombs(len(content) // 2 + len(stream.read(1)), 0)
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as archive:
        total = 0
        for number, member in enumerate(archive):
            total += member.size
            _refuse_bombs(total, number)
            if member.isreg() and _plain(member.name):
                yield PurePosixPath(member.name).as_posix(), archive.extractfile(member).read()


def _refuse_bombs(size: int, members: int) -> None:
    if size > NOTEBOOK_BYTES:
        raise UnusableError(f"the archive holds {size / 2**20:.0f} MiB: more than {NOTEBOOK_BYTES // 2**20} are not read")
    if members > 10 * FILES:
        raise UnusableError(f"the archive holds more than {10 * FILES:,} files: no notebook is looked for among so many")


def _plain(name: str) -> bool:
    """Whether a member's path stays below the folder, and is no system's rubbish."""
    path = PurePosixPath(name)
    hidden = any(part.startswith("._") or part in ("__MACOSX", ".ipynb_checkpoints") for part in path.parts)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and not hidden


def _choose_notebook(
    files: dict[str, bytes], unit: str, notes: list[str], answers: Callable[[NotebookNode], int] | None
) -> tuple[str, NotebookNode]:
    """Return the path and the content of the notebook that is meant.

    Several may have been handed in: then the one with the most answers counts, and the unit's own name if that is a tie.
    """
    usual = [name for name in files if name.lower().endswith(".ipynb")]
    unusual = [name for name in files if name not in usual and _may_be_a_notebook(name, files[name])]
    read, unreadable = _readable(files, usual, unit)
    if not read:
        read, _ = _readable(files, unusual, unit)
    if not read:
        if unreadable:
            raise next(iter(unreadable.values()))
        raise UnusableError(f"there is no notebook in it; expected {unit}.ipynb, found {_what_is_there(files)}")
    notes += [f"{error}; another notebook counts" for error in unreadable.values()]
    count = {name: answers(notebook) if answers else 0 for name, notebook in read.items()}
    if unreadable and answers and not any(count.values()):  # the answers may stand in what cannot be read
        raise next(iter(unreadable.values()))
    named = [name for name in read if PurePosixPath(name).name == f"{unit}.ipynb"]
    best = [name for name in named or read if answers is None or count[name] == max(count.values())]
    best = best or [name for name in read if count[name] == max(count.values())]
    chosen = best[0]
    if chosen not in named and len({files[name] for name in best}) > 1:
        raise UnusableError(f"there is no {unit}.ipynb in it, and which of these is meant is not clear: {_listed(best, '')}")
    if len(read) > 1:
        why = f", which has the most answers ({count[chosen]})" if answers else ""
        notes.append(f"there are {len(read)} notebooks in it; what counts is {printable(chosen, 100)}{why}")
    elif chosen != f"{unit}.ipynb":
        notes.append(f"the notebook was called {printable(chosen, 100)}")
    return chosen, read[chosen]


def _may_be_a_notebook(name: str, content: bytes) -> bool:
    """Whether a file without a notebook's ending may be one: some browsers and mail programs add an ending, or take it."""
    likely = ".ipynb" in name.lower() or PurePosixPath(name).suffix.lower() in ("", ".txt", ".json")
    holds_cells = b'"cells"' in content.replace(b"\0", b"")  # of UTF-16, every second byte is 0
    return likely and PurePosixPath(name).name != TIMESTAMP and holds_cells and len(content) < NOTEBOOK_BYTES


def _readable(
    files: dict[str, bytes], names: Iterable[str], unit: str
) -> tuple[dict[str, NotebookNode], dict[str, UnusableError]]:
    """Return the notebooks among these files, the best known names first, and why the others cannot be read."""
    read, unreadable = {}, {}
    order = sorted(names, key=lambda name: (PurePosixPath(name).name != f"{unit}.ipynb", name.count("/"), name))
    for name in order[:NOTEBOOKS]:
        try:
            read[name] = _parse(files[name], printable(name, 100))
        except UnusableError as error:
            unreadable[name] = error
    return read, unreadable


def _what_is_there(files: dict[str, bytes]) -> str:
    if not files:
        return "nothing"
    hint = ""
    if any(name.lower().endswith(OTHER_ARCHIVES) for name in files):
        hint = " (of archives, .zip, .tar and .tar.gz are unpacked)"
    elif sum(name.lower().endswith(ARCHIVES) for name in files) > 1:
        hint = " (of several archives none is unpacked)"
    return _listed(sorted(files), "") + hint


def _listed(names: list[str], verb: str = " was") -> str:
    """Return the first few names, and how many more there are."""
    shown = ", ".join(printable(name, 100) for name in names[:LISTED])
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    if verb and len(names) > 1:
        verb = " were"
    return f"{shown}{more}{verb}"


def _seen_from(folder: PurePosixPath, files: dict[str, bytes]) -> dict[str, bytes]:
    """Return the files by their paths as seen from the notebook's folder; what lies elsewhere keeps its path."""
    beside, elsewhere = {}, {}
    for path, content in files.items():
        if PurePosixPath(path).is_relative_to(folder):
            beside[PurePosixPath(path).relative_to(folder).as_posix()] = content
        else:
            elsewhere[path] = content
    stamp = {TIMESTAMP: elsewhere[TIMESTAMP]} if TIMESTAMP in elsewhere else {}  # not the student's, but the exchange's
    return elsewhere | beside | stamp


def _check_timestamp(files: dict[str, bytes], notes: list[str]) -> None:
    """Leave out a timestamp that says no time: nbgrader would stop at it."""
    if TIMESTAMP not in files:
        return
    text = files.pop(TIMESTAMP)[:1000].decode("utf-8-sig", "replace").strip()
    if not text:
        return
    try:
        parse_utc(text)
    except Exception:  # dateutil's parser can fail in several ways
        notes.append(f'{TIMESTAMP} says "{printable(text, 40)}", which is no time, and was ignored')
        return
    files[TIMESTAMP] = text.encode()


def _that_can_be_written(files: dict[str, bytes], notebook: str, notes: list[str]) -> dict[str, bytes]:
    """Return the files whose names a file system takes, and that do not stand in each other's way or in the notebook's."""
    kept, left_out = {}, []
    taken, folders = {notebook}, set()
    for path in sorted(files, key=lambda path: (path.count("/"), path)):
        parts = PurePosixPath(path).parts
        above = {"/".join(parts[:depth]) for depth in range(1, len(parts))}
        try:
            sizes = [len(part.encode()) for part in parts]
        except UnicodeEncodeError:
            sizes = [NAME_BYTES + 1]
        fits = max(sizes) <= NAME_BYTES and sum(sizes) <= 5 * NAME_BYTES and len(parts) <= FOLDERS_DEEP + 1
        if not fits or "\0" in path or path in taken | folders or above & taken:
            left_out.append(path)
            continue
        kept[path] = files[path]
        taken.add(path)
        folders |= above
    if left_out:
        notes.append(f"{_listed(left_out)} left out: such a name cannot stand beside the notebook")
    return kept


def _small_enough(files: dict[str, bytes], notes: list[str]) -> dict[str, bytes]:
    """Leave out the largest files until the others are few and small enough."""
    kept, left_out = dict(files), []
    total = sum(map(len, files.values()))
    for path in sorted(files, key=lambda path: (-len(files[path]), path)):
        if total <= FILES_BYTES and len(kept) <= FILES:
            break
        if path != TIMESTAMP:
            total -= len(kept.pop(path))
            left_out.append(path)
    if left_out:
        size = sum(len(files[path]) for path in left_out) / 2**20
        notes.append(f"{_listed(left_out)} left out ({size:.0f} MiB of other files)")
    return kept


def _parse(content: bytes, name: str) -> NotebookNode:
    if not content.strip():
        raise UnusableError(f"{name} is empty")
    try:
        text = content.decode(json.detect_encoding(content), "surrogatepass")  # UTF-8, UTF-16 or UTF-32
    except UnicodeDecodeError as error:
        raise UnusableError(f"{name} is not UTF-8 text (byte {error.start:,} is not)") from error
    try:
        parsed = json.loads(text.lstrip("\ufeff"))
    except (ValueError, RecursionError) as error:
        raise UnusableError(f"{name} is not JSON, so no notebook: was it cut off, or edited by hand? ({error})") from error
    try:
        notebook = _notebook(parsed)
    except Exception as error:  # any structure may stand there
        raise UnusableError(f"{name} is JSON, but no Jupyter notebook ({type(error).__name__})") from error
    size = sum(len(str(cell)) for cell in notebook.cells)
    if size > CELLS_BYTES:
        raise UnusableError(f"the cells of the notebook {name} hold {size / 2**20:.0f} MiB: that much is not read")
    return notebook


def _notebook(parsed: dict) -> NotebookNode:
    """Return what stands in a notebook's JSON, without outputs and in the form that it should have."""
    worksheets = parsed.get("worksheets")
    cells = parsed["cells"] if worksheets is None else [cell for sheet in worksheets for cell in sheet["cells"]]
    if not isinstance(cells, list):
        raise TypeError("cells are a list")
    metadata = bounded(parsed.get("metadata"))
    form = {"nbformat": 4, "nbformat_minor": 5, "metadata": metadata if isinstance(metadata, dict) else {}}
    plain = [plain_cell(cell) for cell in cells if isinstance(cell, dict)]
    taken: set[str] = set()
    for cell in plain:
        if cell.get("id") in taken:  # nbformat would give it a random one; in the metadata it stays, as Colab keeps it
            cell.metadata.setdefault("id", cell.pop("id"))
        taken |= {cell["id"]} if "id" in cell else set()
    return nbformat.from_dict(form | {"cells": plain})


def plain_cell(cell: dict) -> NotebookNode:
    """Return a cell in the form that it should have, whatever stands in it: without outputs, its lines ended by `\\n`."""
    kind = cell.get("cell_type")
    heading = kind == "heading"  # in the oldest notebooks
    kind = "markdown" if heading else kind if kind in ("code", "markdown", "raw") else "raw"
    source = cell.get("source", cell.get("input"))
    if not isinstance(source, str):
        source = "".join(line for line in source if isinstance(line, str)) if isinstance(source, list) else ""
    source = _readable_text(source)
    plain = {"cell_type": kind, "source": f"# {source}" if heading else source}
    metadata = bounded(cell.get("metadata"))
    plain["metadata"] = metadata = metadata if isinstance(metadata, dict) else {}
    for key, kept in (("tags", list), ("nbgrader", dict)):
        if key in metadata and not isinstance(metadata[key], kept):
            del metadata[key]
    if "tags" in metadata:
        texts = [tag for tag in metadata["tags"] if isinstance(tag, str)]
        metadata["tags"] = [tag for tag in dict.fromkeys(texts) if re.fullmatch("[^,\n]+", tag)]
    if isinstance(cell.get("id"), str) and re.fullmatch("[a-zA-Z0-9_-]{1,64}", cell["id"]):
        plain["id"] = cell["id"]
    if kind == "code":
        plain |= {"outputs": [], "execution_count": None}
    elif isinstance(cell.get("attachments"), dict):
        plain["attachments"] = _attachments(cell["attachments"])
    return nbformat.from_dict(plain)


def _readable_text(source: str) -> str:
    """Return a cell's text with lines ended by `\\n`, and without what editors and conversions leave and Python refuses."""
    return whole(source).replace("\r\n", "\n").replace("\r", "\n").replace("\0", "").removeprefix("\ufeff")


def _attachments(given: dict) -> dict:
    """Return pictures that were pasted: of each, its forms by MIME type, all of them text."""
    return {
        whole(name): {whole(mime): data for mime, data in forms.items() if isinstance(data, str) and data.isascii()}
        for name, forms in given.items()
        if isinstance(forms, dict)
    }
