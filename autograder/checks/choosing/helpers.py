"""What the unit's drivers call: it travels with them, so it stands alone."""


def any_row(**given):
    """Return a results row with these fields; the others have any values."""
    from peftlab.memory import StepMemory
    from peftlab.results import Row

    others = {
        "unit": "any",
        "trainable_parameters": 1,
        "total_parameters": 2,
        "adapter_bytes": 3,
        "memory": StepMemory(1, 2, 3, 4, 5),
        "seconds_per_step": 1.0,
        "metric": "accuracy",
        "score_before": 0.5,
        "score_after": 0.9,
        "forgetting": 0.1,
        "losses": [1.0] * 20,
        "versions": {},
        "hardware": "any",
        "short": False,
    }
    return Row(**others | given)
