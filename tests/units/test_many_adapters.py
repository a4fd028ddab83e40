"""Unit 13: the page on production tells the truth about peft's format, and the rows on serving can be written and read."""

import math
import re
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaConfig as HubConfig
from transformers import LlamaForCausalLM

from autograder.checking.masters import load_reference
from peftlab import results, serving
from peftlab.llama import PRESETS, Llama

ROOT = Path(__file__).parents[2]
EPS = torch.finfo(torch.float32).eps
SCALING, RANK = 2.0, 4


@pytest.fixture
def served():
    """A tiny LLaMA with one filled slot in every linear layer, and the factors, named as in an adapter file."""
    unit, model = load_reference("13_many_adapters"), Llama(PRESETS["tiny"])
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    factors = {}
    for name, linear in [(n, m) for n, m in model.named_modules() if n.rpartition(".")[2] in unit.ALL_LINEAR]:
        layer = unit.BatchedLoRA(linear, 1, RANK, unit.gathered_update)
        A, B = torch.randn(RANK, linear.in_features), torch.randn(linear.out_features, RANK) / math.sqrt(linear.in_features)
        layer.write(0, A, B, SCALING)
        layer.adapters = torch.tensor([0, -1])
        factors |= {f"{name}.lora_A": A, f"{name}.lora_B": B}
        parent, _, own_name = name.rpartition(".")
        setattr(model.get_submodule(parent), own_name, layer)
    return model, weights, factors


def test_the_pages_function_writes_what_peft_reads(served, tmp_path):
    model, weights, factors = served
    page = (ROOT / "docs" / "from_here_to_production.md").read_text()
    names = {}
    exec(re.search(r"```python\n(.+?)```", page, re.DOTALL)[1], names)
    save_file(factors, tmp_path / "calls.safetensors")
    names["write_for_peft"](tmp_path / "calls.safetensors", tmp_path / "served", "a base", alpha=RANK * SCALING)

    sizes = dict(vocab_size=256, hidden_size=64, intermediate_size=160, num_hidden_layers=2)
    theirs = LlamaForCausalLM(HubConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-5))
    theirs.load_state_dict(weights)
    theirs = PeftModel.from_pretrained(theirs, tmp_path / "served").eval()
    ids = torch.randint(0, 256, (1, 9)).repeat(2, 1)
    with torch.no_grad():
        ours, expected = model(ids), theirs(ids).logits
        with theirs.disable_adapter():
            base = theirs(ids).logits
    # 14 products one after the other, of at most 160 terms
    tolerance = 14 * 160 * EPS * expected.abs().max()
    assert (ours[0] - expected[0]).abs().max() <= tolerance
    assert (ours[1] - base[1]).abs().max() <= tolerance
    assert (expected - base).abs().max() > 100 * tolerance, "the adapter changes nothing"


def test_rows_are_written_and_read_and_tokens_counted(tmp_path, monkeypatch):
    monkeypatch.setenv("PEFTLAB_RESULTS", str(tmp_path))
    row = serving.Served("gathered", "fp32", adapters=2, batch=8, rank=4, seconds=0.5, bytes=10)
    assert row.tokens_per_second == 16
    serving.save([row, row], "13_many_adapters")
    assert serving.load(serving.Served, "13_many_adapters") == [row, row]
    assert serving.load(serving.Combined, "13_many_adapters") == []


def test_the_shipped_rows_are_complete():
    rows = serving.load(serving.Served, "13_many_adapters", results.SHIPPED)
    combined = serving.load(serving.Combined, "13_many_adapters", results.SHIPPED)
    assert rows and combined and not any(row.short for row in [*rows, *combined])
    for pair in {(row.base, row.batch, row.adapters) for row in rows if row.base == "fp32"}:
        ways = [row.way for row in rows if (row.base, row.batch, row.adapters) == pair]
        assert sorted(ways) == ["gathered", "merged", "segmented", "swapped"], pair


def test_a_decoding_step_starts_from_the_same_cache_each_time(served):
    model, _, _ = served
    step = serving.decoding_step(model, batch=2, context=5)
    first = step()
    assert first.shape == (2, 256) and step().equal(first)
    for layer in model.modules():
        if hasattr(layer, "adapters"):
            layer.adapters = layer.adapters[:1]
    torch.testing.assert_close(step(slice(0, 1)), first[:1])


def test_ways_that_are_timed_take_turns(monkeypatch):
    monkeypatch.setenv("PEFTLAB_SHORT", "0")
    called = []
    ways = {name: lambda name=name: called.append(name) for name in "ab"}
    seconds = serving.seconds_in_turn(ways, torch.device("cpu"), rounds=3)
    assert called == list("ababab") and seconds.keys() == {"a", "b"}


def test_slots_hold_a_further_adapter_in_its_own_bytes():
    unit = load_reference("13_many_adapters")
    sizes = [
        sum(buffer.nbytes for buffer in unit.BatchedLoRA(nn.Linear(24, 32), slots, RANK, unit.gathered_update).buffers())
        for slots in (1, 2, 3)
    ]
    assert sizes[1] - sizes[0] == sizes[2] - sizes[1] == 4 * RANK * (24 + 32)
