"""`activation_bytes`: what forward keeps for backward."""

from dataclasses import asdict
from functools import cache

import torch

from autograder.checking.cases import between
from autograder.checking.drive import Observation
from autograder.checking.exercise import Exercise
from peftlab.llama import Llama, LlamaConfig, set_gradient_checkpointing
from peftlab.simulate import fake_parameters, next_token_loss
from peftlab.tracker import PeftMemTracker


def activation_bytes(config: LlamaConfig, batch_size: int, sequence_length: int, checkpointing: bool) -> float:
    """Return the bytes that forward keeps for backward, in 16 bits (after Korthikanti et al. 2022, section 4)."""
    tokens = batch_size * sequence_length
    hidden = config.hidden_size
    if checkpointing:
        layer = 2 * hidden
    else:
        norms = 2 * (4 + 2 + 2) * hidden
        key_value = config.num_key_value_heads * config.head_dim
        attention = 2 * (hidden + key_value + key_value + hidden) + 4 * config.num_attention_heads
        mlp = 4 * 2 * config.intermediate_size
        layer = norms + attention + mlp
    head = (4 + 2 + 2) * hidden + 4 * config.vocab_size
    return tokens * (config.num_hidden_layers * layer + head)


def activations_case(generator: torch.Generator, checkpointing: bool, grouped: bool = True) -> dict:
    """Return a model that is wide enough for each tensor to count."""
    heads = between(generator, 3, 5)
    return asdict(
        LlamaConfig(
            vocab_size=between(generator, 1_000, 2_000),
            hidden_size=heads * 128,
            intermediate_size=heads * 320 + 64,
            num_hidden_layers=between(generator, 1, 2),
            num_attention_heads=2 * heads,
            num_key_value_heads=heads if grouped else 2 * heads,
        )
    ) | {
        "batch_size": between(generator, 2, 3),
        "sequence_length": 64 * between(generator, 3, 6),
        "checkpointing": checkpointing,
    }


def drive_activations(activation_bytes, batch_size, sequence_length, checkpointing, num_hidden_layers, **sizes):
    """Estimate for one config, and for the same with one layer more."""
    from peftlab.llama import LlamaConfig

    configs = [LlamaConfig(num_hidden_layers=layers, **sizes) for layers in (num_hidden_layers, num_hidden_layers + 1)]
    estimate, more = (activation_bytes(config, batch_size, sequence_length, checkpointing) for config in configs)
    return {"estimate": float(estimate), "one more layer": float(more) - float(estimate)}


