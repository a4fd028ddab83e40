"""Run the masters from top to bottom.

    python -m autograder.building.run_masters            at full length; the results rows go into the course
    python -m autograder.building.run_masters 08_lora    the same for one unit

On a GPU the rows go to `peftlab/measured/gpu/NAME OF THE GPU`, and those from a CPU, which the text describes, stay. The tests
use `run` with the experiments cut short (`PEFTLAB_SHORT`, see `peftlab.settings`).
"""

import os
import shutil
import sys
import tempfile
from pathlib import Path

from nbclient import NotebookClient
from nbformat import NotebookNode

from autograder.building.build import instructor_notebook
from autograder.checking.masters import units
from peftlab import gpu
from peftlab.results import SHIPPED, describe_hardware
from peftlab.training import find_device


def run(notebook: NotebookNode, folder: Path, *, short: bool) -> NotebookNode:
    """Execute a notebook in `folder`, its results rows going to `folder/results`; return it with its outputs.

    Raises:
        nbclient.exceptions.CellExecutionError: if a cell fails.
        nbclient.exceptions.CellTimeoutError: if a cell takes an hour, or ten minutes in a short run.
    """
    settings = {"PEFTLAB_SHORT": "1" if short else "0", "PEFTLAB_RESULTS": str(folder / "results")}
    timeout = 600 if short else 3600
    client = NotebookClient(notebook, timeout=timeout, kernel_name="python3", resources={"metadata": {"path": str(folder)}})
    return client.execute(env={**os.environ, **settings})


def main(names: list[str]) -> int:
    """Run the masters of the named units, or of all, at full length, and replace the rows that the course ships."""
    shipped = SHIPPED if find_device().type == "cpu" else gpu.folder(describe_hardware())
    for unit in names or units():
        with tempfile.TemporaryDirectory() as folder:
            print(f"{unit}: running", flush=True)
            run(instructor_notebook(unit), Path(folder), short=False)
            rows = Path(folder) / "results" / unit
            if rows.is_dir():
                shutil.rmtree(shipped / unit, ignore_errors=True)
                shutil.copytree(rows, shipped / unit)
                print(f"{unit}: {len(list(rows.glob('*.json')))} rows in {shipped / unit}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
