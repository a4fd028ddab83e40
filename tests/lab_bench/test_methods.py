"""The comparison's rows are summed up rightly, and its learning rates chosen without a look at the test split."""

import dataclasses

import pytest
import torch

from autograder.checking.masters import load_reference
from autograder.measuring import methods
from autograder.measuring.methods import ATTENTION, LADDER, METHODS, MLP, TRAINING, Comparison
from peftlab import plots, results
from peftlab.comparison import (
    TASKS,
    UNIT,
    chosen_rate,
    late_loss,
    late_losses,
    late_table,
    machine,
    memory_table,
    own_rows,
    rows,
    score_table,
    select,
    summary,
    sweep_rows,
    sweep_table,
    twin_table,
    twins,
)
from peftlab.llama import ALL_LINEAR, PRESETS, Llama
from peftlab.memory import StepMemory
from peftlab.results import Row


def row(rate: float, seed: int = 0, loss: float = 1.0, score: float = 0.5, **changed: object) -> Row:
    fields = {
        "unit": UNIT,
        "task": "movie_reviews",
        "method": "adapters",
        "settings": {"steps": 40, "learning_rate": rate, "seed": seed, "variant": changed.pop("variant", "")},
        "trainable_parameters": 1,
        "total_parameters": 2,
        "adapter_bytes": 3,
        "memory": StepMemory(1, 2, 3, 4, 5),
        "seconds_per_step": 1.0,
        "metric": "accuracy",
        "score_before": 0.7,
        "score_after": score,
        "forgetting": 0.1,
        "losses": [9.0] * 30 + [loss] * 10,
        "short": False,
    }
    return Row(**fields | changed)


def test_the_rate_with_the_lowest_late_loss_is_chosen_whatever_the_scores():
    found = [row(1e-3, loss=0.5, score=0.9), row(3e-3, loss=0.4, score=0.8), row(1e-2, loss=0.6, score=0.99)]
    assert chosen_rate(found) == 3e-3
    assert late_loss(found[0]) == 0.5


def test_the_rates_with_the_most_seeds_are_compared_by_their_means():
    lucky = [row(3e-3, loss=0.3), row(3e-3, seed=1, loss=0.9)]
    steady = [row(1e-3, loss=0.5), row(1e-3, seed=1, loss=0.4)]
    assert chosen_rate([*lucky, *steady, row(1e-2, loss=0.1)]) == 1e-3


def test_a_summary_takes_the_chosen_rate_alone():
    found = [row(1e-3, seed=seed, loss=0.5, score=score) for seed, score in enumerate((0.5, 0.6, 0.7))] + [row(3e-3, score=0.9)]
    assert summary(found).scores == (0.5, 0.6, 0.7)
    assert summary(found).score == pytest.approx(0.6) and summary(found).spread == pytest.approx(0.2)


@pytest.mark.parametrize("mixed", [[], [row(1e-3), row(1e-3, task="tool_calls")], [row(1e-3), row(1e-3, variant="pfeiffer")]])
def test_rows_of_several_kinds_are_not_mixed(mixed):
    with pytest.raises(ValueError, match="at a time"):
        chosen_rate(mixed)


@pytest.fixture
def measured(monkeypatch, tmp_path) -> tuple[Comparison, list[tuple[float, int]]]:
    """A comparison in which a run costs nothing, and the best learning rate is 1e-4."""
    monkeypatch.setenv("PEFTLAB_RESULTS", str(tmp_path))
    runs = []

    def run(self, name, variant, task, rate, seed):
        if not any(
            r.settings["learning_rate"] == rate and r.settings["seed"] == seed for r in rows(name, task, variant, self.folder)
        ):
            runs.append((rate, seed))
            results.save(row(rate, seed, loss=abs(LADDER.index(rate) - LADDER.index(1e-4)), method=name, task=task))

    monkeypatch.setattr(Comparison, "run", run)
    return Comparison(tmp_path), runs


