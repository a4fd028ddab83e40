"""`compare`: whether the runs of two methods can tell which is better."""

import math
from collections.abc import Sequence
from statistics import mean, stdev

import torch

from autograder.checking.exercise import Exercise
from autograder.checks.choosing.cases import dice
from autograder.checks.choosing.helpers import any_row
from peftlab.comparison import chosen_rate
from peftlab.results import Row


def compare(first: Sequence[Row], second: Sequence[Row], test_rows: int) -> dict:
    """Return by how much the first method is better, the error of that difference, and the verdict."""
    scores = []
    for rows in (first, second):
        rate = chosen_rate(rows)
        scores.append({row.settings["seed"]: row.score_after for row in rows if row.settings["learning_rate"] == rate})
    seeds = [seed for seed in scores[0] if seed in scores[1]]
    if not seeds:
        return {"seeds": 0, "difference": None, "error": None, "verdict": "cannot tell"}
    differences = [scores[0][seed] - scores[1][seed] for seed in seeds]
    difference = mean(differences)
    if len(seeds) == 1:
        return {"seeds": 1, "difference": difference, "error": None, "verdict": "cannot tell"}
    shares = [mean(of[seed] for seed in seeds) for of in scores]
    of_seeds = stdev(differences) / math.sqrt(len(seeds))
    of_test_rows = math.sqrt(sum(p * (1 - p) / test_rows for p in shares))
    error = math.sqrt(of_seeds**2 + of_test_rows**2)
    verdict = "cannot tell"
    if difference > 2 * error:
        verdict = "first"
    if difference < -2 * error:
        verdict = "second"
    return {"seeds": len(seeds), "difference": difference, "error": error, "verdict": verdict}


def compare_case(generator: torch.Generator, seeds: int = 3, few: int = 150, many: int = 10**6) -> dict:
    """Return pairs of methods, each run as [learning rate, seed, late loss, score].

    Args:
        seeds: how many runs a method has at the rate that is chosen.
        few: test rows that are too few to tell a difference of some points.
        many: test rows whose share of the error is next to nothing.
    """
    dicing = dice(generator)
    numbers = dicing.sample(range(20), seeds + 2)
    shared, lonely = numbers[:seeds], numbers[seeds:]

    def swings(size: float) -> list[float]:
        """What each seed adds: numbers of a known spread, whose mean is near 0."""
        return [size * (2 * place / (seeds - 1) - 1) * dicing.uniform(0.9, 1.1) for place in dicing.sample(range(seeds), seeds)]

    def runs(scores: Sequence[float], seeds_of: Sequence[int], rate: float = 0.001, loss: float = 0.3) -> list[list]:
        found = [[rate, seed, loss + dicing.uniform(-0.01, 0.01), score] for seed, score in zip(seeds_of, scores)]
        return dicing.sample(found, len(found))

    def sweep(score: float) -> list[list]:
        """Runs at other rates that must not count: one with a lower loss and one with a higher score."""
        return [[0.01, shared[0], 0.1, score], [0.0001, shared[1], 0.9, dicing.uniform(0.96, 0.99)]]

    def pair(label: str, above: float, noise: float, together: float, test_rows: int) -> list:
        base, common, own = dicing.uniform(0.70, 0.74), swings(together), swings(noise)
        second = [base + swing for swing in common]
        first = [score + above + swing for score, swing in zip(second, own)]
        return [label, runs(first, shared) + sweep(0.2), sweep(0.95) + runs(second, shared), test_rows]

    clear = pair("that are far apart", dicing.uniform(0.12, 0.14), 0.005, 0.01, 10 * few)
    close = pair("that are close", dicing.uniform(0.004, 0.006), 0.02, 0.01, few)
    alike = pair("whose seeds swing together", dicing.uniform(0.02, 0.022), 0.004, 0.08, many)
    small = pair("whose seeds agree, on few test rows", dicing.uniform(0.02, 0.022), 0.004, 0.01, few)
    loose = pair("whose seeds disagree, on many test rows", dicing.uniform(0.02, 0.022), 0.09, 0.01, many)
    behind = pair("of which the second is better", -dicing.uniform(0.12, 0.14), 0.005, 0.01, 10 * few)
    between = pair("that are two and a half errors apart", dicing.uniform(0.05, 0.06), 1e-6, 0.01, few)
    shares = [mean(score for rate, _, _, score in between[side] if rate == 0.001) for side in (1, 2)]
    between[3] = round(sum(p * (1 - p) for p in shares) * (2.5 / (shares[0] - shares[1])) ** 2)
    more = pair("of which one has a seed more", dicing.uniform(0.05, 0.06), 0.004, 0.03, many)
    more[1].append([0.001, lonely[0], 0.3, 0.05])
    other = pair("that share all seeds but one", dicing.uniform(0.05, 0.06), 0.004, 0.03, many)
    for side, seed in zip((1, 2), lonely):
        last = next(run for run in other[side] if run[:2] == [0.001, shared[-1]])
        last[1], last[3] = seed, dicing.uniform(0.4, 0.9)
    diverged = [
        "of which one seed diverged, at the only rate that was tried",
        runs([0.8] * seeds, shared),
        runs([0.78] * (seeds - 1) + [0.3], shared),
        many,
    ]
    next(run for run in diverged[2] if run[3] == 0.3)[2] = math.nan
    one = ["that share one seed", runs([0.9], shared[:1]), runs([0.5], shared[:1]), many]
    none = ["that share no seed", runs([0.9] * 2, shared[:2]), runs([0.5] * 2, lonely), many]
    return {"pairs": [clear, close, alike, small, loose, behind, between, more, other, diverged, one, none]}


