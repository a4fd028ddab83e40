"""What happens to right notebooks on their way: to their cells, metadata, text, outputs, encoding and files.

Each damage is a function of a `Damaged`, which it changes at random places. Answers stay where a reader would find them, except
where a damage says that it took one away.
"""

import ast
import copy
import gzip
import io
import json
import tarfile
import unicodedata
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from random import Random

import nbformat

from autograder.building.build import COURSE
from autograder.checking.masters import solution_cells, without_markers
from autograder.grading import sanitize

WRITTEN = "The activations stay: ½ of the step, as measured. Voilà."
Cell = dict[str, object]


class Unit:
    """What a unit's students received, and the right answers to it.

    Attributes:
        frame: the cells that nbgrader records.
        answers: the source of each answer in code, by its cell's id.
        names: what each of them defines.
        question: the id of the written answer's cell.
        answered: the notebook's JSON, with all answers in it.
    """

    def __init__(self, name: str):
        self.name = name
        self.released = nbformat.read(COURSE / name / f"{name}.ipynb", as_version=4)
        self.frame = [cell for cell in self.released.cells if "nbgrader" in cell.metadata]
        self.answers = {cell["id"]: without_markers(cell.source) for cell in solution_cells(sanitize._master(name))}
        self.names = {cell: sanitize.defined(source) for cell, source in self.answers.items()}
        (self.question,) = [cell["id"] for cell in self.frame if cell.cell_type == "markdown"]
        answered = copy.deepcopy(self.released)
        for cell in answered.cells:
            cell.source = {self.question: WRITTEN, **self.answers}.get(cell["id"], cell.source)
        self.answered = json.dumps(answered)


unit_of = cache(Unit)


@dataclass
class Damaged:
    """A right notebook in the course of being damaged.

    Attributes:
        done: the names of what was done to it.
        lost: ids of the cells whose answers were taken out.
        may_be_refused: whether it may be what nobody can read any more.
        files: what is handed in, by path, once it has been written.
    """

    unit: Unit
    chance: Random
    notebook: dict = field(default_factory=dict)
    done: list[str] = field(default_factory=list)
    lost: set[str] = field(default_factory=set)
    may_be_refused: bool = False
    files: dict[str, bytes] = field(default_factory=dict)

    @property
    def cells(self) -> list[Cell]:
        return self.notebook["cells"]

    def place(self) -> int:
        """Return a random cell's place: every second time, of one that nbgrader knows."""
        known = [place for place, cell in enumerate(self.cells) if "nbgrader" in metadata_of(cell)]
        return self.chance.choice(known if known and self.chance.random() < 0.5 else range(len(self.cells)))

    def cell(self) -> Cell:
        return self.cells[self.place()]

    def some_cells(self) -> list[Cell]:
        """Return one cell, some, or all."""
        share = self.chance.choice([0.0, 0.3, 1.0])
        return [cell for cell in self.cells if self.chance.random() < share] or [self.cell()]


def damaged(unit: str, chance: Random) -> Damaged:
    """Return a right notebook with one to four things done to it, as files."""
    made = Damaged(unit_of(unit), chance)
    made.notebook = json.loads(made.unit.answered)
    for damages, most in ((OF_CELLS, 2), (OF_METADATA, 2), (OF_TEXT, 2), (OF_FORMATS, 1)):
        for damage in chance.sample(damages, chance.randint(0, most)):
            made.done.append(damage.__name__)
            damage(made)
    write = chance.choice([in_utf_8, in_utf_8, *OF_BYTES])
    pack = chance.choice([as_it_is, as_it_is, *OF_FILES])
    made.done += [write.__name__, pack.__name__]
    pack(made, write(made))
    return made


def metadata_of(cell: Cell) -> dict:
    return cell["metadata"] if isinstance(cell["metadata"], dict) else {}


def tags_of(cell: Cell) -> list:
    return metadata_of(cell).get("tags") or []


