"""`pareto_front`: the methods that no other beats."""

import math
from collections.abc import Mapping

import torch

from autograder.checking.exercise import Exercise
from autograder.checks.choosing.cases import dice


def pareto_front(points: Mapping[str, tuple[float, float, float]]) -> list[str]:
    """Return the names of the points that nothing on the front beats."""
    measured = [(name, *point) for name, point in points.items() if not (math.isnan(point[0]) or math.isnan(point[1]))]
    front = []
    for name, cost, score, noise in sorted(measured, key=lambda point: (point[1], -point[2])):
        beaten = False
        for _, other_cost, other_score, other_noise in front:
            clearly = max(noise, other_noise)
            if other_cost < cost and score - other_score <= clearly:
                beaten = True
            if other_cost == cost and other_score - score > clearly:
                beaten = True
        if not beaten:
            front.append((name, cost, score, noise))
    return [point[0] for point in front]


def pareto_case(generator: torch.Generator, scale: float = 1.0) -> dict:
    """Return points among which is every kind of tie and of noise; a name says what its point is there for."""
    dicing = dice(generator)
    unit, lift = scale * dicing.uniform(0.5, 2.0), dicing.uniform(-0.02, 0.02)
    points = {
        "cheapest": (1, 0.700, 0.010),
        "dearer and better": (3, 0.800, 0.018),
        "its twin": (3, 0.800, 0.018),
        "dearer, better by less than the noise": (4, 0.815, 0.010),
        "clearly better than all on the front": (5, 0.8195, 0.010),
        "dearer and worse": (6, 0.600, 0.010),
        "as dear, a little better": (7, 0.900, 0.010),
        "as dear, a little worse": (7, 0.895, 0.010),
        "as dear, clearly worse": (7, 0.850, 0.010),
        "better by less than its own noise": (8, 0.930, 0.050),
        "noisy, but clearly better": (9, 0.960, 0.045),
        "better by less than the other's noise": (10, 0.990, 0.010),
        "without a score": (0.5, math.nan, 0.010),
        "without a cost": (math.nan, 0.999, 0.010),
        "cheap and worse": (0.75, 0.400, 0.010),
    }
    order = dicing.sample(list(points), len(points))
    order.sort(key=lambda name: name != "as dear, clearly worse")  # first, so that the walk's order shows
    return {
        "names": order,
        "points": [[unit * points[name][0], points[name][1] + lift, points[name][2]] for name in order],
        "costs_only": [1.0, 2.0],
    }


def drive_pareto(pareto_front, names, points, costs_only):
    """Ask for the front of all points, of one, of none, and of what is not measured at all."""
    everything = {name: tuple(point) for name, point in zip(names, points)}
    asked = {
        "all points": everything,
        "points exactly a noise apart": {
            "a": (1.0, 0.5, 0.0625),
            "b, not clearly above a": (2.0, 0.5625, 0.0625),
            "c": (3.0, 0.875, 0.125),
            "d, not clearly below c": (3.0, 0.75, 0.125),
        },
        "points of which a noisier one costs the same as the last on the front": {
            "a": (1.0, 0.875, 0.125),
            "b, not clearly below a": (1.0, 0.8125, 0.015625),
            "c, clearly above b, not above a": (2.0, 0.9375, 0.015625),
        },
        "points of which a noisier one costs as much and is the last on the front": {
            "e": (1.0, 0.875, 0.015625),
            "f, not clearly below e": (1.0, 0.8125, 0.0625),
            "g, clearly below e, not below f": (1.0, 0.78125, 0.015625),
        },
        "a single point": {"lora": (3.0, 0.5, 0.1)},
        "no points": {},
        "points without scores": {name: (cost, float("nan"), 0.1) for name, cost in zip(names, costs_only)},
    }
    seen = {}
    for label, given in asked.items():
        front = pareto_front(dict(given))
        if not isinstance(front, list | tuple | set | dict):
            return {"what pareto_front returns": type(front).__name__}
        seen[f"the front of {label}"] = sorted(str(name) for name in front)
    numbered = pareto_front({3: (1.0, 0.5, 0.0), 2: (2.0, 0.25, 0.0), 1: (3.0, 0.75, 0.0)})
    texts = any(isinstance(name, str) for name in numbered)
    return seen | {"names that are numbers come back as text": texts, "the front of numbers": sorted(map(str, numbered))}


_CLEARLY = "clearly = max(noise, other_noise)"

