"""The proof on a GPU, tried without one; and the rows from GPUs that ship."""

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

import pytest
import torch

from autograder.building import run_masters
from autograder.checking.masters import code_cells, master_path, units
from autograder.measuring import gpu, gpu_bytes, machine, pairs
from autograder.measuring.machine import Machine, Outcome, SkippedError
from peftlab import comparison, results
from peftlab import gpu as shipped
from peftlab.llama import PRESETS
from peftlab.simulate import simulate_training_step

HERE = Machine(torch.device("cpu"), dry=True)
JUPYTER = ("IPython", "ipykernel", "jupytext", "nbformat", "nbclient", "nbgrader", "ipywidgets")
"""A machine with a GPU and PyTorch has none of these."""
SHIPPED_ROWS = sorted(shipped.SHIPPED.glob("*/*.json"))


WITHOUT_SMOLLM2 = [name for name in gpu.checks() if name != "SmolLM2"]
"""That one is not dry: it takes minutes on a CPU, and its bounds are a GPU's."""


@pytest.mark.slow
def test_a_dry_run_passes_without_jupyter(tmp_path):
    """The whole script, as on a bare machine, with tiny shapes."""
    code = f"import sys, runpy; sys.modules.update(dict.fromkeys({JUPYTER})); sys.argv[0] = 'gpu'; "
    code += "runpy.run_module('autograder.measuring.gpu', run_name='__main__')"
    ended = subprocess.run(
        [sys.executable, "-c", code, "--dry", "--seconds", "1500", "--out", tmp_path, "--only", *WITHOUT_SMOLLM2],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    rows = {row["check"]: row for row in map(json.loads, (path.read_text() for path in tmp_path.glob("*.json")))}
    assert rows.keys() == set(WITHOUT_SMOLLM2)
    assert all(row["ok"] for row in rows.values()), ended.stdout
    assert all(row["dry"] and row["hardware"] and row["versions"]["torch"] for row in rows.values())


def fails(here: Machine) -> Outcome:
    raise ZeroDivisionError("on purpose")


def sleeps(here: Machine) -> Outcome:
    time.sleep(60)
    return Outcome({}, {})


def skips(here: Machine) -> Outcome:
    raise SkippedError("46 GB are needed")


def is_above_its_limit(here: Machine) -> Outcome:
    return Outcome({"bytes": 2, "share": float("nan"), "seconds": 3.0}, {"bytes": 1, "share": 1.0})


def passes(here: Machine) -> Outcome:
    return Outcome({"bytes": 1}, {"bytes": 1})


def test_a_check_that_fails_or_sleeps_stops_no_other(monkeypatch, tmp_path, capsys):
    made = [fails, sleeps, skips, is_above_its_limit, passes]
    monkeypatch.setattr(gpu, "checks", lambda: {check.__name__: check for check in made})
    monkeypatch.setattr(gpu, "SECONDS", 0.02)
    assert gpu.main(["--dry", "--out", str(tmp_path)]) == 1
    said = [line.split()[:2] for line in capsys.readouterr().out.splitlines()[1:-1]]
    assert said == [list(pair) for pair in zip(["FAIL", "FAIL", "SKIP", "FAIL", "PASS"], [check.__name__ for check in made])]
    rows = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert "on purpose" in rows["fails"]["why"] and "longer" in rows["sleeps"]["why"] and "46 GB" in rows["skips"]["why"]
    assert Outcome(**{key: rows["is_above_its_limit"][key] for key in ("found", "limits")}).broken == ["bytes", "share"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--only", "nothing"], "there is no check nothing"), (["--dry", "--ship"], "not shipped"), ([], "no CUDA device")],
)
def test_what_cannot_be_done_is_said(arguments, said, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu.main(arguments)
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("name", pairs.PAIRS)
def test_a_pair_that_is_not_alike_is_told(name, monkeypatch):
    """Ours with a rate a tenth higher than the library's: more than rounding explains."""
    from autograder.measuring import gpu_exact

    honest = pairs.Pair.our_losses
    monkeypatch.setattr(pairs.Pair, "our_losses", lambda pair, learning_rate=1.1e-2: honest(pair, learning_rate))
    assert gpu_exact.check_parity(HERE, name).broken


def test_more_bytes_than_on_the_cpu_are_told(monkeypatch):
    honest = gpu_bytes.as_on
    monkeypatch.setattr(gpu_bytes, "as_on", lambda *given: gpu_bytes.replace(honest(*given), gradients=0))
    assert gpu_bytes.check_bytes(HERE).broken == ["gradients"]


@pytest.mark.parametrize("path", SHIPPED_ROWS, ids=lambda path: f"{path.parent.name} {path.stem}")
def test_a_shipped_row_names_its_hardware_and_passed(path):
    row = json.loads(path.read_text())
    assert path == shipped.folder(row["hardware"]) / f"{shipped.file_name(row['check'])}.json"
    assert row["ok"] and not row["dry"] and not Outcome(row["found"], row["limits"]).broken
    assert row["capability"] and row["bytes"] and {"torch", "cuda", "driver"} <= row["versions"].keys()


@pytest.mark.parametrize("name", gpu_bytes.LARGE)
def test_the_simulation_beside_a_shipped_row_is_todays(name):
    """What stood beside the measurement is what `simulate` says now: the text compares the two."""
    prepare, length = partial(gpu_bytes.with_qlora, 64), 512
    simulated = simulate_training_step(
        PRESETS[name], prepare, optimizer_class=gpu_bytes.loop_adamw, sequence_length=length, checkpointing=True
    )
    found = shipped.proofs(name)["NVIDIA H200"]
    counts = 4 * 2 * 7 * PRESETS[name].num_hidden_layers  # of steps, for two factors of seven layers each: not on the GPU
    expected = asdict(simulated)
    expected |= {"optimizer_state": simulated.optimizer_state - counts, "peak": simulated.peak - counts}
    assert found["simulated"] == expected


def test_rows_of_a_gpu_do_not_replace_those_of_a_cpu(monkeypatch, tmp_path):
    monkeypatch.setattr(run_masters, "SHIPPED", tmp_path)
    monkeypatch.setattr(shipped, "SHIPPED", tmp_path / "gpu")
    monkeypatch.setattr(run_masters, "instructor_notebook", lambda unit: None)
    monkeypatch.setattr(run_masters, "describe_hardware", lambda: "Some GPU (80 GB)")

    def write_a_row(notebook: object, folder: Path, *, short: bool) -> None:
        (folder / "results" / "08_lora").mkdir(parents=True)
        (folder / "results" / "08_lora" / "row.json").write_text("{}")

    monkeypatch.setattr(run_masters, "run", write_a_row)
    for kind, place in (("cpu", tmp_path / "08_lora"), ("cuda", tmp_path / "gpu" / "Some_GPU_80_GB" / "08_lora")):
        monkeypatch.setattr(run_masters, "find_device", lambda kind=kind: torch.device(kind))
        run_masters.main(["08_lora"])
        assert (place / "row.json").is_file()


def test_rows_are_paired_with_those_of_a_cpu():
    for unit, found in (("08_lora", "08_lora"), (None, "comparison")):
        pairs = comparison.twins(shipped.rows(unit), results.load(found, results.SHIPPED))
        assert len(pairs) > 5 and all(here.hardware == "NVIDIA H200" and cpu.on_cpu for here, cpu in pairs)
    assert {row.unit for row in shipped.rows("08_lora")} == {"08_lora"} and shipped.rows("no_unit") == []


def test_a_unit_that_names_a_card_prints_its_rows():
    """What the course says of a GPU stands in a row: every card that a text names has some."""
    cards = {row["hardware"].split()[1] for row in map(json.loads, (path.read_text() for path in SHIPPED_ROWS))}
    for unit in units():
        named = set(re.findall(r"\b[AHL]\d{2,3}\b(?! GB)", master_path(unit).read_text()))
        assert named <= cards, f"{unit} speaks of {named - cards}, of which no row ships"
    for unit in ("00_start_here", "01_why_peft", "03_layer_freezing", "08_lora", "10_qlora"):
        assert any("gpu.proofs(" in cell.source or "gpu.rows(" in cell.source for cell in code_cells(unit)), unit


def test_a_dry_machine_is_tiny():
    assert HERE.smollm2() is machine.TINY and HERE.free_bytes() is None
