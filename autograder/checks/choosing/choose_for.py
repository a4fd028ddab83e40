"""`choose_for`: the method for each of eight situations."""

from collections.abc import Mapping

from autograder.checking.drive import Observation
from autograder.checking.exercise import Exercise


def choose_for() -> dict[str, str]:
    """Return the method for each of the situations A to H, or "none"."""
    return {
        "A": "qlora",
        "B": "lora",
        "C": "lora",
        "D": "prompt_tuning",
        "E": "none",
        "F": "full",
        "G": "prompt_tuning",
        "H": "layer_freezing",
    }


_CHOICES = ["full", "lora", "qlora", "adapters", "prefix_tuning", "prompt_tuning", "bitfit", "layer_freezing", "none"]


def drive_choices(choose_for, letters):
    """Return the choices for some of the letters."""
    choices = choose_for()
    if not isinstance(choices, dict):
        return {"what choose_for returns": type(choices).__name__}
    return {f"the choice for {letter}": str(choices.get(letter)) for letter in letters}


_AS_GOOD_IN_B = ("adapters", "qlora")


def read_choices(observation: Observation, case: dict) -> Observation:
    """Put first which letters have no word of the nine: a message on those says nothing of what is right.

    In B, adapters and QLoRA are as good a choice as LoRA.
    """
    read = dict(observation)
    chosen = {letter: read.get(f"the choice for {letter}") for letter in case["letters"]}
    if chosen.get("B") in _AS_GOOD_IN_B:
        read["the choice for B"] = "lora"
    without = [letter for letter, word in chosen.items() if word not in _CHOICES]
    return {"the list of letters that have none of the nine words": without} | read


def other_choices(named: Mapping[str, Mapping[str, str]]) -> dict[str, dict[str, str]]:
    """Return every wrong choice that has no sentence of its own: the message must not say what the right one is."""
    explained = {edit for edits in named.values() for edit in edits.values()}
    explained |= {f'"B": "{choice}"' for choice in _AS_GOOD_IN_B}
    sentences = {}
    for letter, right in choose_for().items():
        for choice in _CHOICES:
            said = (
                f"{letter}: {choice} does not do what is asked: compare its figures, and what it must reach, with the situation"
            )
            if choice == "none":
                said = f"{letter}: there is a method that does what is asked: look for it once more"
            if choice != right and f'"{letter}": "{choice}"' not in explained:
                sentences[said] = {f'"{letter}": "{right}"': f'"{letter}": "{choice}"'}
    return sentences


_EXPLAINED = {
    "A: LoRA keeps the base in 16 bits, and these 26 GB are more than the card has": {'"A": "qlora"': '"A": "lora"'},
    "A: full fine-tuning adds gradients and optimizer state to weights that do not fit by themselves": {
        '"A": "qlora"': '"A": "full"'
    },
    "A: a soft prompt is tiny, but the base in front of it is still 26 GB": {'"A": "qlora"': '"A": "prompt_tuning"'},
    "B: forty copies of the whole model do not fit on one card": {'"B": "lora"': '"B": "full"'},
    "B: forty times the last four layers, 1.6 GB each, and the base beside them are more than 72 GB": {
        '"B": "lora"': '"B": "layer_freezing"'
    },
    "B: a soft prompt serves forty customers well, but stays below 97 percent of full fine-tuning's score": {
        '"B": "lora"': '"B": "prompt_tuning"'
    },
    "B: prefix tuning stays below 97 percent of full fine-tuning's score in our rows": {'"B": "lora"': '"B": "prefix_tuning"'},
    "B: BitFit stays below 97 percent of full fine-tuning's score in our rows": {'"B": "lora"': '"B": "bitfit"'},
    "C: adapters have a nonlinearity and cannot be merged: they stay in every forward pass": {'"C": "lora"': '"C": "adapters"'},
    "C: QLoRA's factors were trained beside 4-bit weights: merged into the original ones they give other outputs": {
        '"C": "lora"': '"C": "qlora"'
    },
    "C: full fine-tuning adds nothing at inference, but does not fit into 18 GB": {'"C": "lora"': '"C": "full"'},
    "C: the last four layers with their gradients and moments need more than LoRA does, and more than the 18 GB": {
        '"C": "lora"': '"C": "layer_freezing"'
    },
    "D: prefix tuning sets keys and values inside every layer, which this API does not reach": {
        '"D": "prompt_tuning"': '"D": "prefix_tuning"'
    },
    "D: LoRA sits inside the layers, whose weights this API does not reach": {'"D": "prompt_tuning"': '"D": "lora"'},
    "D: something is possible here: the API takes embeddings and returns their gradients": {
        '"D": "prompt_tuning"': '"D": "none"'
    },
    "E: a soft prompt is made of embeddings that are no tokens' and is trained by their gradients: text carries neither": {
        '"E": "none"': '"E": "prompt_tuning"'
    },
    "F: LoRA learns less: where there are billions of new tokens to learn and memory for it, train everything": {
        '"F": "full"': '"F": "lora"'
    },
    "F: in our rows four layers stay below full fine-tuning, and here all of the model fits": {
        '"F": "full"': '"F": "layer_freezing"'
    },
    "G: a LoRA of rank 8 on LLaMA-7B is a file of tens of megabytes; 200 kB were allowed": {
        '"G": "prompt_tuning"': '"G": "lora"'
    },
    "G: BitFit's biases of LLaMA-7B are 1.4 million numbers, megabytes; 200 kB were allowed": {
        '"G": "prompt_tuning"': '"G": "bitfit"'
    },
    "G: keys and values in each of 32 layers make a prefix 64 times as large as a soft prompt of its length": {
        '"G": "prompt_tuning"': '"G": "prefix_tuning"'
    },
    "H: LoRA in every layer sends the gradient through all of them, so that all keep their activations": {
        '"H": "layer_freezing"': '"H": "lora"'
    },
    "H: BitFit has a bias in every layer, so that the gradient passes all of them, and most keep something": {
        '"H": "layer_freezing"': '"H": "bitfit"'
    },
    "H: QLoRA makes the weights smaller; activations, which fill the memory here, stay as they are": {
        '"H": "layer_freezing"': '"H": "qlora"'
    },
    "H: a soft prompt lies before the first layer, so that the gradient passes all of them, and all keep their activations": {
        '"H": "layer_freezing"': '"H": "prompt_tuning"'
    },
}

check_choose_for = Exercise(
    spec=[choose_for],
    cases=lambda generator: [{"letters": "ABCDEFGH"}],
    driver=drive_choices,
    reading=read_choices,
    mistakes=_EXPLAINED | other_choices(_EXPLAINED),
    variants={
        "adapters in B": {'"B": "lora"': '"B": "adapters"'},
        "QLoRA in B": {'"B": "lora"': '"B": "qlora"'},
        "from a string": """
            def choose_for():
                text = "A qlora B adapters C lora D prompt_tuning E none F full G prompt_tuning H layer_freezing".split()
                return dict(zip(text[::2], text[1::2]))
        """,
        "by method": """
            def choose_for():
                by_method = {"lora": "BC", "prompt_tuning": "DG", "full": "F", "qlora": "A", "none": "E", "layer_freezing": "H"}
                return {letter: method for method, letters in by_method.items() for letter in letters}
        """,
    },
)
