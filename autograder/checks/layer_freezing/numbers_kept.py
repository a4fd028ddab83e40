"""`numbers_kept`: what each layer leaves for backward."""

from collections.abc import Sequence

import torch

from autograder.cases import between
from autograder.checks.layer_freezing.cases import sizes_of_a_llama
from autograder.drive import Observation
from autograder.exercise import Exercise
from peftlab.llama import LlamaConfig


def numbers_kept(config: LlamaConfig, layers: Sequence[int], embedding: bool = False) -> list[int]:
    """Return how many numbers per token each decoder layer keeps for backward, if these layers are trained."""
    hidden, wide = config.hidden_size, config.intermediate_size
    key_value = config.num_key_value_heads * config.head_dim
    lowest = -1 if embedding else min(layers, default=config.num_hidden_layers)
    answer = []
    for layer in range(config.num_hidden_layers):
        kept = 0
        if layer >= lowest:
            kept += hidden + 2 * key_value  # queries, keys and values, for attention
            kept += hidden + config.num_attention_heads  # what attention gives, and a log-sum per head
            kept += hidden + 1  # the second norm: its input, and what that is multiplied by
            kept += 3 * wide  # gate, up and silu(gate), for the two nonlinear products
        if layer > lowest:
            kept += hidden + 1  # the first norm, whose input wants a gradient
        if layer in layers:
            kept += 2 * hidden + 2 * hidden  # of each norm, for its gain and for the projections that read it
            kept += wide  # what the down projection reads
        answer.append(kept)
    return answer


def kept_case(generator: torch.Generator, measure: bool = False, tied: bool = True) -> dict:
    """Return a model's sizes and sets of trained layers: none, all, the embedding alone, and random ones with gaps.

    A tie is in the config, and tells nothing: what is trained stands in the request.
    """
    sizes = sizes_of_a_llama(generator, layers=(5, 6))
    layers = sizes[3]
    low, high = between(generator, 1, layers - 4), between(generator, layers - 2, layers - 1)
    chosen = [
        [[low, high], False],
        [[high], True],
        [[layers - 1, layers - 2], False],
        [[0], False],
        [[], True],
        [list(range(layers)), False],
        [[], False],
    ]
    seed = between(generator, 0, 2**31 - 1)
    return {"sizes": sizes, "tied": tied, "seed": seed, "requests": chosen, "measure": measure}


def drive_numbers_kept(numbers_kept, sizes, tied, seed, requests, measure):
    """Return the answer for each request and, if asked to measure, what a real Llama of that size keeps."""
    import torch

    from peftlab.llama import Llama, LlamaConfig, rotary_angles

    config = LlamaConfig(*sizes, tie_word_embeddings=tied)
    answers, measured = [], []
    for layers, embedding in requests:
        answer = numbers_kept(config, list(layers), embedding) if embedding else numbers_kept(config, list(layers))
        if not isinstance(answer, (list, tuple)):
            answers.append(type(answer).__name__)
        elif not all(hasattr(number, "__float__") for number in answer):
            answers.append("a list of other things")
        else:
            answers.append([float(number) for number in answer])
    if not measure:
        return {"answers": answers}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Llama(config)
        batch, length = 2, 5
        input_ids = torch.randint(0, config.vocab_size, (batch, length))
    angles = rotary_angles(torch.arange(length), config.head_dim, config.rope_theta)
    for layers, embedding in requests:
        model.requires_grad_(False)
        model.model.embed_tokens.requires_grad_(embedding)
        for number in layers:
            model.model.layers[number].requires_grad_(True)
        there_anyway = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *angles)}
        x, counts, alive = model.model.embed_tokens(input_ids), [], []
        for layer in model.model.layers:
            kept = {}

            def note(tensor, kept=kept, alive=alive):
                alive.append(tensor)
                kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
                return tensor

            alive.append(x)
            with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
                x = layer(x, *angles, None)
            size = sum(size for pointer, size in kept.items() if pointer not in there_anyway)
            counts.append(size / (4 * batch * length))
        measured.append(counts)
    return {"answers": answers, "measured": measured}


def situation(layer: int, layers: Sequence[int], embedding: bool) -> str:
    """Return in which of the four situations of the notebook a layer is."""
    lowest = -1 if embedding else min(layers, default=layer + 1)
    if layer in layers:
        return "trained, the lowest of all" if layer == lowest else "trained, and something below it is trained too"
    return "frozen, above a trained one" if layer > lowest else "frozen, below every trained one"


