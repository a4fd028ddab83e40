"""`classify`: which kind of method it is."""

import torch

from autograder.checking.exercise import Exercise


def classify(base: frozenset[str], trained: frozenset[str], deployed: frozenset[str]) -> str:
    """Return the kind of a method (the taxonomy of Lialin et al. 2023, arXiv 2303.15647)."""
    if trained == base:
        return "full"
    if trained <= base:
        return "selective"
    if deployed == base:
        return "reparameterization"
    return "additive"


def evidence_case(generator: torch.Generator, layers: int = 2) -> dict:
    """Return what the methods of this course change, in a model of two layers, in random order."""
    base = ["embed_tokens.weight", "norm.weight"]
    for layer in range(layers):
        base += [f"layers.{layer}.{name}" for name in ("q_proj.weight", "q_proj.bias", "down_proj.weight", "down_proj.bias")]
    linear = [name for name in base if "proj.weight" in name]
    factors = [name.replace("weight", factor) for name in linear for factor in ("lora_A", "lora_B")]
    adapters = [f"layers.{layer}.adapter.{name}" for layer in range(layers) for name in ("down", "up")]
    prefix = [f"layers.{layer}.prefix_{name}" for layer in range(layers) for name in ("keys", "values")]
    evidence = [
        ["full fine-tuning", base, base, base],
        ["BitFit", base, [name for name in base if name.endswith("bias")], base],
        ["freezing all layers but the last", base, [name for name in base if f"layers.{layers - 1}." in name], base],
        ["LoRA, merged", base, factors, base],
        ["adapters", base, adapters, [*base, *adapters]],
        ["prompt tuning", base, ["soft_prompt"], [*base, "soft_prompt"]],
        ["prefix tuning", base, prefix, [*base, *prefix]],
        ["prefix tuning through an MLP, which is thrown away", base, ["mlp.up", "mlp.down"], [*base, *prefix]],
        ["LoRA with trained norms, merged", base, [*factors, "norm.weight"], base],
        ["prompt tuning with a trained norm", base, ["soft_prompt", "norm.weight"], [*base, "soft_prompt"]],
    ]
    order = torch.randperm(len(evidence), generator=generator).tolist()
    return {"evidence": [evidence[index] for index in order]}


def drive_classify(classify, evidence):
    """Classify each method from the names of tensors."""
    return {
        f"the kind of {label}": str(classify(frozenset(base), frozenset(trained), frozenset(deployed)))
        for label, base, trained, deployed in evidence
    }


check_classify = Exercise(
    spec=[classify],
    cases=lambda generator: [evidence_case(generator)],
    driver=drive_classify,
    mistakes={
        "full fine-tuning is called selective: it selects nothing, for it trains all that there is": {
            'if trained == base:\n        return "full"\n    ': ""
        },
        "LoRA is called additive: what it adds while it trains is gone when it is merged": {
            'if deployed == base:\n        return "reparameterization"\n    ': ""
        },
        "a selective method is called a reparameterization: ask first whether anything new is trained": {
            'if trained <= base:\n        return "selective"\n    if deployed == base:\n        return "reparameterization"\n': (
                'if deployed == base:\n        return "reparameterization"\n    if trained <= base:\n        return "selective"\n'
            )
        },
        "every method that trains part of the names is called selective, LoRA and adapters as well": {
            "trained <= base": "len(trained) < len(base)"
        },
        "a method that trains old and new tensors at once is called selective: it is, only if it trains nothing new": {
            "trained <= base": "trained & base"
        },
        "additive and reparameterization are mixed up": {
            '"reparameterization"': '"additive"',
            'return "additive"': 'return "reparameterization"',
        },
        "the names are compared with what is deployed, not with the base": {"trained <= base": "trained <= deployed"},
        "a method is called a reparameterization if what it trained is gone: look for any new tensor in what is deployed": {
            "deployed == base": "not (trained - base) & deployed"
        },
        "only names that differ from the base's are looked at: LoRA's norms are trained too, and it stays a reparameterization": {
            "deployed == base": "deployed == base and not trained & base"
        },
    },
    variants={
        "by differences": {
            "trained <= base": "not trained - base",
            "deployed == base": "not (deployed ^ base)",
        },
        "from what is new": """
            def classify(base, trained, deployed):
                new = {name for name in trained if name not in base}
                if new:
                    left = [name for name in deployed if name not in base]
                    return "additive" if left else "reparameterization"
                return "full" if len(trained) == len(base) else "selective"
        """,
        "as a match": """
            def classify(base, trained, deployed):
                match (trained.issubset(base), trained.issuperset(base), deployed.issubset(base)):
                    case (True, True, _):
                        return "full"
                    case (True, False, _):
                        return "selective"
                    case (False, _, True):
                        return "reparameterization"
                    case _:
                        return "additive"
        """,
    },
)