def drive_compare(compare, pairs):
    """Compare two methods at a time."""

    def build(method, run):
        rate, seed, loss, score = run
        settings = {"learning_rate": rate, "seed": seed, "steps": 20}
        losses = [2.0] * 10 + [loss] * 10
        return any_row(task="reviews", method=method, settings=settings, score_after=score, losses=losses)

    seen = {}
    for label, first, second, test_rows in pairs:
        rows = [build("lora", run) for run in first], [build("bitfit", run) for run in second]
        answer = compare(*rows, test_rows)
        if not isinstance(answer, dict):
            return {"what compare returns": type(answer).__name__}
        seen["what compare returns"] = "dict"
        seen["the list of names in the dict"] = sorted(str(name) for name in answer)
        for name, value in sorted(answer.items(), key=lambda entry: str(entry[0])):
            number = value is not None and name in ("difference", "error") and not isinstance(value, str)
            seen[f"`{name}` of methods {label}"] = float(value) if number else value
    return seen


def compare_tolerance(case: dict) -> dict[str, float]:
    """Allow the rounding of means and roots of numbers below 1 in fp64: a few times 1e-16, and of a root of one 1e-8."""
    return {f"`{name}` of methods {label}": 1e-9 for label, *_ in case["pairs"] for name in ("difference", "error")}


_SCORES = 'row.score_after for row in rows if row.settings["learning_rate"] == rate}'
_SEEDS = "[seed for seed in scores[0] if seed in scores[1]]"
_OF_SEEDS = "stdev(differences) / math.sqrt(len(seeds))"
_ERROR = "math.sqrt(of_seeds**2 + of_test_rows**2)"
_ROWS = "sum(p * (1 - p) / test_rows for p in shares)"
_BY_RATE = "rate = chosen_rate(rows)"

