"""The house: who may import whom, and how much a room or a file may hold."""

import ast
from collections import defaultdict
from pathlib import Path

import pytest

import autograder
import peftlab
from autograder.checking.masters import units

HOUSE = Path(autograder.__file__).parent
FLOORS = ("checking", "checks", "building", "sandbox", "grading", "measuring", "proving")
"""A room imports from itself and from those before it."""
ROOM_MODULES = 12
CHECK_LINES = 400
STAND_IN = HOUSE / "sandbox" / "inside"
MODULES = {
    ".".join(path.relative_to(HOUSE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in HOUSE.rglob("*.py")
    if STAND_IN not in path.parents
}


def imports(path: Path, at_once: bool = False) -> set[str]:
    """Return the modules of the house that a file imports; with `at_once`, when it is imported itself."""
    tree, found = ast.parse(path.read_text()), set()
    for node in tree.body if at_once else ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("autograder"):
            found |= {name if (name := f"{node.module}.{part.name}") in MODULES else node.module for part in node.names}
        elif isinstance(node, ast.Import):
            found |= {part.name for part in node.names if part.name in MODULES}
    return found


def test_no_import_runs_back_up():
    for path in MODULES.values():
        own, *below = path.relative_to(HOUSE).parts
        if not below:
            continue
        rooms = {module.split(".")[1] for module in imports(path) if "." in module}
        assert all(FLOORS.index(room) <= FLOORS.index(own) for room in rooms), f"{path} imports from {sorted(rooms)}"


def refuse_circles(ahead: dict[str, set[str]]) -> None:
    """Fail if modules import each other, given what each imports."""
    while ahead:
        free = [module for module, wanted in ahead.items() if not (wanted - {module}) & ahead.keys()]
        assert free, f"these import each other: {sorted(ahead)}"
        ahead = {module: wanted for module, wanted in ahead.items() if module not in free}


def test_no_modules_import_each_other():
    refuse_circles({module: imports(path, at_once=True) for module, path in MODULES.items()})


def test_no_modules_of_the_lab_bench_import_each_other_even_later():
    ahead = {}
    for path in Path(peftlab.__file__).parent.glob("*.py"):
        wanted = ahead.setdefault(path.stem, set())
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == "peftlab":
                wanted |= {part.name for part in node.names}
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("peftlab."):
                wanted.add(node.module.split(".")[1])
    refuse_circles(ahead)


def test_a_room_can_be_taken_in_at_a_glance():
    rooms = defaultdict(list)
    for path in MODULES.values():
        if path.name != "__init__.py" and path.parent.name in FLOORS:
            rooms[path.parent.name].append(path)
    assert all(len(modules) <= ROOM_MODULES for modules in rooms.values()), {room: len(rooms[room]) for room in rooms}
    assert not [path for path in HOUSE.glob("*.py") if path.name != "__init__.py"]


@pytest.mark.parametrize("path", sorted((HOUSE / "checks").glob("*/*.py")), ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_check_is_read_in_one_sitting(path):
    assert len(path.read_text().splitlines()) <= CHECK_LINES


def test_tests_lie_in_the_rooms_of_what_they_test():
    rooms = {path.parent.name for path in Path(__file__).parent.glob("*/test_*.py")}
    assert rooms <= {*FLOORS, "lab_bench", "units"}


def test_every_unit_with_exercises_has_a_package():
    packages = {path.parent.name for path in (HOUSE / "checks").glob("*/__init__.py")}
    assert packages <= {unit.partition("_")[2] for unit in units()}