def defined_in(cell: Cell) -> set[str]:
    return sanitize.defined("".join(cell["source"]))


# ---- Cells ----


def delete_a_cell(made: Damaged) -> None:
    cell = made.cells.pop(made.place())
    text = "".join(cell["source"])
    made.lost |= {name for name, wanted in made.unit.names.items() if wanted & defined_in(cell)}
    made.lost |= {made.unit.question} if WRITTEN in text else set()
    if not made.cells:
        made.cells.append(cell)


def copy_a_cell(made: Damaged) -> None:
    cell = copy.deepcopy(made.cell())
    forget(made, cell)
    made.cells.insert(made.chance.randint(0, len(made.cells)), cell)


def put_a_stub_in(made: Damaged) -> None:
    """A student who kept the stub for later."""
    stubs = [cell for cell in made.unit.frame if not cell.metadata.nbgrader.locked]
    stub = json.loads(json.dumps(made.chance.choice(stubs)))
    forget(made, stub)
    made.cells.insert(made.chance.randint(0, len(made.cells)), stub)


def leave_the_stub_and_answer_elsewhere(made: Damaged) -> None:
    """The answer stands in a cell of its own, above its stub or below it."""
    stub = made.chance.choice([cell for cell in made.unit.frame if not cell.metadata.nbgrader.locked])
    place = next((n for n, cell in enumerate(made.cells) if cell.get("id") == stub["id"]), None)
    if place is None:
        return
    answer, made.cells[place] = made.cells[place], json.loads(json.dumps(stub))
    made.cells.insert(
        place + made.chance.choice([0, 1]), {**answer, "cell_type": stub["cell_type"], "id": "mine", "metadata": {}}
    )


def move_a_cell(made: Damaged) -> None:
    cell = made.cells.pop(made.place())
    made.cells.insert(made.chance.randint(0, len(made.cells)), cell)


def shuffle_what_nbgrader_knows(made: Damaged) -> None:
    known = [place for place, cell in enumerate(made.cells) if "nbgrader" in metadata_of(cell)]
    cells = [made.cells[place] for place in known]
    made.chance.shuffle(cells)
    for place, cell in zip(known, cells, strict=True):
        made.cells[place] = cell


def split_a_cell(made: Damaged) -> None:
    """As people do: between two definitions. Text is split anywhere."""
    place = made.place()
    cell = made.cells[place]
    lines = "".join(cell["source"]).splitlines(keepends=True)
    ends = range(len(lines) + 1)
    if cell["cell_type"] == "code":
        try:
            ends = [statement.end_lineno for statement in ast.parse("".join(lines)).body]
        except (SyntaxError, ValueError):
            return
    if not ends:
        return
    end = made.chance.choice(list(ends))
    second = copy.deepcopy(cell) | {"source": "".join(lines[end:])}
    cell["source"] = "".join(lines[:end])
    forget(made, second)
    made.cells.insert(place + 1, second)


def merge_two_cells(made: Damaged) -> None:
    """Two neighbours of one kind become one, with the id and the metadata of either."""
    pairs = [n for n in range(len(made.cells) - 1) if made.cells[n]["cell_type"] == made.cells[n + 1]["cell_type"]]
    pairs = [n for n in pairs if not {*tags_of(made.cells[n]), *tags_of(made.cells[n + 1])}]
    pairs = [n for n in pairs if not defined_in(made.cells[n]) & defined_in(made.cells[n + 1])]  # a stub over its answer
    if pairs:
        place = made.chance.choice(pairs)
        upper, lower = made.cells[place], made.cells.pop(place + 1)
        text = "".join(upper["source"]) + made.chance.choice(["\n", "\n\n"]) + "".join(lower["source"])
        made.cells[place] = made.chance.choice([upper, lower]) | {"source": text}


