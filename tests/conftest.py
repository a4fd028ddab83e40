import os
import sys
from pathlib import Path

import pytest
import torch

# Tests must say the same with and without a network, and must not wait for one.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# nbgrader starts `alembic` by name, so it must be found even where the virtual environment is not activated.
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


@pytest.fixture(scope="session")
def smollm2():
    from peftlab.pretrained import load_smollm2

    return load_smollm2()


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
