"""What was measured on GPUs and ships with the course, apart from the rows that were measured on CPUs.

`measured/gpu/NAME OF THE GPU/` holds one JSON file for each check of `autograder.measuring.gpu`, and for each unit whose master
has run there a folder of results rows.
"""

import json
import re
from pathlib import Path

from peftlab import results
from peftlab.results import Row

SHIPPED = results.SHIPPED / "gpu"


def file_name(name: str) -> str:
    """Return a name for a file or a folder: its letters and digits, joined by underscores."""
    return re.sub(r"[^A-Za-z0-9]+", "_", name).strip("_")


def folder(hardware: str) -> Path:
    """Return where the course keeps what was measured on a GPU of this name."""
    return SHIPPED / file_name(hardware)


def proofs(check: str, shipped: Path = SHIPPED) -> dict[str, dict]:
    """Return what a check found, by the GPU's name, for each GPU that has passed it; an empty dict if there is none.

    The check's row has the hardware's name, versions and limits as well; what it *found* is returned here.
    """
    rows = [json.loads(path.read_text()) for path in sorted(shipped.glob(f"*/{file_name(check)}.json"))]
    return {row["hardware"]: row["found"] for row in rows if row["ok"]}


def rows(unit: str | None = None, shipped: Path = SHIPPED) -> list[Row]:
    """Return the results rows of a unit whose master has run on GPUs, by default of all; an empty list if there are none."""
    folders = sorted(folder for folder in shipped.glob("*/*/") if unit in (None, folder.name))
    return [row for folder in folders for row in results.load(folder.name, folder.parent)]
