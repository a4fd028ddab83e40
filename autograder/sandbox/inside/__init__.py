"""Stands in for the package `autograder` inside the sandbox, where the real one is not to be seen.

The checks that a notebook imports are there and do nothing: what counts is checked outside.
"""

import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def checked_outside(*answers: object, **options: object) -> None:
    """Stand where a check is called."""


class _Module(ModuleType):
    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return checked_outside


class _Finder(MetaPathFinder, Loader):
    """Finds every submodule of `autograder`, as a module in which every name is `checked_outside`."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        return ModuleSpec(fullname, self, is_package=True) if fullname.startswith("autograder.") else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


sys.meta_path.insert(0, _Finder())