def merge_an_answer_and_its_check(made: Damaged) -> None:
    """The text between them moves up first."""
    places = [n for n, cell in enumerate(made.cells) if cell.get("id") in made.unit.answers]
    if not places:
        return
    place = made.chance.choice(places)
    below = next((n for n in range(place + 1, len(made.cells)) if made.cells[n]["cell_type"] == "code"), None)
    if below is None or tags_of(made.cells[below]):
        return
    upper, lower = made.cells[place], made.cells[below]
    text = "".join(upper["source"]) + "\n\n" + "".join(lower["source"])
    made.cells[below] = made.chance.choice([upper, lower]) | {"source": text}
    del made.cells[place]


def retype_a_cell(made: Damaged) -> None:
    cell = made.cell()
    if cell.get("id") == "mine":  # beside its stub, it would have to be taken for code
        return
    cell["cell_type"] = made.chance.choice(["raw", "markdown", "code", "poem"])


def add_own_cells(made: Damaged) -> None:
    """What students add: notes, trials, Colab's leftovers, nothing."""
    for _ in range(made.chance.randint(1, 5)):
        text = made.chance.choice(
            ["", "x = 1", "%matplotlib inline", "# to do", "## Notes\n\nRank 8 is enough.", "print('½')", "def ("]
        )
        kind = made.chance.choice(["code", "markdown", "raw"])
        cell = {"cell_type": kind, "metadata": {}, "source": text} | ({"outputs": []} if kind == "code" else {})
        made.cells.insert(made.chance.randint(0, len(made.cells)), cell)


# ---- Ids and metadata ----


def forget(made: Damaged, cell: Cell) -> None:
    """Take a cell's id, its metadata, both or neither, as programs do that copy cells."""
    if made.chance.random() < 0.5:
        cell["id"] = f"{made.chance.getrandbits(32):08x}"
    if made.chance.random() < 0.5:
        cell["metadata"] = {}


def lose_ids(made: Damaged) -> None:
    for cell in made.some_cells():
        cell.pop("id", None)


def lose_ids_and_metadata(made: Damaged) -> None:
    """All that is left is text."""
    for cell in made.some_cells():
        cell.pop("id", None)
        cell["metadata"] = {}


def double_an_id(made: Damaged) -> None:
    """Two cells with one id, one of which may have lost its metadata."""
    cell, other = made.cell(), made.cell()
    other["id"] = cell.get("id")
    if made.chance.random() < 0.5:
        other["metadata"] = {}


def move_ids_to_the_metadata(made: Damaged) -> None:
    """As Colab does."""
    for cell in made.cells:
        cell["metadata"] = {"id": cell.pop("id", None), "colab": {"base_uri": "https://localhost"}}


def lose_nbgraders_metadata(made: Damaged) -> None:
    for cell in made.some_cells():
        metadata_of(cell).pop("nbgrader", None)


def write_anything_into_metadata(made: Damaged) -> None:
    for cell in made.some_cells():
        key = made.chance.choice(["nbgrader", "tags", "id", "", None])
        if key is None or not isinstance(cell["metadata"], dict):
            cell["metadata"] = anything(made.chance)
        else:
            cell["metadata"][key] = anything(made.chance)


def write_anything_into_nbgraders_metadata(made: Damaged) -> None:
    for cell in made.some_cells():
        marks = metadata_of(cell).get("nbgrader")
        if isinstance(marks, dict) and marks:
            marks[made.chance.choice(list(marks))] = anything(made.chance)


# ---- Text and outputs ----


def end_lines_otherwise(made: Damaged) -> None:
    end = made.chance.choice(["\r\n", "\r"])
    _rewrite(made, lambda text: text.replace("\n", end))


def put_a_mark_before_text(made: Damaged) -> None:
    mark = made.chance.choice(["\ufeff", "\0", "\n\n", "\ufeff\0"])
    _rewrite(made, lambda text: mark + text)


def put_blanks_behind_lines(made: Damaged) -> None:
    blanks = made.chance.choice([" ", "\t", "   "])
    _rewrite(made, lambda text: "\n".join(line + blanks for line in text.split("\n")) + made.chance.choice(["", "\n\n"]))