def read_numbers_kept(observation: Observation, case: dict) -> Observation:
    """Put each answer beside its request, by the layers' situations; then say whether measurement agrees."""
    tie = ", tie_word_embeddings=True" if case["tied"] else ""
    config, count = f"LlamaConfig({', '.join(map(str, case['sizes']))}{tie})", case["sizes"][3]
    read = {}
    for (layers, embedding), answer in zip(case["requests"], observation["answers"], strict=True):
        call = f"numbers_kept({config}, {layers}{', embedding=True' if embedding else ''})"
        is_list = isinstance(answer, list)
        read[f"what {call} returns"] = "a list of numbers" if is_list else answer
        read[f"the length of {call}"] = len(answer) if is_list else 0
        kinds: dict[str, list[int]] = {}
        for layer in range(count):
            kinds.setdefault(situation(layer, layers, embedding), []).append(layer)
        for kind, entries in kinds.items():
            numbers = [answer[entry] for entry in entries if entry < len(answer)] if is_list else []
            read[f"the list of entries {entries} ({kind}) of {call}"] = [int(n) if n.is_integer() else n for n in numbers]
    if case["measure"]:
        read["the lists are what a real Llama keeps"] = observation["answers"] == observation["measured"]
    return read


_QKV = "kept += hidden + 2 * key_value "
_ATTENDED = "kept += hidden + config.num_attention_heads "
_SECOND_NORM = "kept += hidden + 1  # the second norm"
_FIRST_NORM = "kept += hidden + 1  # the first norm"
_MLP = "kept += 3 * wide "
_NORMED = "kept += 2 * hidden + 2 * hidden "
_PRODUCT = "kept += wide  # what"
_REACHED, _INPUT, _LEARNS = "if layer >= lowest:", "if layer > lowest:", "if layer in layers:"
_EMPTY = "min(layers, default=config.num_hidden_layers)"

