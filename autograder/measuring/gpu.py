"""Prove on a GPU what the course says of one, in about five minutes.

    python -m autograder.measuring.gpu                     all checks; rows in report/gpu/NAME OF THE GPU/
    python -m autograder.measuring.gpu --ship              the rows go into the course
    python -m autograder.measuring.gpu --only "LLaMA-7B"   one check
    python -m autograder.measuring.gpu --dry               the same checks on the CPU, with tiny shapes

It needs PyTorch, transformers and peft; what needs bitsandbytes, or SmolLM2, is skipped where that is missing. No Jupyter, no
nbgrader, no data. Every check prints a line when it is done and writes a JSON row with the hardware's name; one that fails, or
takes too long, stops no other. The exit status is 1 if one has failed.
"""

import argparse
import contextlib
import gc
import json
import platform
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from autograder.measuring import gpu_bytes, gpu_exact, gpu_speed
from autograder.measuring.machine import Machine, Outcome, SkippedError
from autograder.measuring.pairs import PAIRS
from peftlab.gpu import file_name
from peftlab.gpu import folder as shipped_folder

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "triton")
REPORT = Path("report") / "gpu"
SECONDS = 120
"""After so long a check is stopped, and counts as failed."""


Check = Callable[[Machine], Outcome]


def checks() -> dict[str, Check]:
    """Return the checks by name, the most telling first: time may run out."""
    large = {name: partial(gpu_bytes.check_large, name=name) for name in gpu_bytes.LARGE}
    parity = {f"{name} against the library": partial(gpu_exact.check_parity, name=name) for name in PAIRS}
    return {
        "placement": gpu_exact.check_placement,
        "NF4 against bitsandbytes": gpu_exact.check_nf4,
        "quantizer on both devices": gpu_exact.check_own_quantizer,
        "AdamW8bit against bitsandbytes": gpu_exact.check_adamw8bit,
        **parity,
        "bytes against the tracker": gpu_bytes.check_bytes,
        "bytes against the simulation": gpu_bytes.check_simulation,
        "gradient checkpointing": gpu_exact.check_checkpointing,
        **large,
        "dequantize": gpu_speed.check_dequantize,
        "training steps": gpu_speed.check_steps,
        "mixed prompts": gpu_speed.check_mixed_prompts,
        "SmolLM2": gpu_speed.check_smollm2,
    }


def describe(device: torch.device) -> dict:
    """Return what a row says of the machine: hardware, its capability and bytes, and versions."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    if device.type != "cuda":
        return {"hardware": platform.machine(), "versions": versions}
    card = torch.cuda.get_device_properties(device)
    versions |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    with contextlib.suppress(OSError):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        versions["driver"] = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split("\n")[0].strip()
    capability = f"{card.major}.{card.minor}"
    return {"hardware": card.name, "capability": capability, "bytes": card.total_memory, "versions": versions}


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise `TimeoutError` in the block if it takes longer, on systems that have an alarm."""
    if not hasattr(signal, "SIGALRM"):
        yield
        return

    def stop(*_: object) -> None:
        raise TimeoutError(f"took longer than {seconds:.0f} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run(name: str, check: Check, machine: Machine) -> dict:
    """Make one check; return its row: "ok" is None where it was skipped, and "why" says why or how it failed."""
    row = {"check": name, "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "dry": machine.dry}
    started = time.perf_counter()
    torch.manual_seed(0)
    try:
        with limited(10 * SECONDS if machine.dry else SECONDS):  # two busy cores are no GPU
            outcome = check(machine)
        row |= {"ok": not outcome.broken, "found": outcome.found, "limits": outcome.limits}
    except (SkippedError, ImportError) as reason:
        row |= {"ok": None, "why": str(reason)}
    except Exception as error:
        row |= {"ok": False, "why": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()[-3000:]}
    row["seconds"] = time.perf_counter() - started
    gc.collect()
    if machine.on_cuda:
        torch.cuda.empty_cache()
    return row


def line(row: dict) -> str:
    """Return what is printed of a row: its verdict, and each limited figure with its limit."""
    verdict = {True: "PASS", False: "FAIL", None: "SKIP"}[row["ok"]]
    shown = row.get("why") or ", ".join(
        f"{name} {row['found'][name]:.3g} (at most {most:.3g})" for name, most in row["limits"].items()
    )
    return f"{verdict}  {row['check']} ({row['seconds']:.1f} s): {shown or 'for the record'}"


def main(arguments: list[str] | None = None) -> int:
    """Run the command line described in this module's docstring; return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m autograder.measuring.gpu", description="Prove the course on a GPU.")
    parser.add_argument("--dry", action="store_true", help="on the CPU, with tiny shapes")
    parser.add_argument("--only", nargs="+", metavar="CHECK", help="names of checks (default: all)")
    parser.add_argument("--seconds", type=float, default=480, help="no check begins after so long (default: 480)")
    parser.add_argument("--out", type=Path, help=f"where rows go (default: {REPORT}/NAME OF THE GPU)")
    parser.add_argument("--ship", action="store_true", help="put the rows into the course instead")
    options = parser.parse_args(arguments)
    available = checks()
    if unknown := set(options.only or ()) - set(available):
        parser.error(f"there is no check {', '.join(sorted(unknown))}; there are {', '.join(available)}")
    if not options.dry and not torch.cuda.is_available():
        parser.error("there is no CUDA device here; --dry runs the checks on the CPU, with tiny shapes")
    if options.dry and options.ship:
        parser.error("a dry run's rows mean nothing: they are not shipped")
    machine = Machine(torch.device("cpu") if options.dry else torch.device("cuda", torch.cuda.current_device()), options.dry)
    described = describe(machine.device)
    name = described["hardware"]
    folder = shipped_folder(name) if options.ship else options.out or REPORT / file_name(name)
    folder.mkdir(parents=True, exist_ok=True)
    print(described["hardware"], described["versions"], flush=True)
    begun, failed = time.perf_counter(), []
    for check_name, check in available.items():
        if options.only and check_name not in options.only:
            continue
        if time.perf_counter() - begun > options.seconds:
            print(f"SKIP  {check_name}: the time is up", flush=True)
            continue
        row = run(check_name, check, machine) | described
        print(line(row), flush=True)
        (folder / f"{file_name(check_name)}.json").write_text(json.dumps(row, indent=1) + "\n")
        failed += [check_name] if row["ok"] is False else []
    print(f"rows in {folder}; " + (f"failed: {', '.join(failed)}" if failed else "nothing failed"), flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
