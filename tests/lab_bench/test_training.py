"""The loop: what it trains, that its options change cost and not outcome, and that it goes on where it stopped."""

import copy

import pytest
import torch
from datasets import Dataset

from peftlab import training
from peftlab.llama import PRESETS, Llama, causal_loss
from peftlab.training import train, trainable, twenty_steps


@pytest.fixture
def dataset():
    generator = torch.Generator().manual_seed(0)
    rows = []
    for length in range(6, 46):
        ids = torch.randint(0, 256, (length,), generator=generator).tolist()
        answer = 1 + length % 4
        rows.append({"input_ids": ids, "labels": [-100] * (length - answer) + ids[-answer:]})
    return Dataset.from_list(rows)


@pytest.fixture
def model():
    model = Llama(PRESETS["tiny"]).requires_grad_(False)
    model.model.layers[1].requires_grad_(True)
    return model


OPTIONS = {"steps": 6, "learning_rate": 1e-2, "batch_size": 8, "device": "cpu"}


def weights(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_loss_falls_and_frozen_weights_stay(model, dataset):
    before = copy.deepcopy(model)
    history = train(model, dataset, **{**OPTIONS, "steps": 30})
    assert history.losses[-1] < 0.85 * history.losses[0]
    assert len(history.seconds) == 30
    for (name, now), (_, then) in zip(model.named_parameters(), before.named_parameters(), strict=True):
        assert torch.equal(now, then) != name.startswith("model.layers.1."), name
    assert not model.training


def test_groups_have_rates_of_their_own(model, dataset):
    before = copy.deepcopy(model)
    still, moved = model.model.layers[1].self_attn.q_proj.weight, model.model.layers[1].mlp.up_proj.weight
    groups = [{"params": [still], "lr": 0.0}, {"params": [moved], "lr": 1e-2}]
    train(model, dataset, **OPTIONS, parameter_groups=groups)
    assert torch.equal(still, before.model.layers[1].self_attn.q_proj.weight)
    assert not torch.equal(moved, before.model.layers[1].mlp.up_proj.weight)


def test_one_group_is_as_none(model, dataset):
    grouped = copy.deepcopy(model)
    groups = [{"params": list(trainable(grouped).values()), "lr": OPTIONS["learning_rate"]}]
    assert train(grouped, dataset, **OPTIONS, parameter_groups=groups).losses == train(model, dataset, **OPTIONS).losses


def test_same_seed_same_run_and_another_seed_another(model, dataset):
    runs = [train(copy.deepcopy(model), dataset, **OPTIONS, seed=seed).losses for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize("option", [{"accumulate": 4}, {"gradient_checkpointing": True}])
def test_cheaper_in_memory_same_in_outcome(model, dataset, option):
    plain, cheaper = copy.deepcopy(model), copy.deepcopy(model)
    losses = train(plain, dataset, **OPTIONS).losses
    # Adam divides by the root of the squared gradient, so rounding of tiny gradients is magnified up to the learning rate;
    # the losses, not each weight, are what must agree.
    assert train(cheaper, dataset, **OPTIONS, **option).losses == pytest.approx(losses, rel=1e-4)


def test_resumes_where_it_stopped(model, dataset, tmp_path, monkeypatch):
    undisturbed, stopped = copy.deepcopy(model), copy.deepcopy(model)
    losses = train(undisturbed, dataset, **OPTIONS).losses
    path = tmp_path / "run.pt"

    original, calls = training._backward, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(training, "_backward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(stopped, dataset, **OPTIONS, checkpoint=path, checkpoint_every=2)
    fresh = copy.deepcopy(model)
    resumed = train(fresh, dataset, **OPTIONS, checkpoint=path)
    assert resumed.losses == losses
    assert torch.equal(weights(fresh), weights(undisturbed))
    assert train(fresh, dataset, **OPTIONS, checkpoint=path).losses == losses  # finished: nothing left to do


def test_a_broken_checkpoint_is_named_and_kept(model, dataset, tmp_path):
    path = tmp_path / "run.pt"
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match=r"run\.pt is broken .* delete it"):
        train(model, dataset, **OPTIONS, checkpoint=path)
    assert path.read_bytes() == b"not a checkpoint"


def test_another_runs_checkpoint_is_refused(model, dataset, tmp_path):
    path = tmp_path / "run.pt"
    train(copy.deepcopy(model), dataset, **OPTIONS, checkpoint=path)
    with pytest.raises(ValueError, match="belongs to another run"):
        train(copy.deepcopy(model), dataset, **{**OPTIONS, "learning_rate": 1e-3}, checkpoint=path)
    with pytest.raises(ValueError, match="belongs to another run"):
        train(copy.deepcopy(model).requires_grad_(True), dataset, **OPTIONS, checkpoint=path)


def test_bad_requests_are_refused(model, dataset):
    with pytest.raises(ValueError, match="does not split"):
        train(model, dataset, **OPTIONS, accumulate=3)
    with pytest.raises(ValueError, match="needs as many rows"):
        train(model, dataset.select(range(5)), **OPTIONS)
    with pytest.raises(ValueError, match="nothing to train"):
        train(model.requires_grad_(False), dataset, **OPTIONS)


def test_trainable_lists_only_what_requires_a_gradient(model):
    assert trainable(model) and all(name.startswith("model.layers.1.") for name in trainable(model))


def test_a_short_run_takes_two_steps(model, dataset, monkeypatch):
    monkeypatch.setenv("PEFTLAB_SHORT", "1")
    assert len(train(model, dataset, **OPTIONS).losses) == 2


def test_twenty_steps_are_the_same_for_the_same_start(model):
    def losses(model, parameters):
        return twenty_steps(parameters, lambda ids: causal_loss(model, ids, ids))

    first, second, frozen = copy.deepcopy(model), copy.deepcopy(model), copy.deepcopy(model)
    taken = losses(first, trainable(first).values())
    assert taken.shape == (20,) and not taken.requires_grad
    assert torch.equal(taken, losses(second, trainable(second).values()))
    assert torch.equal(weights(first), weights(second)) and not torch.equal(weights(first), weights(model))
    assert not torch.equal(taken, losses(frozen, [trainable(frozen)["model.layers.1.mlp.down_proj.weight"]]))


@pytest.mark.parametrize(("named", "found"), [("cpu", "cpu"), ("cuda:1", "cuda:1"), ("mps", "mps"), ("", "cpu")])
def test_the_device_can_be_named(named, found, monkeypatch):
    monkeypatch.setenv("PEFTLAB_DEVICE", named)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(
        torch.backends.mps, "is_available", lambda: True
    )  # memory cannot be measured there: only if it is named
    assert training.find_device() == torch.device(found)


def test_what_is_no_device_is_named(monkeypatch):
    monkeypatch.setenv("PEFTLAB_DEVICE", "gpu")
    with pytest.raises(ValueError, match="PEFTLAB_DEVICE is 'gpu'"):
        training.find_device()


@pytest.mark.parametrize(
    ("device", "capability", "dtype"),
    [
        ("cpu", None, torch.float32),
        ("cuda", (7, 5), torch.float32),
        ("cuda", (8, 0), torch.bfloat16),
        ("mps", None, torch.float32),
    ],
)
def test_bf16_is_for_cards_that_compute_in_it(device, capability, dtype, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *given: True)  # a T4 says so, too
    assert training.compute_dtype(torch.device(device)) == dtype


def test_the_clock_waits_for_a_gpu_before_and_after(monkeypatch):
    said = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: said.append(str(device)))
    assert training.seconds_of(lambda: said.append("work"), torch.device("cuda", 1)) >= 0
    assert said == ["cuda:1", "work", "cuda:1"]


def test_one_batch_is_learned_by_heart_and_twenty_are_not():
    def way(batches: int) -> float:
        torch.manual_seed(0)
        tiny = Llama(PRESETS["tiny"])
        losses = twenty_steps(tiny.parameters(), lambda ids: causal_loss(tiny, ids, ids), 1e-2, batches=batches)
        return (losses[0] - losses[-1]).item()

    assert way(1) > 10 * way(20)
