"""All exercises of the course, by the name of their check, and the unit of each."""

import importlib
import pkgutil

import autograder.checks
from autograder.checking.masters import exercises_of, units

EXERCISES = {
    name: exercise
    for module in pkgutil.iter_modules(autograder.checks.__path__)
    for name, exercise in importlib.import_module(f"autograder.checks.{module.name}").EXERCISES.items()
}
UNIT_OF = {name: unit for unit in units() for name in EXERCISES if EXERCISES[name] in exercises_of(unit)}