def test_the_sweep_goes_on_until_the_best_rate_lies_inside(measured):
    where, runs = measured
    where.measure("adapters", "", "movie_reviews")  # its first guess is ten times the best
    sweep = [rate for rate, seed in runs if seed == 0]
    assert {3e-5, 1e-4, 3e-4} <= set(sweep) and min(sweep) == 3e-5
    assert [run for run in runs if run[1]] == [(1e-4, 1), (1e-4, 2)]


def test_where_the_best_rate_was_lucky_the_next_one_gets_its_seeds():
    swept = [row(3e-4, loss=0.5), row(1e-3, loss=0.4), row(3e-3, loss=0.3), row(1e-2, loss=0.8)]
    assert Comparison().next_runs(swept) == [(3e-3, 1), (3e-3, 2)]
    unlucky = [row(3e-3, seed=1, loss=0.9), row(3e-3, seed=2, loss=0.3)]
    assert Comparison().next_runs([*swept, *unlucky]) == [(1e-3, 1), (1e-3, 2)]
    assert Comparison().next_runs([*swept, *unlucky, row(1e-3, seed=1, loss=0.4), row(1e-3, seed=2, loss=0.4)]) == []


def test_what_has_been_measured_is_not_measured_again(measured):
    where, runs = measured
    where.measure("adapters", "", "movie_reviews")
    before = list(runs)
    where.measure("adapters", "", "movie_reviews")
    assert runs == before


def test_every_guess_is_on_the_ladder_and_every_method_has_its_standard_form():
    for (name, _), method in METHODS.items():
        assert METHODS[name, ""].guess.keys() == TRAINING.keys() >= method.guess.keys()
        assert all(rate in LADDER[1:-1] for rate in method.guess.values())


def test_attention_and_mlp_alone_have_the_rank_that_rank_8_everywhere_pays_for():
    with torch.device("meta"):
        model = Llama(PRESETS["SmolLM2-135M"])
    rank_for = load_reference("12_lora_in_practice").rank_for
    sides = [m.in_features + m.out_features for name, m in model.named_modules() if name.rpartition(".")[2] in ALL_LINEAR]
    for variant, targets in (("attention", ATTENTION), ("mlp", MLP)):
        assert METHODS["lora", variant].described["rank"] == rank_for(model, targets, 8 * sum(sides))


def test_an_unknown_method_is_refused(capsys):
    with pytest.raises(SystemExit):
        methods.main(["adaptors"])
    assert "lora" in capsys.readouterr().err


@pytest.mark.slow
def test_one_row_from_start_to_file(monkeypatch, tmp_path):
    """Really run, on a tiny split: the variant, the memory and the score before are in the row, and reused in the next."""
    monkeypatch.setenv("PEFTLAB_RESULTS", str(tmp_path))
    monkeypatch.setenv("PEFTLAB_SHORT", "1")
    where = Comparison(tmp_path)
    where.run("lora", "", "tool_calls", 1e-3, 0)
    where.run("lora", "", "tool_calls", 3e-3, 0)
    first, second = rows("lora", "tool_calls", folder=tmp_path)
    assert first.settings["variant"] == "" and first.settings["rank"] == 8 and first.short
    assert first.memory == second.memory and first.memory.gradients == 4 * first.trainable_parameters
    assert first.losses[0] == second.losses[0] and first.losses != second.losses
    assert dataclasses.replace(first, settings={}).score_before == second.score_before
    text = methods.again("lora", "", "tool_calls")
    assert text.startswith("tool_calls, lora, learning rate 0.003, seed 0") and "96.5%" in text and "2,442,240" in text


SHIPPED_ROWS = results.load(UNIT, results.SHIPPED)


