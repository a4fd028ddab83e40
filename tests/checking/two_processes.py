"""A second process that holds the student's answers: only source, tensors and text cross over, as in real grading."""

import ast

from autograder.sandbox.calls import Answer, Calls
from autograder.sandbox.process import SandboxProcess

SETUP = """
import math, sys
from collections.abc import Callable, Sequence
from pathlib import Path
import torch
import torch.nn.functional as F
from torch import Tensor, nn
sys.modules["autograder"] = None  # a driver that needed it would fail here
"""


class OtherProcess:
    """The process, and proxies for what one student's source after the other defines in it; it is no sandbox."""

    def __init__(self):
        self.sandbox = SandboxProcess([SETUP], ["torch._dynamo"], in_sandbox=False)
        self.calls: Calls | None = None

    def define(self, source: str) -> None:
        source = "from __future__ import annotations\n" + source
        cell = {"source": source, "needed": list(range(len(ast.parse(source).body)))}
        self.calls = Calls(self.running, [cell])

    def running(self) -> SandboxProcess:
        if not self.sandbox.running:
            self.sandbox.start()
        return self.sandbox

    def answer(self, name: str) -> Answer:
        return Answer(name, self.calls)

    def close(self) -> None:
        self.sandbox.close()
