"""Our LLaMA is Hugging Face's: logits, gradients, loss, parameter names and counts."""

import copy
import dataclasses

import pytest
import torch
from transformers import LlamaConfig as HubConfig
from transformers import LlamaForCausalLM

from peftlab.llama import IGNORE, PRESETS, KeyValueCache, Llama, LlamaConfig, causal_loss, generate

EPS = torch.finfo(torch.float32).eps

CONFIGS = {
    "multi-head": LlamaConfig(97, 48, 80, 3, 4, 4),
    "grouped-query": LlamaConfig(97, 48, 80, 3, 6, 2, rope_theta=1e5),
    "multi-query, tied": LlamaConfig(97, 64, 96, 2, 4, 1, tie_word_embeddings=True),
    "one layer, large eps": LlamaConfig(53, 32, 40, 1, 2, 2, rms_norm_eps=1e-3),
}


def hub_model(config: LlamaConfig) -> LlamaForCausalLM:
    return LlamaForCausalLM(HubConfig(**dataclasses.asdict(config), attn_implementation="sdpa")).eval()


def pair(config: LlamaConfig) -> tuple[Llama, LlamaForCausalLM]:
    theirs = hub_model(config)
    for parameter in theirs.parameters():  # of ordinary size, the norms' too, so that nothing hides behind a zero
        torch.nn.init.normal_(parameter, std=0.2) if parameter.dim() > 1 else torch.nn.init.uniform_(parameter, 0.5, 1.5)
    ours = Llama(config)
    ours.load_state_dict(theirs.state_dict())
    ours.tie_weights()
    return ours, theirs


def assert_as_exact(ours: torch.Tensor, theirs: torch.Tensor, truth: torch.Tensor) -> None:
    """Two fp32 computations of one fp64 value: ours may be off by twice what theirs is, plus a few roundings of the largest."""
    error_ours = (ours.double() - truth).abs().max()
    error_theirs = (theirs.double() - truth).abs().max()
    assert error_ours <= 2 * error_theirs + 8 * EPS * truth.abs().max()


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("padding", ["none", "right", "left"])
def test_logits_equal_transformers(name, padding):
    ours, theirs = pair(CONFIGS[name])
    input_ids = torch.randint(0, 50, (3, 11))
    mask = torch.ones_like(input_ids)
    for row, missing in enumerate((0, 3, 6)):
        if padding == "right" and missing:
            mask[row, -missing:] = 0
        if padding == "left":
            mask[row, :missing] = 0
    given = None if padding == "none" else mask
    with torch.no_grad():
        logits = ours(input_ids, given)
        expected = theirs(input_ids, attention_mask=given).logits
        truth = copy.deepcopy(theirs).double()(input_ids, attention_mask=given).logits
    assert not logits.isnan().any()
    real = mask.bool()
    assert_as_exact(logits[real], expected[real], truth[real])


def test_right_padding_needs_no_mask():
    ours, _ = pair(CONFIGS["grouped-query"])
    input_ids = torch.randint(0, 50, (2, 9))
    mask = torch.ones_like(input_ids)
    mask[1, 5:] = 0
    with torch.no_grad():
        torch.testing.assert_close(ours(input_ids)[mask.bool()], ours(input_ids, mask)[mask.bool()], rtol=1e-5, atol=1e-5)


def test_only_differences_between_positions_matter():
    ours, _ = pair(CONFIGS["grouped-query"])
    ours = ours.double().model
    input_ids = torch.randint(0, 50, (2, 9))
    x = ours.embed_tokens(input_ids)
    with torch.no_grad():
        plain = ours(input_ids)
        # The angles are fp32: at position 100 one is off by up to 100 eps.
        torch.testing.assert_close(ours.run_layers(x), plain, rtol=0, atol=0)
        torch.testing.assert_close(ours.run_layers(x, positions=torch.arange(9) + 100), plain, rtol=0, atol=1e-3)
        rows = torch.stack([torch.arange(9), torch.arange(9) + 100])
        torch.testing.assert_close(ours.run_layers(x, positions=rows), plain, rtol=0, atol=1e-3)
        assert not torch.allclose(ours.run_layers(x, positions=2 * torch.arange(9)), plain, atol=1e-2)