@cache
def _measured(sizes: tuple, batch_size: int, sequence_length: int, checkpointing: bool) -> int:
    """Return the bytes that are there after forward and were not before it, by fake tensors, which have no numbers."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with torch.device("meta"):
        model = Llama(LlamaConfig(**dict(sizes))).to(torch.bfloat16)
    set_gradient_checkpointing(model.train(), checkpointing)
    with FakeTensorMode():
        fake_parameters(model)
        input_ids = torch.empty((batch_size, sequence_length), dtype=torch.long)
        tracker = PeftMemTracker()
        tracker.track_external(model)
        with tracker:
            before = tracker.bytes_by_category("current")["Total"]
            loss = next_token_loss(model, input_ids)  # while it is there, so is what it needs
            after = tracker.bytes_by_category("current")["Total"]
    del loss
    return after - before


def exact_activations(case: dict) -> dict:
    """Return the measured bytes of one more layer, and of what is there once.

    A norm's scale, 4 bytes a token, is left out: the unit's table does not list it.
    """
    sizes = dict(case)
    settings = {name: sizes.pop(name) for name in ("batch_size", "sequence_length", "checkpointing")}
    layers = sizes["num_hidden_layers"]
    few, more = (_measured(tuple({**sizes, "num_hidden_layers": count}.items()), **settings) for count in (layers, layers + 1))
    scales = 0 if case["checkpointing"] else 2 * 4 * case["batch_size"] * case["sequence_length"]
    return {"one more layer": more - few - scales, "once": few - layers * (more - few)}


def _parts(case: dict) -> tuple[str, str]:
    """Return what the two parts are called."""
    how = "with checkpointing" if case["checkpointing"] else "without checkpointing"
    return f"the bytes that one more layer keeps, {how},", f"the bytes that the last norm and the logits keep, {how},"


def read_activations(observation: Observation, case: dict) -> Observation:
    """Split the estimate into its parts; one that agrees with the measured bytes becomes these.

    A layer agrees to the byte. What is there once is measured with RoPE's angles, the labels and the last norm's scale, and
    without the last token's logits (`tests/lab_bench/test_simulate.py` has the sum): there 2% are allowed.
    """
    layer, whole = observation["one more layer"], observation["estimate"]
    once = whole - case["num_hidden_layers"] * layer
    agrees = abs(layer - case["one more layer"]) <= 1, abs(once / case["once"] - 1) <= 0.02
    measured = float(case["one more layer"]), float(case["once"])
    return dict(zip(_parts(case), (known if same else own for same, known, own in zip(agrees, measured, (layer, once)))))


_KEPT_BY_ATTENTION = "2 * (hidden + key_value + key_value + hidden) + 4 * config.num_attention_heads"

check_activation_bytes = Exercise(
    spec=[activation_bytes],
    cases=lambda generator: [activations_case(generator, False), activations_case(generator, True)],
    driver=drive_activations,
    reading=read_activations,
    exact=exact_activations,
    tolerance=lambda case: dict.fromkeys(_parts(case), 1.0),
    mistakes={
        "the batch is missing: every sequence has its own activations": {"batch_size * sequence_length": "sequence_length"},
        "the layers are missing": {"config.num_hidden_layers * layer": "layer"},
        "the head is missing: its logits, in fp32, are the largest single tensor": {
            "config.num_hidden_layers * layer + head": "config.num_hidden_layers * layer"
        },
        "the logits are counted in 16 bits: the loss is taken in fp32": {"4 * config.vocab_size": "2 * config.vocab_size"},
        "a norm works in fp32: what it keeps of its input has 4 bytes a number": {
            "2 * (4 + 2 + 2) * hidden": "2 * (2 + 2 + 2) * hidden"
        },
        "there are two norms in a layer": {"norms = 2 * (4 + 2 + 2)": "norms = (4 + 2 + 2)"},
        "the MLP keeps four tensors of intermediate_size: gate, its silu, up, and the product that down_proj reads": {
            "4 * 2 * config.intermediate_size": "2 * 2 * config.intermediate_size"
        },
        "the MLP keeps silu(gate) as well as gate: the product needs one and silu's gradient the other": {
            "4 * 2 * config.intermediate_size": "3 * 2 * config.intermediate_size"
        },
        "keys and values are counted as wide as queries": {"config.num_key_value_heads * config.head_dim": "hidden"},
        "the logarithm of the softmax's denominator is missing: 4 bytes for each head": {
            _KEPT_BY_ATTENTION: "2 * (hidden + key_value + key_value + hidden)"
        },
        "the logarithm of the softmax's denominator is one number for each head, not for each feature": {
            "4 * config.num_attention_heads": "4 * hidden"
        },
        "attention keeps its keys and values as well as its queries and its output": {
            _KEPT_BY_ATTENTION: "2 * (hidden + hidden)"
        },
        "a matrix of sequence_length x sequence_length is counted for each head: flash attention never stores it": {
            _KEPT_BY_ATTENTION: _KEPT_BY_ATTENTION + " + 2 * config.num_attention_heads * sequence_length",
        },
        "with checkpointing a layer keeps its input alone, in 2 bytes": {"layer = 2 * hidden": "layer = 4 * hidden"},
        "checkpointing is ignored": {"if checkpointing:": "if False:"},
        "with checkpointing the head is still there": {
            "head = (4 + 2 + 2) * hidden + 4 * config.vocab_size": (
                "head = 0 if checkpointing else (4 + 2 + 2) * hidden + 4 * config.vocab_size"
            )
        },
        "every number is counted in fp32": {
            "return tokens * (": "return 2 * tokens * (",
        },
    },
    variants={
        "attention in one line": {_KEPT_BY_ATTENTION: "4 * (hidden + key_value + config.num_attention_heads)"},
        "in units of s b h": """
            def activation_bytes(config, batch_size, sequence_length, checkpointing):
                sbh = sequence_length * batch_size * config.hidden_size
                groups = config.num_key_value_heads / config.num_attention_heads
                ratio = config.intermediate_size / config.hidden_size
                heads = 4 * config.num_attention_heads / config.hidden_size
                layer = 2 if checkpointing else 20 + 4 * groups + 8 * ratio + heads
                return sbh * (layer * config.num_hidden_layers + 8 + 4 * config.vocab_size / config.hidden_size)
        """,
        "tensor by tensor": """
            def activation_bytes(config, batch_size, sequence_length, checkpointing):
                def norm():
                    return sum(width * config.hidden_size for width in (4, 2, 2))
                kept = 0
                for _ in range(config.num_hidden_layers):
                    if checkpointing:
                        kept += config.hidden_size * 2
                        continue
                    kept += norm() + norm()
                    kept += 2 * config.num_attention_heads * config.head_dim * 2
                    kept += 2 * config.num_key_value_heads * config.head_dim * 2
                    kept += 4 * config.num_attention_heads
                    for _ in ("gate", "silu", "up", "product"):
                        kept += 2 * config.intermediate_size
                kept += norm() + 4 * config.vocab_size
                return kept * batch_size * sequence_length
        """,
    },
)
