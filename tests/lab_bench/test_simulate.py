"""Fake tensors take the bytes that real ones take, and a few layers tell what many will."""

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from autograder.checking.masters import load_reference
from autograder.checks.why_peft.activation_bytes import activation_bytes, activations_case, exact_activations
from autograder.checks.why_peft.count_parameters import count_parameters
from autograder.checks.why_peft.training_bytes import training_bytes
from peftlab import calculator
from peftlab.distributed import Traffic, run
from peftlab.llama import PRESETS, Llama, LlamaConfig
from peftlab.memory import measure_training_step
from peftlab.simulate import RECIPES, Recipe, next_token_loss, simulate_sharded_step, simulate_training_step
from peftlab.tracker import PeftMemTracker

MODEL = LlamaConfig(1000, 256, 688, 6, 8, 4)


def with_lora(model: Llama) -> None:
    """The master's own LoRA of unit 08, as any method may be measured."""
    reference = load_reference("08_lora")
    reference.inject(model, ["q_proj", "down_proj"], lambda base: reference.LoRALinear(base, 8, 16.0))


def nothing(model: Llama) -> None:
    """Everything is trained."""


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("prepare", [nothing, with_lora])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_fake_equals_real_to_the_byte(prepare, checkpointing, dtype):
    small = replace(MODEL, num_hidden_layers=3)
    model = Llama(small).to({"fp32": torch.float32, "bf16": torch.bfloat16}[dtype])
    prepare(model)
    model.model.gradient_checkpointing = checkpointing
    input_ids = torch.randint(0, 1000, (2, 48))
    real = measure_training_step(model, lambda: next_token_loss(model, input_ids))
    fake = simulate_training_step(
        small, prepare, dtype=dtype, batch_size=2, sequence_length=48, checkpointing=checkpointing, whole_model=True
    )
    assert fake == real


@pytest.mark.parametrize(("tokens", "checkpointing"), [(16, False), (256, False), (256, True)])
@pytest.mark.parametrize("recipe", RECIPES)
def test_two_and_three_layers_tell_what_six_take(recipe, checkpointing, tokens):
    settings = {"checkpointing": checkpointing, "sequence_length": tokens}
    assert RECIPES[recipe].measure(MODEL, **settings) == RECIPES[recipe].measure(MODEL, whole_model=True, **settings)


def test_7b_as_published():
    step = RECIPES["fp16"].measure(PRESETS["LLaMA-7B"])
    # transformers' model has 512 bytes of buffers more, for the angles of RoPE.
    assert step.parameters + step.gradients + step.optimizer_state == 53_907_326_604 - 512
    qlora = RECIPES["QLoRA"].measure(PRESETS["LLaMA-65B"], checkpointing=True)
    full = RECIPES["bf16, fp32 moments"].measure(PRESETS["LLaMA-65B"])
    assert full.peak > 780e9 and qlora.peak < 48e9  # Dettmers et al. 2023, abstract


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "tiny"])
def test_the_count_is_that_of_the_model(name):
    with torch.device("meta"):
        model = Llama(PRESETS[name])
    assert count_parameters(PRESETS[name]) == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_formula_of_what_stays_is_measured(recipe):
    config = PRESETS["LLaMA-7B"]
    step = RECIPES[recipe].measure(config)
    linear = config.num_hidden_layers * (4 * config.hidden_size**2 + 3 * config.hidden_size * config.intermediate_size)
    trained = step.gradients // 2 if "LoRA" in recipe else 0
    formula = training_bytes(count_parameters(config), linear, trained, recipe)
    measured = {"weights": step.parameters, "gradients": step.gradients, "optimizer state": step.optimizer_state}
    for category, size in measured.items():
        assert size == pytest.approx(formula[category], rel=1e-4), category


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("seed", range(2))
def test_the_formula_of_activations_is_measured(checkpointing, seed):
    case = activations_case(torch.Generator().manual_seed(seed), checkpointing)
    settings = {name: case.pop(name) for name in ("batch_size", "sequence_length", "checkpointing")}
    # The check takes few layers, to answer soon. With more of them, the small tensors outside weigh less.
    config = LlamaConfig(**case | {"num_hidden_layers": 9})
    measured = simulate_training_step(config, **settings).activations
    assert measured == pytest.approx(activation_bytes(config, **settings), rel=0.01)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_the_formula_of_activations_leaves_out_is_known(checkpointing):
    case = activations_case(torch.Generator().manual_seed(0), checkpointing)
    hidden, vocab, rows, tokens = (case[name] for name in ("hidden_size", "vocab_size", "batch_size", "sequence_length"))
    formula = rows * tokens * ((4 + 2 + 2) * hidden + 4 * vocab)
    angles = 2 * 2 * tokens * hidden // case["num_attention_heads"]  # cosines and sines, in bf16
    ids, shifted, scale = 8 * rows * tokens, 8 * rows * (tokens - 1), 4 * rows * tokens
    last_logits, losses = 4 * rows * vocab, 8
    assert exact_activations(case)["once"] == formula + angles + ids + shifted + scale - last_logits + losses


