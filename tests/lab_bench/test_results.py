"""Rows survive the disk, and what is no row is reported and left alone."""

import base64
import dataclasses

import pytest

from peftlab import memory, plots, results
from peftlab.memory import StepMemory
from peftlab.results import Row


@pytest.fixture
def row(monkeypatch, tmp_path):
    monkeypatch.setenv("PEFTLAB_RESULTS", str(tmp_path))
    return Row(
        unit="08_lora",
        task="movie_reviews",
        method="lora",
        settings={"rank": 8, "steps": 2, "learning_rate": 1e-3, "seed": 0},
        trainable_parameters=10,
        total_parameters=100,
        adapter_bytes=40,
        memory=StepMemory(400, 40, 80, 200, 800),
        seconds_per_step=0.5,
        metric="accuracy",
        score_before=0.5,
        score_after=0.9,
        forgetting=0.1,
        losses=[1.0, 0.5],
    )


def test_a_row_comes_back_as_it_was(row):
    path = results.save(row)
    assert path.parent.name == "08_lora"
    assert results.load("08_lora") == [row]
    assert {"python", "torch"} <= row.versions.keys() and row.hardware


@pytest.mark.parametrize(
    ("hardware", "on_cpu"),
    [("Some CPU, 2 threads", True), ("arm64, 1 thread", True), ("NVIDIA H200", False), ("Tesla T4", False)],
)
def test_a_row_tells_a_processor_from_a_gpu(row, hardware, on_cpu):
    assert dataclasses.replace(row, hardware=hardware).on_cpu == on_cpu


def test_the_same_experiment_replaces_its_row_and_another_does_not(row):
    results.save(row)
    results.save(dataclasses.replace(row, score_after=0.8))
    results.save(dataclasses.replace(row, settings=row.settings | {"seed": 1}))
    results.save(dataclasses.replace(row, short=True))
    assert len(results.load("08_lora")) == 3


@pytest.mark.parametrize("content", ["not json", "{}", '{"unit": 3}', "[]"])
def test_a_corrupt_row_is_reported_and_left(row, content):
    path = results.save(row)
    broken = path.with_name("broken.json")
    broken.write_text(content)
    with pytest.warns(UserWarning, match=r"broken\.json is not a results row"):
        assert results.load("08_lora") == [row]
    assert broken.read_text() == content


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"losses": []}, "no losses"),
        ({"score_after": 7.5}, "a score of 7.5"),
        ({"forgetting": "much"}, "something else where a number belongs"),
        ({"memory": StepMemory(400, 40, 80, None, 800)}, "something else where a number belongs"),
        ({"settings": {"rank": 8}}, "no steps, learning rate or seed"),
    ],
)
def test_a_row_that_cannot_be_counted_with_is_reported_and_left(row, changed, problem):
    results.save(row)
    results.save(dataclasses.replace(row, task="another", **changed))
    with pytest.warns(UserWarning, match=problem):
        assert results.load("08_lora") == [row]


def test_no_rows_where_nothing_was_measured(row):
    assert results.load("99_nothing") == []


def test_a_table_of_steps_has_every_category(row):
    larger = dataclasses.replace(row.memory, parameters=3 * 2**30)
    head, small, large = memory.step_table({"LoRA": row.memory, "a larger one": larger}, digits=4).splitlines()
    assert head.split() == ["MiB", "weights", "gradients", "optimizer", "activations", "peak"]
    assert small.split()[1:] == ["0.0004", "0.0000", "0.0001", "0.0002", "0.0008"]
    assert large.split()[-5] == "3,072.0000" and len(head) == len(small) == len(large)
    assert "3.22" in memory.step_table({"a larger one": larger}, unit="GB", digits=2)


def test_figures_say_what_they_show(row, monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda bundle, raw, metadata: shown.append((bundle, metadata)))
    figures = [
        plots.memory_bars({"LoRA": row.memory, "full": row.memory}, "One step"),
        plots.memory_bars({"LoRA": row.memory}, "One step", unit="GB", card=("a GPU of 24 GB", 24e9)),
        plots.loss_curves({"LoRA": row.losses}, "Loss"),
        plots.before_after([row], "Scores"),
        plots.by_setting({"LoRA": {1: 10.0, 2: 20.0}}, "Ranks", "rank", "score (%)"),
    ]
    for figure in figures:
        axes = figure.axes[0]
        assert axes.get_title() and (axes.get_xlabel() or axes.get_ylabel())
        plots.show(figure, alt='"what" one < sees')
    assert len(shown) == len(figures)
    for bundle, metadata in shown:
        assert base64.b64decode(bundle["image/png"]).startswith(b"\x89PNG")
        assert metadata["image/png"]["alt"] == bundle["text/plain"] == '"what" one < sees'
        assert 'alt="&quot;what&quot; one &lt; sees"' in bundle["text/html"] and bundle["image/png"] in bundle["text/html"]
