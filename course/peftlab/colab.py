"""What differs on Colab: what there is, and what is lost when the runtime ends."""

import os
import sys
from pathlib import Path

DRIVE = Path("/content/drive")
RESULTS = "MyDrive/peft-from-scratch/results"


def on_colab() -> bool:
    """Whether this notebook runs on Colab."""
    return "google.colab" in sys.modules


def prepare() -> None:
    """On Colab, say what the notebook runs on and where its results go; elsewhere, do nothing."""
    if not on_colab():
        return
    from peftlab.results import describe_hardware, results_folder

    print(f"This runs on: {describe_hardware()}.")
    print(f"Results go to {results_folder().absolute()}, and end with the runtime: `colab.keep_on_drive()` keeps them.")


def keep_on_drive() -> Path:
    """Connect Google Drive, which asks for your consent, and keep results there from now on; return the folder.

    Raises:
        RuntimeError: if this is not Colab.
    """
    if not on_colab():
        raise RuntimeError("this is not Colab: results lie in the folder `results` beside the notebook, and stay")
    from google.colab import drive

    drive.mount(str(DRIVE))
    folder = DRIVE / RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["PEFTLAB_RESULTS"] = str(folder)
    return folder
