import gc
import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

# Tests must say the same with and without a network, and must not wait for one.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# nbgrader starts `alembic` by name, so it must be found even where the virtual environment is not activated.
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

# With `pytest -n`, the workers share the processors: more threads than cores wait for each other.
THREADS = max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
torch.set_num_threads(THREADS)
os.environ["OMP_NUM_THREADS"] = str(THREADS)

# The same examples in every run, unless `FUZZ` asks for more of them. A failure is told as it was found: to make it smaller
# takes minutes.
settings.register_profile(
    "course",
    deadline=None,
    database=None,
    derandomize="FUZZ" not in os.environ,
    phases=[Phase.generate],
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)
settings.load_profile("course")


def pytest_collection_finish(session):
    """Leave what is in memory by now to itself: checks of memory collect garbage, and would look at all of it each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def smollm2():
    from peftlab.pretrained import load_smollm2

    return load_smollm2()


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