check_compare = Exercise(
    spec=[compare],
    cases=lambda generator: [compare_case(generator)],
    driver=drive_compare,
    helpers=[any_row],
    tolerance=compare_tolerance,
    mistakes={
        "runs at other learning rates count: only those at the chosen one do": {
            _SCORES: "row.score_after for row in rows}",
        },
        "the rate with the best test score is chosen: then the test split has been trained on, in a way": {
            _BY_RATE: 'rate = max(rows, key=lambda row: row.score_after).settings["learning_rate"]'
        },
        "the rate with the best single run is chosen: `chosen_rate` compares means of as many seeds": {
            _BY_RATE: 'rate = min(rows, key=lambda row: (row.losses[-1] != row.losses[-1], row.losses[-1])).settings["learning_rate"]'
        },
        "a seed that diverged is left out: its score counts like any other": {
            _SCORES: 'row.score_after for row in rows if row.settings["learning_rate"] == rate and row.losses[-1] == row.losses[-1]}'
        },
        "runs are paired in the order of the rows: pair those with the same seed": {
            "differences = [scores[0][seed] - scores[1][seed] for seed in seeds]": (
                "differences = [a - b for a, b in zip(scores[0].values(), scores[1].values())]"
            ),
        },
        "a seed that only one method has is in the mean: take the seeds that both have": {
            "difference = mean(differences)": "difference = mean(scores[0].values()) - mean(scores[1].values())"
        },
        "the two methods' errors are taken apart from each other: what a seed does to both cancels in the differences": {
            _OF_SEEDS: "math.hypot(*(stdev(of[seed] for seed in seeds) for of in scores)) / math.sqrt(len(seeds))"
        },
        "the spread of the differences is not divided by the root of their number: it is a mean whose error is asked for": {
            _OF_SEEDS: "stdev(differences)"
        },
        "the spread of the differences is divided by their number: divide by its root": {
            _OF_SEEDS: "stdev(differences) / len(seeds)"
        },
        "the standard deviation divides by n: with n - 1, as `stdev` does, few seeds are not taken for surer than they are": {
            _OF_SEEDS: "(sum((d - difference) ** 2 for d in differences) / len(seeds)) ** 0.5 / math.sqrt(len(seeds))"
        },
        "the error is the largest difference minus the smallest: take the standard error": {
            _OF_SEEDS: "max(differences) - min(differences)"
        },
        "the test rows are forgotten: where all seeds agree, other test rows could still say something else": {
            _ERROR: "of_seeds"
        },
        "the seeds are forgotten in the error: another seed gives another score": {_ERROR: "of_test_rows"},
        "the two errors are added: they are independent, so their squares add up": {_ERROR: "of_seeds + of_test_rows"},
        "the larger of the two errors is taken: their squares add up": {_ERROR: "max(of_seeds, of_test_rows)"},
        "only the first method's test rows count: the second score has such an error, too": {
            _ROWS: "shares[0] * (1 - shares[0]) / test_rows"
        },
        "the error of the test rows is taken as if each seed had test rows of its own: all seeds share them": {
            _ROWS: "sum(p * (1 - p) / test_rows / len(seeds) for p in shares)"
        },
        "one standard error is enough for a verdict: it takes two": {
            "difference > 2 * error": "difference > error",
            "difference < -2 * error": "difference < -error",
        },
        "three standard errors are asked for: two are enough": {
            "difference > 2 * error": "difference > 3 * error",
            "difference < -2 * error": "difference < -3 * error",
        },
        "the sign decides although the difference is within its error: then it cannot be told": {
            "difference > 2 * error": "difference > 0",
            "difference < -2 * error": "difference < 0",
        },
        "the second method is never found better: look at the sign of the difference": {
            "difference < -2 * error": "False",
        },
        "first and second have changed places: the difference is the first's score minus the second's": {
            "scores[0][seed] - scores[1][seed]": "scores[1][seed] - scores[0][seed]"
        },
        "the verdict names the wrong side: a positive difference is for the first": {
            'verdict = "first"': 'verdict = "second"',
            'verdict = "second"': 'verdict = "first"',
        },
        "a single seed gets a verdict: one difference has no spread": {
            '"difference": difference, "error": None, "verdict": "cannot tell"}': (
                '"difference": difference, "error": None, "verdict": "first" if difference > 0 else "second"}'
            )
        },
        "the error of a single seed is given as 0: it is not known, so None": {
            '"difference": difference, "error": None': '"difference": difference, "error": 0.0'
        },
        "the difference is in points of a hundred: return it as a share": {
            "difference = mean(differences)": "difference = 100 * mean(differences)"
        },
        "the median of the differences is returned: take the mean": {
            "difference = mean(differences)": "difference = sorted(differences)[len(differences) // 2]"
        },
        "the seeds of one method are counted: count those that both have": {'"seeds": len(seeds),': '"seeds": len(scores[0]),'},
    },
    variants={
        "sets of seeds, and variances": """
            def compare(first, second, test_rows):
                def at_chosen(rows):
                    rate = chosen_rate(rows)
                    return {r.settings["seed"]: r.score_after for r in rows if r.settings["learning_rate"] == rate}
                a, b = at_chosen(first), at_chosen(second)
                both = sorted(a.keys() & b.keys())
                found = {"seeds": len(both), "difference": None, "error": None, "verdict": "cannot tell"}
                if both:
                    found["difference"] = sum(a[s] - b[s] for s in both) / len(both)
                if len(both) > 1:
                    n, d = len(both), found["difference"]
                    variance = sum((a[s] - b[s] - d) ** 2 for s in both) / (n - 1) / n
                    for of in (a, b):
                        p = sum(of[s] for s in both) / n
                        variance += p * (1 - p) / test_rows
                    found["error"] = variance**0.5
                    if abs(d) > 2 * found["error"]:
                        found["verdict"] = "first" if d > 0 else "second"
                return found
        """,
        "with torch": """
            def compare(first, second, test_rows):
                chosen = [[row for row in rows if row.settings["learning_rate"] == chosen_rate(rows)] for rows in (first, second)]
                pairs = [(x.score_after, y.score_after) for x in chosen[0] for y in chosen[1]
                         if x.settings["seed"] == y.settings["seed"]]
                if not pairs:
                    return dict(seeds=0, difference=None, error=None, verdict="cannot tell")
                scores = torch.tensor(pairs, dtype=torch.float64)
                apart, p = scores[:, 0] - scores[:, 1], scores.mean(dim=0)
                if len(pairs) == 1:
                    return dict(seeds=1, difference=apart.mean(), error=None, verdict="cannot tell")
                error = (apart.var() / len(pairs) + (p * (1 - p)).sum() / test_rows).sqrt()
                size = apart.mean() / error
                verdict = "first" if size > 2 else "second" if size < -2 else "cannot tell"
                return dict(seeds=len(pairs), difference=apart.mean(), error=error, verdict=verdict)
        """,
        "hypot, and sorted rows": {
            _ERROR: "math.hypot(of_test_rows, of_seeds)",
            _SEEDS: "sorted(set(scores[0]) & set(scores[1]))",
        },
    },
)
