"""What students hand in, as it comes: found, read with care, and never changed.

A submission is `submitted/STUDENT/UNIT/`, with the unit's notebook in it under any name, or an archive of it. Nothing is
followed out of that folder, nothing is executed, and whatever cannot be read becomes a sentence for the report.
"""

import hashlib
import io
import json
import stat
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import nbformat
from nbformat import NotebookNode

NOTEBOOK_BYTES = 500 * 2**20
FILES_BYTES = 20 * 2**20
ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz")
TIMESTAMP = "timestamp.txt"


class UnusableError(Exception):
    """A submission cannot be graded as it is; the message is a sentence that tells its author why."""


@dataclass
class Submission:
    """What one student handed in for one unit.

    Attributes:
        notebook: without its outputs.
        files: what else lay in the folder, by its path there.
        notes: sentences for the report.
        digest: of all of it.
    """

    notebook: NotebookNode
    files: dict[str, bytes] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    digest: str = ""

    def write(self, folder: Path, name: str) -> None:
        """Write it out as nbgrader expects it: `folder/name.ipynb`, and the files beside it."""
        for path, content in self.files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(content)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.ipynb").write_text(json.dumps(self.notebook), encoding="utf-8")


def students(submitted: Path, unit: str) -> Iterator[tuple[str, Path]]:
    """Yield each student's name and the folder or archive that was handed in for a unit, in order."""
    for home in sorted(submitted.iterdir()) if submitted.is_dir() else []:
        places = [home / unit, *(home / f"{unit}{suffix}" for suffix in ARCHIVES)]
        place = next((place for place in places if place.is_symlink() or place.exists()), None)
        if place is not None and not home.name.startswith("."):
            yield home.name, place


def read(place: Path, unit: str) -> Submission:
    """Read a submission.

    Raises:
        UnusableError: if there is no notebook in it that can be read.
    """
    if place.is_symlink() or place.parent.is_symlink():
        raise UnusableError(f"{place.name} is a symbolic link, which is not followed")
    notes: list[str] = []
    files = _read_folder(place, notes) if place.is_dir() else {place.name: _content(place)}
    files = _unpacked(files, unit, notes)
    name = _choose_notebook(files, unit, notes)
    content = files.pop(name)
    notebook = _parse(content, name)
    others = {path: other for path, other in files.items() if not path.endswith(".ipynb")}
    total = sum(map(len, others.values()))
    if total > FILES_BYTES:
        notes.append(f"{total / 2**20:.0f} MiB of other files were left out")
        others = {path: other for path, other in others.items() if path == TIMESTAMP}
    digest = hashlib.sha256(content)
    for path, other in sorted(others.items()):
        digest.update(path.encode() + other)
    return Submission(notebook, others, notes, digest.hexdigest())


def _content(path: Path) -> bytes:
    size = path.stat().st_size
    if size > NOTEBOOK_BYTES:
        raise UnusableError(f"{path.name} has {size / 2**20:.0f} MiB: more than {NOTEBOOK_BYTES // 2**20} are not read")
    try:
        return path.read_bytes()
    except OSError as error:
        raise UnusableError(f"{path.name} cannot be read ({error.strerror})") from error


def _read_folder(folder: Path, notes: list[str]) -> dict[str, bytes]:
    """Return the regular files below a folder, by path; nothing else is opened, for a pipe would never end."""
    files, read_bytes = {}, 0
    for path in sorted(folder.rglob("*")):
        mode, name = path.lstat().st_mode, path.relative_to(folder).as_posix()
        if any(part.startswith(".ipynb_checkpoints") or part == "__MACOSX" for part in path.parts):
            continue
        if stat.S_ISREG(mode):
            if read_bytes + path.stat().st_size > NOTEBOOK_BYTES and not name.endswith(".ipynb"):
                notes.append(f"{name} was left out: the submission is too large")
                continue
            files[name] = _content(path)
            read_bytes += len(files[name])
        elif not stat.S_ISDIR(mode):
            notes.append(f"{name} is a {'symbolic link' if stat.S_ISLNK(mode) else 'special file'}, and was left out")
    return files


def _unpacked(files: dict[str, bytes], unit: str, notes: list[str]) -> dict[str, bytes]:
    """Return the files with those of an archive, if the notebook can only be in there."""
    archives = [name for name in files if name.lower().endswith(ARCHIVES)]
    if any(name.endswith(".ipynb") for name in files) or len(archives) != 1:
        return files
    (name,) = archives
    notes.append(f"the notebook was taken from {name}")
    try:
        inside = dict(_zip_members(files[name]) if name.lower().endswith(".zip") else _tar_members(files[name]))
    except (zipfile.BadZipFile, tarfile.TarError, OSError, RuntimeError, EOFError, NotImplementedError) as error:
        raise UnusableError(f"{name} cannot be unpacked ({error})") from error
    return {path: content for path, content in files.items() if path != name} | inside


def _zip_members(content: bytes) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = [member for member in archive.infolist() if not member.is_dir()]
        _refuse_bombs(sum(member.file_size for member in members))
        for member in members:
            if _plain(member.filename):
                with archive.open(member) as stream:
                    yield member.filename, stream.read(member.file_size + 1)[: member.file_size]


def _tar_members(content: bytes) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        total = 0
        for member in archive:
            total += member.size
            _refuse_bombs(total)
            if member.isfile() and _plain(member.name):
                yield member.name.removeprefix("./"), archive.extractfile(member).read()


def _refuse_bombs(size: int) -> None:
    if size > NOTEBOOK_BYTES:
        raise UnusableError(f"the archive holds {size / 2**20:.0f} MiB: more than {NOTEBOOK_BYTES // 2**20} are not read")


def _plain(name: str) -> bool:
    """Whether a member's path stays below the folder, and is no system's rubbish."""
    path = PurePosixPath(name)
    hidden = any(part.startswith("._") or part in ("__MACOSX", ".ipynb_checkpoints") for part in path.parts)
    return not path.is_absolute() and ".." not in path.parts and not hidden


def _choose_notebook(files: dict[str, bytes], unit: str, notes: list[str]) -> str:
    notebooks = [name for name in files if name.endswith(".ipynb")]
    named = [name for name in notebooks if PurePosixPath(name).name == f"{unit}.ipynb"]
    chosen = min(named or notebooks, key=lambda name: (name.count("/"), name), default=None)
    if chosen is None:
        raise UnusableError(f"there is no notebook in it; expected {unit}.ipynb")
    if not named and len(notebooks) > 1:
        raise UnusableError(f"there is no {unit}.ipynb in it, and which of these is meant is not clear: {', '.join(notebooks)}")
    if chosen != f"{unit}.ipynb":
        notes.append(f"the notebook was called {chosen}")
    return chosen


def _parse(content: bytes, name: str) -> NotebookNode:
    if not content.strip():
        raise UnusableError(f"{name} is empty")
    try:
        text = content.decode("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise UnusableError(f"{name} is not UTF-8 text (byte {error.start:,} is not)") from error
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UnusableError(f"{name} is not JSON, so no notebook: was it cut off, or edited by hand? ({error})") from error
    try:
        notebook = nbformat.convert(nbformat.from_dict(parsed), 4)
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.outputs, cell.execution_count = [], None
    except Exception as error:  # any structure may stand there
        raise UnusableError(f"{name} is JSON, but no Jupyter notebook ({type(error).__name__})") from error
    return notebook
