"""The hidden cases of unit 11_choosing: for every check, what kind of case it is and how to make one."""

from autograder.checks import choosing

CASES = {
    choosing.check_merge_rows: {
        "for more rows a set": lambda generator: choosing.merge_case(generator, several=4),
        "without rows of the reader's own": lambda generator: choosing.merge_case(generator) | {"own": []},
        "without shipped rows": lambda generator: choosing.merge_case(generator) | {"shipped": []},
    },
    choosing.check_compare: {
        "for two seeds": lambda generator: choosing.compare_case(generator, seeds=2),
        "for five seeds": lambda generator: choosing.compare_case(generator, seeds=5),
        "for fewer test rows": lambda generator: choosing.compare_case(generator, few=60, many=10**5),
    },
    choosing.check_pareto_front: {
        "for costs in bytes": lambda generator: choosing.pareto_case(generator, scale=1e9),
        "for costs below 1": lambda generator: choosing.pareto_case(generator, scale=1e-3),
    },
    choosing.check_largest_batch: {
        "with a limit of 300": lambda generator: choosing.batch_case(generator, limit=300),
        "with a limit of 64": lambda generator: choosing.batch_case(generator, limit=64),
    },
    choosing.check_broken_rules: {
        "in megabytes": lambda generator: choosing.rules_case(generator, unit=10**6),
        "in terabytes": lambda generator: choosing.rules_case(generator, unit=10**12),
    },
    choosing.check_recommend: {
        "for a model a thousandth the size": lambda generator: choosing.evidence_case(generator, unit=10**6),
        "where some qualities are not known": lambda generator: choosing.evidence_case(generator, measured=False),
    },
    choosing.check_choose_for: {
        "in the first four": lambda generator: {"letters": "ABCD"},
        "in the last four": lambda generator: {"letters": "EFGH"},
    },
    choosing.check_heaviest_batch: {
        "for one long row": lambda generator: choosing.lengths_case(generator),
        "for a short last batch": lambda generator: choosing.lengths_case(generator, "a long row at the end"),
        "for rows of like length": lambda generator: choosing.lengths_case(generator, "middling rows"),
    },
}

# Automatic mutants that no check rejects (`python -m autograder.proving.prove`), and why they may live.
SURVIVORS = {
    "list(max(of_key.values(), key=len).values())  ->  max(of_key.values(), key=len).values()": "the same rows, in a view of a dict",
    "one - other  ->  other - one": "a standard deviation does not depend on the sign",
    "abs(found['difference']) > 2 * found['error']  ->  abs(found['difference']) >= 2 * found['error']": (
        "a difference of exactly two errors, to the last bit, does not come up"
    ),
    "found['difference'] > 0  ->  found['difference'] >= 0": "a difference of zero is never more than its error",
    "cost + score  ->  cost - score": "a difference with NaN is NaN as a sum with it is",
}