def cut_an_emoji(made: Damaged) -> None:
    _rewrite(made, lambda text: text + "\n# \ud83d")


def spell_otherwise(made: Damaged) -> None:
    """As a Mac writes accents, or as others do."""
    form = made.chance.choice(["NFC", "NFD"])
    _rewrite(made, lambda text: unicodedata.normalize(form, text))


def write_lines_as_a_list(made: Damaged) -> None:
    for cell in made.some_cells():
        cell["source"] = "".join(cell["source"]).splitlines(keepends=True)


def write_anything_into_outputs(made: Damaged) -> None:
    for cell in made.some_cells():
        for key in ("outputs", "execution_count", "attachments"):
            cell[key] = anything(made.chance)


def _rewrite(made: Damaged, change: Callable[[str], str]) -> None:
    for cell in made.some_cells():
        cell["source"] = change("".join(cell["source"]))


LEAVES = [None, True, 0, -1, 1e300, float("nan"), "", "x", "\ud83d", "\0", "½", "merge", [], {}, "a" * 300]


def anything(chance: Random, depth: int = 4) -> object:
    """Return any JSON."""
    kind = chance.random() if depth else 1.0
    if kind < 0.2:
        return [anything(chance, depth - 1) for _ in range(chance.randint(0, 4))]
    if kind < 0.5:
        keys = ("nbgrader", "tags", "grade_id", "locked", "points", "data", "text/plain", "output_type", "id", "½")
        return {chance.choice(keys): anything(chance, depth - 1) for _ in range(chance.randint(0, 4))}
    return chance.choice(LEAVES)


# ---- The notebook's form, its bytes, and the files ----


def lower_the_format(made: Damaged) -> None:
    """Cells of nbformat 4.4 and before have no ids."""
    made.notebook["nbformat_minor"] = made.chance.randint(0, 4)
    for cell in made.cells:
        cell.pop("id", None)


def go_back_to_nbformat_3(made: Damaged) -> None:
    for cell in made.cells:
        if cell["cell_type"] == "code":
            cell["input"] = cell.pop("source")
        cell.pop("id", None)
    made.notebook = {"nbformat": 3, "nbformat_minor": 0, "metadata": {"name": ""}, "worksheets": [{"cells": made.cells}]}


def write_anything_beside_the_cells(made: Damaged) -> None:
    for key in made.chance.sample(["metadata", "nbformat", "nbformat_minor", "orig_nbformat", "kernel"], 2):
        made.notebook[key] = anything(made.chance)


def in_utf_8(made: Damaged) -> bytes:
    return json.dumps(made.notebook, ensure_ascii=made.chance.random() < 0.5).encode("utf-8", "surrogatepass")