def test_a_method_that_treats_layers_differently_is_measured_whole():
    def last_layer(model: Llama) -> None:
        model.requires_grad_(False)
        model.model.layers[-1].requires_grad_(True)

    with pytest.raises(ValueError, match="whole_model=True"):
        simulate_training_step(MODEL, last_layer)
    assert simulate_training_step(MODEL, last_layer, whole_model=True).gradients > 0


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"batch_size": 0}, "batch_size must be positive"),
        ({"sequence_length": -1}, "sequence_length must be positive"),
        ({"sequence_length": 1}, "at least 2"),
        ({"dtype": "fp12"}, "unknown dtype 'fp12'"),
        ({"prepare": lambda model: model.requires_grad_(False)}, "nothing to measure"),
    ],
)
def test_bad_sizes_get_clear_errors(settings, said):
    with pytest.raises(ValueError, match=said):
        simulate_training_step(MODEL, **settings)


def test_the_calculator_draws_and_refuses(monkeypatch, capsys):
    memory = calculator.needs("SmolLM2-135M", "QLoRA", sequence_length=64)
    figure = calculator.picture(memory, "T4, 16 GB", "SmolLM2")
    assert "fits" in figure.axes[0].get_title()
    with pytest.raises(ValueError, match="unknown model"):
        calculator.needs("GPT-5")
    with pytest.raises(ValueError, match="unknown recipe"):
        calculator.needs(recipe="magic")
    with pytest.raises(ValueError, match="rank"):
        calculator.needs(rank=0)
    monkeypatch.setitem(__import__("sys").modules, "ipywidgets", None)
    monkeypatch.setattr(calculator.plots, "show", lambda figure, alt: print(alt))
    calculator.calculator()
    assert "fits on RTX 4090" in capsys.readouterr().out


def sharded(dtype: torch.dtype = torch.bfloat16):
    return partial(load_reference("14_many_gpus").shard, compute_dtype=dtype)


@pytest.mark.parametrize("recipe", ["LoRA", "QLoRA", "full"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_few_sharded_layers_tell_what_many_will(recipe, checkpointing):
    recipe = RECIPES[recipe] if recipe != "full" else Recipe()
    config = replace(PRESETS["Llama-2-70B"], num_hidden_layers=7)
    simulate = partial(
        simulate_sharded_step, config, recipe.prepare, sharded(), world_size=2, sequence_length=64, checkpointing=checkpointing
    )
    assert simulate() == simulate(whole_model=True)
    assert not dist.is_initialized()


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_rank_on_paper_takes_and_sends_what_a_real_one_does(world_size):
    config = replace(PRESETS["tiny"], num_hidden_layers=4)
    recipe = RECIPES["LoRA"]
    model = Llama(config).to(torch.bfloat16)
    recipe.prepare(model)
    model.model.gradient_checkpointing = True

    def a_step():
        sharded()(model, init_device_mesh("cpu", (world_size,)))
        optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])
        tracker, input_ids = PeftMemTracker(), torch.ones(1, 64, dtype=torch.long)
        tracker.track_external(model, optimizer)
        with tracker:
            for _ in range(2):
                tracker.reset_mod_stats()
                with Traffic() as traffic:
                    next_token_loss(model, input_ids).backward()
                optimizer.step()
                optimizer.zero_grad()
        return tracker.bytes_by_category("peak")["Total"] - input_ids.nbytes, traffic.sent()

    peak, sent = run(a_step, world_size)[0]
    simulated = simulate_sharded_step(config, recipe.prepare, sharded(), world_size=world_size, sequence_length=64)
    assert (simulated.memory.peak, simulated.sent) == (peak, pytest.approx(sent))


def test_nothing_is_simulated_with_nonsense():
    with pytest.raises(ValueError, match="world_size must be positive"):
        simulate_sharded_step(PRESETS["tiny"], nothing, sharded(), world_size=0)
    with pytest.raises(ValueError, match="sequence_length"):
        simulate_sharded_step(PRESETS["tiny"], nothing, sharded(), world_size=2, sequence_length=1)
