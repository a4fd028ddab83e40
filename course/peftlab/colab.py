"""What differs on Colab and Kaggle: what there is, and what is lost when the session ends."""

import os
import sys
from pathlib import Path

DRIVE = Path("/content/drive")
RESULTS = "MyDrive/peft-from-scratch/results"


def on_kaggle() -> bool:
    """Whether this notebook runs on Kaggle."""
    return "KAGGLE_KERNEL_RUN_TYPE" in os.environ


def on_colab() -> bool:
    """Whether this notebook runs on Colab. Kaggle's image is made from Colab's, so Colab's module says nothing there."""
    return "google.colab" in sys.modules and not on_kaggle()


def prepare() -> None:
    """On Colab and Kaggle, say what the notebook runs on and where its results go; elsewhere, do nothing."""
    if not (on_colab() or on_kaggle()):
        return
    from peftlab.results import describe_hardware, results_folder

    keep = "`colab.keep_on_drive()` keeps them" if on_colab() else "saving a version of the notebook keeps them as its output"
    print(f"This runs on: {describe_hardware()}.")
    print(f"Results go to {results_folder().absolute()}, and end with the session: {keep}.")


def keep_on_drive() -> Path:
    """Connect Google Drive, which asks for your consent, and keep results there from now on; return the folder.

    Raises:
        RuntimeError: if this is not Colab.
    """
    if on_kaggle():
        raise RuntimeError("this is Kaggle, not Colab: results lie below /kaggle/working, and saving a version keeps them")
    if not on_colab():
        raise RuntimeError("this is not Colab: results lie in the folder `results` beside the notebook, and stay")
    from google.colab import drive

    drive.mount(str(DRIVE))
    folder = DRIVE / RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["PEFTLAB_RESULTS"] = str(folder)
    return folder