check_pareto_front = Exercise(
    spec=[pareto_front],
    cases=lambda generator: [pareto_case(generator)],
    driver=drive_pareto,
    mistakes={
        "noise is not looked at: a difference that two seeds can make is none": {_CLEARLY: "clearly = 0.0"},
        "only the point's own noise is looked at: take the larger of the two": {_CLEARLY: "clearly = noise"},
        "only the other point's noise is looked at: take the larger of the two": {_CLEARLY: "clearly = other_noise"},
        "the two noises are added: take the larger": {_CLEARLY: "clearly = noise + other_noise"},
        "the smaller of the two noises is taken: take the larger": {_CLEARLY: "clearly = min(noise, other_noise)"},
        "what is off the front still beats others: compare with what is on the front": {
            "for _, other_cost, other_score, other_noise in front:": (
                "for other, other_cost, other_score, other_noise in measured:\n"
                "            if other == name or other_cost > cost: continue"
            ),
        },
        "points that cost the same throw each other out, though neither is clearly better": {
            "if other_cost < cost and": "if other_cost <= cost and"
        },
        "a point stays although another costs the same and is clearly better": {"if other_cost == cost and": "if False and"},
        "a point without a score or a cost is on the front: what is not measured proves nothing": {
            "        if not beaten:\n            front.append((name, cost, score, noise))\n    return [point[0] for point in front]": (
                "        if not beaten:\n            front.append((name, cost, score, noise))\n"
                "    return [point[0] for point in front] + [name for name, p in points.items() if math.isnan(p[0] + p[1])]"
            )
        },
        "low scores win: score is to be high, cost to be low": {
            "measured = [(name, *point)": "measured = [(name, point[0], -point[1], point[2])",
        },
        "high costs win: cost is to be low, score to be high": {
            "measured = [(name, *point)": "measured = [(name, -point[0], point[1], point[2])",
        },
        "only the highest score is returned: the front holds every point for which something would have to be given up": {
            "return [point[0] for point in front]": "return [max(front, key=lambda point: point[2])[0]] if front else []"
        },
        "the cheapest point is missing: nothing that costs less beats it": {
            "return [point[0] for point in front]": "return [point[0] for point in front[1:]] or [point[0] for point in front]"
        },
        "a point stays that costs more than one on the front and brings no more, because it is not clearly worse": {
            "and score - other_score <= clearly": "and score < other_score",
        },
        "the names come back as text: return them as they are, for they may be numbers": {
            "return [point[0] for point in front]": "return [str(point[0]) for point in front]"
        },
        "only the last point on the front is asked: any of them may beat another": {
            "for _, other_cost, other_score, other_noise in front:": "for _, other_cost, other_score, other_noise in front[-1:]:"
        },
        "of those that cost as much only the last on the front is asked: any of them may be clearly better": {
            "if other_cost == cost and": "if other_cost == cost and other_score == front[-1][2] and"
        },
    },
    variants={
        "keep what is clearly better": """
            def pareto_front(points):
                front = {}
                known = {n: p for n, p in points.items() if p[0] == p[0] and p[1] == p[1]}
                for name in sorted(known, key=lambda n: (known[n][0], -known[n][1])):
                    cost, score, noise = known[name]
                    def stays(other):
                        margin = max(noise, other[2])
                        return score > other[1] + margin if other[0] < cost else not other[1] > score + margin
                    if all(stays(other) for other in front.values()):
                        front[name] = known[name]
                return list(front)
        """,
        "cost by cost": """
            def pareto_front(points):
                front = []
                costs = sorted({cost for cost, score, _ in points.values() if not math.isnan(cost + score)})
                for price in costs:
                    group = [(s, n, name) for name, (c, s, n) in points.items() if c == price and not math.isnan(s)]
                    cheaper = list(front)
                    for score, noise, name in sorted(group, key=lambda g: -g[0]):
                        if any(score - points[f][1] <= max(noise, points[f][2]) for f in cheaper):
                            continue
                        if any(points[f][1] - score > max(noise, points[f][2]) for f in front if f not in cheaper):
                            continue
                        front.append(name)
                return front
        """,
        "as a set": {"return [point[0] for point in front]": "return {point[0] for point in front}"},
        "NaN by arithmetic": {
            "if not (math.isnan(point[0]) or math.isnan(point[1]))": "if point[0] + point[1] == point[0] + point[1]"
        },
    },
)