check_numbers_kept = Exercise(
    spec=[numbers_kept],
    cases=lambda generator: [kept_case(generator, tied=False), kept_case(generator)],
    driver=drive_numbers_kept,
    reading=read_numbers_kept,
    mistakes={
        "a frozen layer keeps nothing here: above a trained one the gradient has to pass through it, and needs what it saw": {
            _REACHED: "if layer in layers:",
            _INPUT: "if layer in layers and layer > lowest:",
        },
        "a frozen layer keeps as much as a trained one here: what only a weight's gradient needs is dropped": {
            _LEARNS: "if layer >= lowest:",
        },
        "layers below the lowest trained one keep something here: backward never comes there": {
            _REACHED: "if True:",
            _INPUT: "if True:",
        },
        "a trained embedding is overlooked: then backward goes through every layer": {"-1 if embedding else ": ""},
        "the config's tie is taken for a trained embedding: only `embedding` says so": {
            "-1 if embedding else": "-1 if embedding or config.tie_word_embeddings else",
        },
        "a trained embedding is taken for a trained layer 0: that layer only passes the gradient on": {
            _LEARNS: "if layer in layers or (embedding and layer == 0):",
        },
        "the lowest trained layer keeps the input of its first norm here: nothing below wants a gradient, so it is dropped": {
            _INPUT: "if layer >= lowest:",
        },
        "the lowest trained layer keeps nothing of its second norm's input here: what attention adds to it wants a gradient": {
            _SECOND_NORM: "kept += 0 if layer == lowest else hidden + 1  # the second norm",
        },
        "keys and values are counted as wide as the queries: they have num_key_value_heads * head_dim numbers each": {
            _QKV: "kept += 3 * hidden ",
        },
        "keys and values are left out: attention keeps them beside the queries": {_QKV: "kept += hidden "},
        "what attention keeps of its softmax is left out: one number a head, the logarithm of the sum": {
            _ATTENDED: "kept += hidden ",
        },
        "the output of attention is left out: attention keeps it for its own backward": {
            _ATTENDED: "kept += config.num_attention_heads ",
        },
        "the output of attention is left out where the layer is frozen: attention needs it for its own backward there too": {
            _ATTENDED: "kept += (hidden if layer in layers else 0) + config.num_attention_heads ",
        },
        "the output of attention is counted again for o_proj, where that is trained: it is one and the same tensor": {
            _NORMED: "kept += hidden + 2 * hidden + 2 * hidden ",
        },
        "what a norm's input is multiplied by is left out: it is one number a token": {
            _SECOND_NORM: "kept += hidden  # the second norm",
            _FIRST_NORM: "kept += hidden  # the first norm",
        },
        "what a norm's input is multiplied by is counted as `hidden` numbers: it is one number a token": {
            _SECOND_NORM: "kept += 2 * hidden  # the second norm",
            _FIRST_NORM: "kept += 2 * hidden  # the first norm",
        },
        "what the first norm's input is multiplied by is counted as `hidden` numbers: it is one number a token": {
            _FIRST_NORM: "kept += 2 * hidden  # the first norm",
        },
        "what the second norm's input is multiplied by is counted as `hidden` numbers: it is one number a token": {
            _SECOND_NORM: "kept += 2 * hidden  # the second norm",
        },
        "each norm's output is counted once: before the gain for the gain's gradient, and after it for the projections'": {
            _NORMED: "kept += 2 * hidden ",
        },
        "the outputs of the norms are left out: the gain and the projections of a trained layer need them": {
            _NORMED: "kept += 0 "
        },
        "frozen norms keep their products here: these are kept for the gradient of a gain, or of a weight that reads them": {
            _FIRST_NORM: "kept += hidden + 1 + (0 if layer in layers else 2 * hidden)  # the first norm",
        },
        "a frozen layer keeps one product of a norm here: it is kept for the gradient of the gain, or of a weight that reads it": {
            _FIRST_NORM: "kept += hidden + 1 + (0 if layer in layers else hidden)  # the first norm",
        },
        "what the second norm's input is multiplied by is left out in the lowest trained layer": {
            _SECOND_NORM: "kept += hidden + (layer > lowest)  # the second norm",
        },
        "the MLP keeps three wide vectors even where it is frozen: gate, up and silu(gate) make the product": {
            _MLP: "kept += (3 if layer in layers else 2) * wide ",
        },
        "the product that down_proj reads is left out: its gradient needs it where it is trained": {
            _PRODUCT: "kept += 0  # what"
        },
        "the product that down_proj reads is counted where down_proj is frozen: only its weight's gradient needs it": {
            _MLP: "kept += 4 * wide ",
            _PRODUCT: "kept += 0  # what",
        },
        "the list begins with the last layer: it should begin with layer 0": {"return answer": "return answer[::-1]"},
        "the sum over the layers is returned: a list, one number a layer": {"return answer": "return sum(answer)"},
        "no trained layer at all is not provided for: then nothing is kept": {_EMPTY: "min(layers)"},
        "bytes are returned: count numbers per token": {"return answer": "return [4 * kept for kept in answer]"},
        "the first entry of `layers` is taken for the lowest: they come in any order": {
            _EMPTY: "(layers[0] if layers else config.num_hidden_layers)",
        },
    },
    variants={
        "a sum of three kinds": """
            def numbers_kept(config, layers, embedding=False):
                h, m, kv = config.hidden_size, config.intermediate_size, config.head_dim * config.num_key_value_heads
                passing = 3 * h + 2 * kv + config.num_attention_heads + 1 + 3 * m
                result, wanted = [], embedding
                for number in range(config.num_hidden_layers):
                    learns = number in set(layers)
                    below, wanted = wanted, wanted or learns
                    result.append(wanted * passing + below * (h + 1) + learns * (4 * h + m))
                return result
        """,
        "a comprehension": """
            def numbers_kept(config, layers, embedding=False):
                h, m, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
                kv = h * config.num_key_value_heads // heads
                wants = [embedding or any(low < number for low in layers) for number in range(config.num_hidden_layers)]
                return [
                    (w or n in layers) * (3 * h + 3 * m + 2 * kv + heads + 1) + w * (h + 1) + (n in layers) * (4 * h + m)
                    for n, w in enumerate(wants)
                ]
        """,
        "tensor by tensor": """
            def numbers_kept(config, layers, embedding=False):
                h, m, d = config.hidden_size, config.intermediate_size, config.head_dim
                kept = []
                input_wants = bool(embedding)
                for number in range(config.num_hidden_layers):
                    trained, count = number in layers, 0
                    inside = input_wants or trained
                    for norm_input_wants in (input_wants, inside):
                        if norm_input_wants:
                            count += h + 1
                        if trained:
                            count += h
                            count += h
                    if inside:
                        count += (config.num_attention_heads + 2 * config.num_key_value_heads) * d
                        count += config.num_attention_heads * (d + 1)
                        for _ in ("gate", "up", "silu"):
                            count += m
                    if trained:
                        count += m
                    kept.append(count)
                    input_wants = inside
                return tuple(kept)
        """,
    },
)