def in_another_encoding(made: Damaged) -> bytes:
    encoding = made.chance.choice(["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
    return json.dumps(made.notebook, ensure_ascii=False).encode(encoding, "surrogatepass")


def in_latin_1(made: Damaged) -> bytes:
    made.may_be_refused = True
    return json.dumps(made.notebook, ensure_ascii=False).encode("latin-1", "backslashreplace")


def indented_and_with_lines_around(made: Damaged) -> bytes:
    text = json.dumps(made.notebook, indent=made.chance.choice([1, "\t"]))
    return ("\n\n" + text.replace("\n", "\r\n") + "\n \n").encode()


def cut_off(made: Damaged) -> bytes:
    made.may_be_refused = True
    content = in_utf_8(made)
    return content[: made.chance.randint(0, len(content))]


def as_it_is(made: Damaged, content: bytes) -> None:
    made.files = {f"{made.unit.name}.ipynb": content}


def under_another_name(made: Damaged, content: bytes) -> None:
    name = made.unit.name
    names = [
        f"{name} (1).ipynb",
        f"Copy of {name}.ipynb",
        f"{name}.IPYNB",
        f"{name}.ipynb.txt",
        f"{name}.ipynb.json",
        "работа.ipynb",
    ]
    names += [
        f"{name}.json",
        name,
        "é" * 90 + ".ipynb",
        "a\nb.ipynb",
        "[abc]*?.ipynb",
        "-rf.ipynb",
        f"{name}.ipynb/{name}.ipynb",
    ]
    made.files = {made.chance.choice(names): content}


def in_folders(made: Damaged, content: bytes) -> None:
    folders = made.chance.choice(["hand in", "a/b/c", "my.ipynb", f"{made.unit.name}.ipynb", "__pycache__", "ü" * 20])
    made.files = {f"{folders}/{made.unit.name}.ipynb": content}


def beside_other_files(made: Damaged, content: bytes) -> None:
    as_it_is(made, content)
    others = [
        "helpers.py",
        "data/a.csv",
        "__MACOSX/._a.ipynb",
        ".ipynb_checkpoints/a-checkpoint.ipynb",
        "timestamp.txt",
        "ü.txt",
    ]
    others += ["a.ipynb/x", "results/row.json", "homework.zip", "model.safetensors"]
    for name in made.chance.sample(others, 3):
        made.files[name] = made.chance.randbytes(made.chance.randint(0, 50))


def beside_the_untouched_release(made: Damaged, content: bytes) -> None:
    names = ["final.ipynb", f"{made.unit.name}.ipynb"]
    made.chance.shuffle(names)
    made.files = {names[0]: content, names[1]: nbformat.writes(made.unit.released).encode()}


def in_an_archive(made: Damaged, content: bytes) -> None:
    files = {made.chance.choice(["", "hand in/", "./", "a\\"]) + f"{made.unit.name}.ipynb": content}
    if made.chance.random() < 0.5:
        files |= {"__MACOSX/._x": b"\0", "../outside.txt": b"x", "helpers.py": b"x = 1"}
    packs = {".zip": _zipped, ".tar": _tarred, ".tar.gz": _compressed, ".tgz": _compressed}
    depth = made.chance.choice([1, 1, 1, 2, 3])
    made.may_be_refused |= depth == 3
    for _ in range(depth):
        ending = made.chance.choice(list(packs))
        files = {f"homework{ending}": packs[ending](files)}
    made.files = files


def _zipped(files: dict[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for path, content in files.items():
            archive.writestr(path, content)
    return packed.getvalue()


def _tarred(files: dict[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for path, content in files.items():
            member = tarfile.TarInfo(path.replace("\\", "/"))
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return packed.getvalue()


def _compressed(files: dict[str, bytes]) -> bytes:
    return gzip.compress(_tarred(files))


OF_CELLS = [
    delete_a_cell,
    copy_a_cell,
    put_a_stub_in,
    leave_the_stub_and_answer_elsewhere,
    move_a_cell,
    shuffle_what_nbgrader_knows,
    split_a_cell,
    merge_two_cells,
    merge_an_answer_and_its_check,
    retype_a_cell,
    add_own_cells,
]
OF_METADATA = [
    lose_ids,
    lose_ids_and_metadata,
    double_an_id,
    move_ids_to_the_metadata,
    lose_nbgraders_metadata,
    write_anything_into_metadata,
    write_anything_into_nbgraders_metadata,
]
OF_TEXT = [
    end_lines_otherwise,
    put_a_mark_before_text,
    put_blanks_behind_lines,
    cut_an_emoji,
    spell_otherwise,
    write_lines_as_a_list,
    write_anything_into_outputs,
]
OF_FORMATS = [lower_the_format, go_back_to_nbformat_3, write_anything_beside_the_cells]
OF_BYTES = [in_another_encoding, in_latin_1, indented_and_with_lines_around, cut_off]
OF_FILES = [under_another_name, in_folders, beside_other_files, beside_the_untouched_release, in_an_archive]