def test_a_padded_row_with_positions_of_its_own_equals_the_row_alone():
    ours, _ = pair(CONFIGS["multi-head"])
    input_ids = torch.randint(0, 50, (1, 9))
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1]])
    x = ours.model.embed_tokens(input_ids)
    with torch.no_grad():
        padded = ours.model.run_layers(x, mask, mask.cumsum(1) - 1)[:, 3:]
        torch.testing.assert_close(padded, ours.model(input_ids[:, 3:]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_loss_and_gradients_equal_transformers(name, checkpointing):
    ours, theirs = pair(CONFIGS[name])
    exact = copy.deepcopy(theirs).double()
    ours.model.gradient_checkpointing = checkpointing
    input_ids = torch.randint(0, 50, (3, 11))
    labels = input_ids.clone()
    labels[:, :4] = IGNORE
    loss = causal_loss(ours, input_ids, labels)
    loss.backward()
    for model in (theirs, exact):
        model.loss_of_batch = model(input_ids, labels=labels).loss
        model.loss_of_batch.backward()
    assert_as_exact(loss.detach(), theirs.loss_of_batch.detach(), exact.loss_of_batch.detach())
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    truth = {name: p.grad for name, p in exact.named_parameters()}
    assert set(gradients) == {name for name, _ in ours.named_parameters()}
    for parameter_name, parameter in ours.named_parameters():
        assert_as_exact(parameter.grad, gradients[parameter_name], truth[parameter_name])


def test_smollm2_equals_transformers(smollm2):
    model, tokenizer = smollm2
    theirs = LlamaForCausalLM(HubConfig(**dataclasses.asdict(model.config))).eval()
    theirs.load_state_dict(model.state_dict())
    theirs.tie_weights()
    ids = torch.tensor([tokenizer.encode("A camel is a horse designed by a committee.")])
    with torch.no_grad():
        logits, expected = model(ids), theirs(ids).logits
    # 30 layers of some thousand roundings each, of logits up to about 30; observed 1e-4.
    assert (logits - expected).abs().max() <= 30 * 32 * EPS * expected.abs().max()
    assert torch.equal(logits.argmax(-1), expected.argmax(-1))


def test_smollm2_answers(smollm2):
    model, tokenizer = smollm2
    ids = torch.tensor([tokenizer.encode("The capital of France is")])
    assert "Paris" in tokenizer.decode(generate(model, ids, 4)[0])


def test_generate_stops_at_the_stop_token():
    model = Llama(PRESETS["tiny"])
    ids = torch.randint(0, 256, (1, 5))
    longer = generate(model, ids, 6)
    assert longer.shape == (1, 11)
    stop = longer[0, 6].item()
    assert generate(model, ids, 6, stop).shape[1] <= 7


def one_token_at_a_time(model: Llama, row: torch.Tensor, new_tokens: int) -> torch.Tensor:
    """The loop without a cache and without padding: the whole row goes through the model for every token."""
    with torch.no_grad():
        for _ in range(new_tokens):
            row = torch.cat([row, model(row[None])[0, -1:].argmax(-1)])
    return row


@pytest.mark.parametrize("name", CONFIGS)
def test_generate_equals_the_loop_without_a_cache(name):
    ours, _ = pair(CONFIGS[name])
    ours = ours.double()  # so that no two logits are nearer than rounding
    rows = [torch.randint(0, 50, (length,)) for length in (9, 4, 1)]
    input_ids, mask = torch.zeros(2, 3, 9, dtype=torch.long)
    for number, row in enumerate(rows):
        input_ids[number, -len(row) :], mask[number, -len(row) :] = row, 1
    longer = generate(ours, input_ids, 6, attention_mask=mask)
    for number, row in enumerate(rows):
        assert longer[number, 9 - len(row) :].equal(one_token_at_a_time(ours, row, 6))


def test_a_cache_gives_the_hidden_states_of_the_whole_row():
    ours, _ = pair(CONFIGS["grouped-query"])
    input_ids = torch.randint(0, 50, (2, 9))
    x, mask = ours.model.embed_tokens(input_ids), torch.ones_like(input_ids)
    caches = [KeyValueCache() for _ in ours.model.layers]
    with torch.no_grad():
        parts = [
            ours.model.run_layers(x[:, start:stop], mask[:, :stop], torch.arange(start, stop), caches)
            for start, stop in ((0, 4), (4, 5), (5, 9))
        ]
        torch.testing.assert_close(torch.cat(parts, 1), ours.model(input_ids), rtol=1e-4, atol=1e-4)
    assert all(cache.keys.shape == (2, 2, 9, 8) for cache in caches)


def test_generate_equals_transformers(smollm2):
    model, tokenizer = smollm2
    theirs = LlamaForCausalLM(HubConfig(**dataclasses.asdict(model.config))).eval()
    theirs.load_state_dict(model.state_dict())
    theirs.tie_weights()
    prompts = ["The capital of France is", "A camel is a horse that", "One, two, three,"]
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "left"
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    given = {"attention_mask": batch["attention_mask"], "max_new_tokens": 12}
    expected = theirs.generate(
        batch["input_ids"], **given, do_sample=False, pad_token_id=0, eos_token_id=tokenizer.eos_token_id
    )
    ours = generate(model, batch["input_ids"], stop_token=tokenizer.eos_token_id, **given)
    for row, wanted in zip(ours.tolist(), expected.tolist(), strict=True):
        assert tokenizer.decode(row, skip_special_tokens=True) == tokenizer.decode(wanted, skip_special_tokens=True)
    assert "Paris" in tokenizer.decode(ours[0])


def test_sampling_draws_with_the_models_probabilities():
    ours, _ = pair(CONFIGS["one layer, large eps"])
    prompt = torch.tensor([[3, 1, 4]])
    with torch.no_grad():
        probabilities = (ours(prompt)[0, -1] / 2).softmax(-1)
    drawn = generate(ours, prompt.repeat(4000, 1), 1, temperature=2.0, generator=torch.Generator().manual_seed(0))[:, -1]
    frequencies = torch.bincount(drawn, minlength=53) / 4000
    deviation = (probabilities * (1 - probabilities) / 4000).sqrt()
    assert ((frequencies - probabilities).abs() <= 5 * deviation + 1e-3).all()


def test_a_row_that_has_ended_is_filled_up_while_others_go_on():
    model = Llama(PRESETS["tiny"])
    ids = torch.randint(0, 256, (2, 5))
    free = generate(model, ids, 6)
    stop = free[0, 6].item()
    assert stop not in free[1], "choose another seed"
    stopped = generate(model, ids, 6, stop)
    assert stopped[0, 7:].eq(stop).all() and stopped[1].equal(free[1])


def test_padding_on_the_right_is_refused():
    with pytest.raises(ValueError, match="on the left"):
        generate(Llama(PRESETS["tiny"]), torch.ones(1, 3, dtype=torch.long), 1, attention_mask=torch.tensor([[1, 1, 0]]))


@pytest.mark.parametrize(
    ("preset", "count"),
    [
        ("SmolLM2-135M", 134_515_008),
        ("LLaMA-7B", 6_738_415_616),
        ("LLaMA-13B", 13_015_864_320),
        ("LLaMA-65B", 65_285_660_672),
        ("Llama-2-70B", 68_976_648_192),
    ],
)
def test_presets_have_the_published_sizes(preset, count):
    with torch.device("meta"):
        model = Llama(PRESETS[preset])
    assert sum(parameter.numel() for parameter in model.parameters()) == count


def test_tied_weights_are_one_tensor():
    config = CONFIGS["multi-query, tied"]
    model = Llama(config)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 50}, "does not divide into 4 heads"),
        ({"num_key_value_heads": 3}, "do not divide into 3 key-value heads"),
        ({"num_hidden_layers": -1}, "num_hidden_layers must be positive"),
        ({"hidden_size": 12}, "needs an even number"),
    ],
)
def test_impossible_configs_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(PRESETS["tiny"], **change)