@pytest.mark.parametrize(("method", "variant"), sorted({(row.method, row.settings["variant"]) for row in SHIPPED_ROWS}))
def test_shipped_rows_are_whole(method, variant):
    """No short row, every rate on the ladder, the sweep's best between two others, three seeds at the rate that is chosen."""
    for task in TRAINING:
        kind = (task, method, variant)
        found = [row for row in SHIPPED_ROWS if (row.task, row.method, row.settings["variant"]) == kind]
        if not found:
            continue
        assert not any(row.short for row in found)
        best = LADDER.index(chosen_rate(found))
        assert {LADDER[best - 1], LADDER[best + 1]} <= {row.settings["learning_rate"] for row in found}
        assert len(summary(found).scores) >= 3, (method, variant, task)


def test_tables_name_every_kind_once_and_leave_out_what_was_not_measured(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("PEFTLAB_RESULTS", str(tmp_path))
    for rate, seed, loss in ((1e-3, 0, 0.5), (3e-3, 0, 0.4), (3e-3, 1, 0.4)):
        results.save(row(rate, seed, loss=loss, score=0.8 + seed / 10))
    shipped = select({"bottlenecks": ("adapters", ""), "LoRA": ("lora", "")}, tmp_path)
    assert list(shipped) == [("movie_reviews", "bottlenecks")]
    assert "left out: LoRA on movie_reviews, bottlenecks on tool_calls, LoRA on tool_calls." in capsys.readouterr().out
    assert sweep_table(shipped).count("bottlenecks") == 2 and "0.003      0.400   80.0% *" in sweep_table(shipped)
    assert "85.0%" in score_table(shipped) and "10.0%" in score_table(shipped) and "50.000%" in score_table(shipped)
    assert memory_table(shipped).count("bottlenecks") == 1
    assert "0.003      0.400           0.400   0.400   85.0%" in late_table(shipped)
    assert max(map(len, score_table(shipped).splitlines())) <= 115


def test_a_comparison_is_shown_in_a_picture_a_task_and_three_tables(monkeypatch, capsys):
    pictures = {}
    monkeypatch.setattr(plots, "show", lambda figure, alt: pictures.update({figure.get_suptitle(): alt}))
    shipped = plots.show_comparison({"biases": ("bitfit", ""), "LoRA": ("lora", "")}, "bitfit")
    assert list(pictures) == [f"The learning rate, on {task}" for task in TASKS]
    assert all("biases; LoRA" in alt for alt in pictures.values())
    said = capsys.readouterr().out
    swept = {key: rows for key, rows in shipped.items() if rows[0].method == "bitfit"}
    for table in (sweep_table(swept), score_table(shipped), memory_table(shipped)):
        assert table in said


@pytest.mark.parametrize(
    ("hardware", "name"),
    [
        ("AMD EPYC, 2 threads", "AMD EPYC"),
        ("Apple M2, 1 thread", "Apple M2"),
        ("NVIDIA H100 80GB HBM3", "NVIDIA H100 80GB HBM3"),
    ],
)
def test_a_machine_is_named_without_its_threads(hardware, name):
    assert machine(row(1e-3, hardware=hardware)) == name


def test_own_rows_are_found_in_every_unit_and_what_is_no_row_is_named_and_left_out(monkeypatch, tmp_path, capsys, recwarn):
    monkeypatch.setenv("PEFTLAB_RESULTS", str(tmp_path))
    assert own_rows() == []
    results.save(row(1e-3, unit="08_lora", method="lora"))
    results.save(row(1e-3, unit="07_adapters"))
    sound = results.save(row(1e-3, unit="07_adapters", task="tool_calls")).read_text()
    (tmp_path / "07_adapters" / "broken.json").write_text(sound[:300])
    results.save(row(3e-3, unit="07_adapters", score=7.5))
    assert [(r.unit, r.task) for r in own_rows()] == [
        ("07_adapters", "movie_reviews"),
        ("07_adapters", "tool_calls"),
        ("08_lora", "movie_reviews"),
    ]
    said = capsys.readouterr().out
    assert said.count("is left out") == 2 and "broken.json" in said and "a score of 7.5" in said
    assert not recwarn.list


def test_the_pareto_picture_joins_what_is_on_the_front():
    points = {
        "cheap": (1.0, 50.0, 1.0),
        "dear": (9.0, 80.0, 1.0),
        "between": (5.0, 40.0, 1.0),
        "unknown": (2.0, float("nan"), 1.0),
    }
    axes = plots.pareto(points, ["cheap", "dear"], "Scores", "MiB", "score (%)").axes[0]
    assert axes.get_legend_handles_labels()[1] == ["cheap", "dear", "between"]
    assert axes.lines[0].get_xydata().tolist() == [[1.0, 50.0], [9.0, 80.0]]


def test_unit_10_says_of_its_rows_what_they_say():
    """A point below LoRA on reviews, three on tool calls, where LoRA's seeds lie ten apart: numbers that stand in its prose."""
    found = {}
    for task in TASKS:
        qlora, lora = (summary(rows(method, task)) for method in ("qlora", "lora"))
        found[task] = (round(100 * (qlora.score - lora.score)), round(100 * lora.spread))
    assert found["movie_reviews"][0] == -1 and found["tool_calls"] == (-3, 10)


def test_unit_12_says_of_its_rows_what_they_say():
    """Numbers that stand in its prose: rates, late losses beside LoRA's, scores."""
    found = {}
    for variant in ("rank_8", "rank_64", "rank_64_rslora", "lora_plus", "pissa", "dora", "attention"):
        measured = rows("lora", "tool_calls", variant)
        rate = chosen_rate(measured)
        found[variant] = rate, late_losses(measured)[rate], round(100 * summary(measured).score)
    low = {"rank_64_rslora", "lora_plus", "pissa"}
    assert all(rate == (1e-3 if name in low else 3e-3) for name, (rate, _, _) in found.items())
    scores = {name: score for name, (_, _, score) in found.items()}
    assert (scores["rank_8"], scores["lora_plus"], scores["pissa"], scores["dora"]) == (79, 84, 83, 81)
    assert scores["attention"] == 79
    lora = found["rank_8"][1]

    def beside(variant: str) -> tuple[float, int]:
        late = found[variant][1]
        return round(sum(late.values()) / sum(lora.values()) - 1, 2), sum(late[seed] < lora[seed] for seed in (0, 1, 2))

    assert beside("dora") == (-0.05, 3) and beside("pissa") == (0.32, 0) and beside("lora_plus") == (-0.09, 2)
    assert beside("attention") == (0.38, 0)
    masks = {row.settings["mask"]: row.score_after for row in results.load("12_lora_in_practice", results.SHIPPED)}
    assert masks == {"right": 0.455, "every token": 0.555, "no end token": 0.0}
    swept = {
        variant: [round(late_loss(row), 3) for row in sweep_rows(rows("lora", "tool_calls", variant))] for variant in found
    }
    assert swept["rank_8"] == [0.059, 0.015, 0.061] and swept["rank_64"] == [0.059, 0.015, 0.060]


def test_twins_were_trained_alike():
    shipped = [row(1e-3), row(1e-3, seed=1), row(3e-3), row(1e-3, variant="pfeiffer"), row(1e-3, task="tool_calls")]
    own = dataclasses.replace(row(1e-3, score=0.8), settings={"learning_rate": 1e-3, "seed": 0, "steps": 40, "rank": 8})
    assert twins([own], shipped) == [(own, shipped[0])]
    assert twins([dataclasses.replace(own, short=True)], shipped) == []
    assert twins([row(1e-3, seed=7)], shipped) == []
    table = twin_table(twins([own], shipped))
    assert table.startswith("movie_reviews, adapters, learning rate 0.001, seed 0\n") and "80.0%" in table
    assert twin_table([]) == ""
