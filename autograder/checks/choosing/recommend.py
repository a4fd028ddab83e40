"""`recommend`: the method for a job, and why."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from autograder.checking.exercise import Exercise
from autograder.checks.choosing.cases import dice
from peftlab.jobs import ACCESS, Job, Option, Reason, Recommendation, Refusal


def recommend(
    job: Job, options: Sequence[Option], broken_rules: Callable[[Option, Job], list[Reason]]
) -> Recommendation | Refusal:
    """Return the option to take, or why there is none and what comes nearest."""

    def choice(demands: Job) -> Option | None:
        fitting = [option for option in options if not broken_rules(option, demands)]
        if not fitting:
            return None
        if job.prefer == "file":
            return min(fitting, key=lambda option: option.task_bytes)
        if job.prefer == "quality":
            measured = [option for option in fitting if option.quality is not None]
            if measured:
                best = max(measured, key=lambda option: option.quality)
                fitting = [option for option in measured if best.quality - option.quality <= max(best.spread, option.spread)]
        return min(fitting, key=lambda option: option.peak_bytes)

    rejected = {}
    for option in options:
        reasons = broken_rules(option, job)
        if reasons:
            rejected[option.method] = reasons[0]
    chosen = choice(job)
    if chosen is not None:
        return Recommendation(chosen.method, rejected)
    relaxed, given_up = job, []
    for demand, nothing in (("wish", None), ("latency", math.inf), ("quality", 0.0)):
        if getattr(relaxed, demand) == nothing:
            continue
        relaxed = replace(relaxed, **{demand: nothing})
        given_up.append(demand)
        chosen = choice(relaxed)
        if chosen is not None:
            return Refusal(rejected, chosen.method, tuple(given_up))
    return Refusal(rejected, None, tuple(given_up))


def evidence_case(generator: torch.Generator, measured: bool = True, unit: int = 10**9) -> dict:
    """Return options in the proportions that LLaMA-7B has, in random order, and jobs of every kind.

    Args:
        measured: whether the quality of QLoRA and of prefix tuning is known.
        unit: bytes of a gigabyte of these.
    """
    dicing = dice(generator)

    def gigabytes(size: float) -> int:
        return round(size * unit * dicing.uniform(0.99, 1.01))

    base, small, tie = gigabytes(13.5), gigabytes(4.2), gigabytes(15.5)
    names = ("method", "access", "peak_bytes", "base_bytes", "task_bytes", "quality", "spread", "latency", "mergeable")
    rows = [
        ("full", "weights", gigabytes(54), 0, base, 1.0, 1 / 64, 0.0, True),
        ("layer_freezing", "weights", gigabytes(20), base, gigabytes(1.7), 60 / 64, 1 / 64, 0.0, True),
        ("lora", "weights", gigabytes(17), base, gigabytes(0.08), 63 / 64, 1 / 128, 0.15, True),
        ("qlora", "weights", gigabytes(7), small, gigabytes(0.08), 61 / 64 if measured else None, 1 / 64, 0.4, False),
        ("adapters", "weights", gigabytes(16.5), base, gigabytes(0.03), 62 / 64, 1 / 64, 0.2, False),
        ("prefix_tuning", "weights", tie, base, gigabytes(0.008), 57 / 64 if measured else None, 3 / 64, 0.05, False),
        ("prompt_tuning", ACCESS[1], gigabytes(15.8), base, unit // 8000, 54 / 64, 1 / 64, 0.06, False),
        ("bitfit", "weights", tie, base, gigabytes(0.003), 58 / 64, 1 / 64, 0.03, False),
    ]
    options = [dict(zip(names, row)) for row in rows]
    of = {option["method"]: option for option in options}
    full, qlora = of["full"], of["qlora"]
    jobs = {
        "where there is plenty of memory": {"gpu_bytes": 80 * unit},
        "where there is plenty of memory, and memory is to be saved": {"gpu_bytes": 80 * unit, "prefer": "memory"},
        "where there is plenty of memory, and files are to be small": {"gpu_bytes": 80 * unit, "prefer": "file"},
        "where two methods need the same memory": {"gpu_bytes": 24 * unit, "latency": 0.05, "prefer": "memory"},
        "where memory is limited": {"gpu_bytes": 12 * unit},
        "where one method just fits": {"gpu_bytes": qlora["peak_bytes"]},
        "where one byte is missing": {"gpu_bytes": qlora["peak_bytes"] - 1},
        "where all is demanded, and one byte is missing": {
            "gpu_bytes": qlora["peak_bytes"] - 1, "wish": "lora", "latency": 0.0, "quality": 1.0,
        },
        "where 20 tasks are served at once": {"gpu_bytes": 40 * unit, "tasks": 20, "quality": 62 / 64},
        "where 20 tasks are served at once, and nothing may be added": {"gpu_bytes": 80 * unit, "tasks": 20, "latency": 0.0},
        "where 1,000 tasks are served at once": {"gpu_bytes": 30 * unit, "tasks": 1000, "quality": 60 / 64},
        "where 100,000 tasks are served at once": {"gpu_bytes": 20 * unit, "tasks": 100_000, "prefer": "file"},
        "where a little may be added": {"gpu_bytes": 24 * unit, "latency": 0.04},
        "where nothing may be added, and one task is merged": {"gpu_bytes": 24 * unit, "latency": 0.0},
        "where embeddings go in and gradients come back": {"gpu_bytes": unit, "access": "embeddings"},
        "where QLoRA is wished for through an API": {"gpu_bytes": unit, "access": "embeddings", "wish": "qlora"},
        "where nothing may be added, through an API": {"gpu_bytes": unit, "access": "embeddings", "latency": 0.0},
        "where full quality is demanded, through an API": {"gpu_bytes": unit, "access": "embeddings", "quality": 1.0},
        "where only text goes in": {"gpu_bytes": 80 * unit, "access": "text"},
        "where only text goes in, and full fine-tuning is wished for": {"gpu_bytes": 80 * unit, "access": "text", "wish": "full"},
        "where full fine-tuning is wished for, and fits": {"gpu_bytes": full["peak_bytes"], "wish": "full"},
        "where full fine-tuning is wished for, on 24 GB": {"gpu_bytes": 24 * unit, "wish": "full"},
        "where full fine-tuning is wished for, on 4 GB": {"gpu_bytes": 4 * unit, "wish": "full"},
        "where adapters are wished for, and nothing may be added": {"gpu_bytes": 24 * unit, "wish": "adapters", "latency": 0.0},
        "where adapters, no latency and full quality are wished for, on 12 GB": {
            "gpu_bytes": 12 * unit, "wish": "adapters", "latency": 0.0, "quality": 1.0,
        },
        "where nearly full quality is demanded, on 12 GB": {"gpu_bytes": 12 * unit, "quality": 62 / 64},
        "where full quality and little latency are demanded, on 16.2 GB": {
            "gpu_bytes": round(16.25 * unit), "quality": 1.0, "latency": 0.04,
        },
        "where full quality and some latency are demanded, with 20 tasks": {
            "gpu_bytes": 24 * unit, "quality": 63 / 64, "latency": 0.1, "tasks": 20,
        },
    }  # fmt: skip
    asked = [[label, job] for label, job in jobs.items() if measured or "memory" in label or "demanded" in label]
    return {"options": dicing.sample(options, len(options)), "jobs": asked}


def drive_recommend(recommend, options, jobs):
    """Ask for every job; the rules are the driver's own. Then ask with rules that no notebook has, and for no options."""
    from peftlab.jobs import ACCESS, Job, Option, Reason

    def rules(option, job):
        broken, serving = [], option.base_bytes + job.tasks * option.task_bytes
        added = option.latency if job.tasks > 1 or not option.mergeable else 0.0
        if job.wish not in (None, option.method):
            broken.append(Reason("wish", option.method, job.wish))
        if ACCESS.index(option.access) > ACCESS.index(job.access):
            broken.append(Reason("access", option.access, job.access))
        if job.access == "weights" and option.peak_bytes > job.gpu_bytes:
            broken.append(Reason("training memory", option.peak_bytes, job.gpu_bytes))
        if job.access == "weights" and serving > job.gpu_bytes:
            broken.append(Reason("serving memory", serving, job.gpu_bytes))
        if added > job.latency:
            broken.append(Reason("latency", added, job.latency))
        if job.quality > 0 and (option.quality is None or option.quality - option.spread < job.quality):
            broken.append(Reason("quality", option.quality, job.quality))
        return broken

    def licences(option, job):
        late = Reason("access", option.access, job.access)
        return [Reason("licence", option.method, "free"), late] if option.method[0] in "qlf" else []

    built = [Option(**option) for option in options]
    given = list(built)
    asked = [(label, job, given, rules) for label, job in jobs]
    asked += [("with other rules", {"gpu_bytes": 0}, given, licences), ("without options", {"gpu_bytes": 0}, [], rules)]
    seen = {}
    for label, job, of, by in asked:
        answer = recommend(Job(**job), of, by)
        kind = type(answer).__name__
        seen[f"what is returned {label}"] = kind
        if kind not in ("Recommendation", "Refusal"):
            return seen
        if kind == "Recommendation":
            seen[f"the method {label}"] = answer.method
        else:
            seen[f"the nearest method {label}"] = answer.nearest
            seen[f"the demands given up {label}"] = list(answer.given_up)
        seen[f"why options are out {label}"] = {name: list(reason) for name, reason in sorted(answer.rejected.items())}
        seen["the options are in another order afterwards"] = [o.method for o in given] != [o.method for o in built]
    return seen


_AS_GOOD = "best.quality - option.quality <= max(best.spread, option.spread)"

check_recommend = Exercise(
    spec=[recommend],
    cases=lambda generator: [evidence_case(generator), evidence_case(generator, measured=False)],
    driver=drive_recommend,
    mistakes={
        "the highest score is taken although another is not clearly below it and has a smaller peak": {
            _AS_GOOD: "option is best",
        },
        "the spread of the best alone decides what is clearly below it: take the larger of the two spreads": {
            _AS_GOOD: "best.quality - option.quality <= best.spread"
        },
        "the preference is not looked at": {
            'if job.prefer == "file":': "if False:",
            'if job.prefer == "quality":': "if True:",
        },
        "who wants small files gets the smallest training step": {'if job.prefer == "file":': "if False:"},
        "who wants to save memory gets the best quality": {'if job.prefer == "quality":': 'if job.prefer != "file":'},
        "an option whose quality is not known beats measured ones: it comes after all that are measured": {
            "            if measured:\n": "            if measured and len(measured) == len(fitting):\n"
        },
        "an option whose quality is not known is never taken: where nothing is demanded, it may be": {
            "            if measured:\n": "            if not measured:\n                return None\n            if measured:\n"
        },
        "the last reason is given for what is out: give the first rule that an option breaks": {
            "rejected[option.method] = reasons[0]": "rejected[option.method] = reasons[-1]"
        },
        "reasons are missing: every option that breaks a rule is in `rejected`": {
            "return Recommendation(chosen.method, rejected)": (
                'return Recommendation(chosen.method, {n: r for n, r in rejected.items() if r.rule != "latency"})'
            )
        },
        "options that break no rule are in `rejected`": {
            "        if reasons:\n            rejected[option.method] = reasons[0]": (
                '        rejected[option.method] = reasons[0] if reasons else Reason("preference", 0.0, 0.0)'
            )
        },
        "of equals the last one given is taken: take the first": {
            "return min(fitting, key=lambda option: option.peak_bytes)": (
                "return min(reversed(fitting), key=lambda option: option.peak_bytes)"
            )
        },
        "a refusal does not name what would be possible with less demanded": {
            "return Refusal(rejected, chosen.method, tuple(given_up))": "return Refusal(rejected, None, tuple(given_up))",
        },
        "demands are given up in another order: first the wish, then latency, then quality": {
            '(("wish", None), ("latency", math.inf), ("quality", 0.0))': '(("quality", 0.0), ("latency", math.inf), ("wish", None))'
        },
        "each demand is given up alone and then taken back: they go one after the other, and stay away": {
            "relaxed = replace(relaxed, **{demand: nothing})": "relaxed = replace(job, **{demand: nothing})"
        },
        "all demands are given up at once: stop as soon as something is possible": {
            "        chosen = choice(relaxed)\n        if chosen is not None:\n": (
                "        chosen = None\n"
                '        if demand == [d for d in ("wish", "latency", "quality") if getattr(job, d) not in (None, math.inf, 0.0)][-1]:\n'
                "            chosen = choice(relaxed)\n        if chosen is not None:\n"
            )
        },
        "demands are given up that nobody had made": {
            "        if getattr(relaxed, demand) == nothing:\n            continue\n": ""
        },
        "the reasons are those of the relaxed job: say why an option is out of the job as it was asked": {
            "return Refusal(rejected, chosen.method, tuple(given_up))": (
                "return Refusal({o.method: broken_rules(o, relaxed)[0] for o in options if broken_rules(o, relaxed)}, "
                "chosen.method, tuple(given_up))"
            )
        },
        "where nothing is possible at all a method is named: then `nearest` is None": {
            "return Refusal(rejected, None, tuple(given_up))": (
                "return Refusal(rejected, min(options, key=lambda option: option.peak_bytes).method if options else None, tuple(given_up))"
            )
        },
        "where nothing is possible at all `given_up` is empty: it holds what was taken back in vain": {
            "return Refusal(rejected, None, tuple(given_up))": "return Refusal(rejected, None)"
        },
        "the rules are those of the notebook: ask the function that is given, everywhere": """
            def recommend(job, options, broken_rules):
                def of_notebook(option, job):
                    broken, serving = [], option.base_bytes + job.tasks * option.task_bytes
                    added = option.latency if job.tasks > 1 or not option.mergeable else 0.0
                    here, quality = job.access == "weights", option.quality
                    too_poor = quality is None or quality - option.spread < job.quality
                    checked = [
                        (job.wish not in (None, option.method), Reason("wish", option.method, job.wish)),
                        (ACCESS.index(option.access) > ACCESS.index(job.access), Reason("access", option.access, job.access)),
                        (here and option.peak_bytes > job.gpu_bytes, Reason("training memory", option.peak_bytes, job.gpu_bytes)),
                        (here and serving > job.gpu_bytes, Reason("serving memory", serving, job.gpu_bytes)),
                        (added > job.latency, Reason("latency", added, job.latency)),
                        (job.quality > 0 and too_poor, Reason("quality", quality, job.quality)),
                    ]
                    return [reason for broken, reason in checked if broken]

                rejected = {o.method: broken_rules(o, job)[0] for o in options if broken_rules(o, job)}
                demands, given_up = job, ()
                for step in ({}, {"wish": None}, {"latency": math.inf}, {"quality": 0.0}):
                    for name, nothing in step.items():
                        if getattr(job, name) != nothing:
                            demands, given_up = replace(demands, **step), (*given_up, name)
                    fitting = [o for o in options if not of_notebook(o, demands)]
                    known = [o for o in fitting if o.quality is not None]
                    if job.prefer == "quality" and known:
                        top = max(known, key=lambda o: o.quality)
                        fitting = [o for o in known if top.quality - o.quality <= max(top.spread, o.spread)]
                    if fitting:
                        best = min(fitting, key=lambda o: o.task_bytes if job.prefer == "file" else o.peak_bytes)
                        return Refusal(rejected, best.method, given_up) if given_up else Recommendation(best.method, rejected)
                return Refusal(rejected, None, given_up)
        """,
        "the options that were given are in another order afterwards: `sorted` makes a list of its own": {
            "    rejected = {}\n": "    options.sort(key=lambda option: option.peak_bytes)\n    rejected = {}\n"
        },
        "the reasons are put into an order of one's own: the first that the rules give counts": {
            "rejected[option.method] = reasons[0]": ("rejected[option.method] = min(reasons, key=lambda reason: reason.rule)")
        },
        "without any option there is an error: nothing is possible then, and `nearest` is None": {
            "    rejected = {}\n": '    if not options:\n        raise ValueError("no options")\n    rejected = {}\n'
        },
        "a refusal is returned where something is possible, or the other way round": {
            "return Recommendation(chosen.method, rejected)": "return Refusal(rejected, chosen.method)"
        },
    },
    variants={
        "with a sort": """
            def recommend(job, options, broken_rules):
                reasons = {option.method: broken_rules(option, job) for option in options}
                rejected = {method: broken[0] for method, broken in reasons.items() if broken}

                def best_of(found):
                    if job.prefer == "file":
                        return sorted(found, key=lambda o: o.task_bytes)[0]
                    known = [o for o in found if o.quality is not None]
                    if job.prefer == "quality" and known:
                        top = sorted(known, key=lambda o: -o.quality)[0]
                        found = [o for o in known if o.quality >= top.quality - max(o.spread, top.spread)]
                    return sorted(found, key=lambda o: o.peak_bytes)[0]

                demands, gone = job, ()
                steps = [{}, {"wish": None}, {"latency": math.inf}, {"quality": 0.0}]
                for step in steps:
                    for name, value in step.items():
                        if getattr(job, name) != value:
                            gone += (name,)
                    demands = replace(demands, **step)
                    found = [o for o in options if not broken_rules(o, demands)]
                    if found and not step:
                        return Recommendation(best_of(found).method, rejected)
                    if found:
                        return Refusal(rejected, best_of(found).method, gone)
                return Refusal(rejected=rejected, nearest=None, given_up=gone)
        """,
        "recursively": """
            def recommend(job, options, broken_rules):
                firsts = [(o, broken_rules(o, job)) for o in options]
                rejected = {o.method: broken[0] for o, broken in firsts if broken}
                fitting = [o for o, broken in firsts if not broken]
                if fitting:
                    if job.prefer == "quality":
                        measured = [o for o in fitting if o.quality is not None]
                        highest = max((o.quality for o in measured), default=0.0)
                        tops = [o for o in measured if o.quality == highest]
                        near = [o for o in measured if any(highest - o.quality <= max(o.spread, t.spread) for t in tops[:1])]
                        fitting = near or fitting
                    size = {"file": "task_bytes"}.get(job.prefer, "peak_bytes")
                    best = fitting[0]
                    for option in fitting[1:]:
                        if getattr(option, size) < getattr(best, size):
                            best = option
                    return Recommendation(best.method, rejected)
                for name, nothing in [("wish", None), ("latency", math.inf), ("quality", 0.0)]:
                    if getattr(job, name) != nothing:
                        again = recommend(replace(job, **{name: nothing}), options, broken_rules)
                        if isinstance(again, Recommendation):
                            return Refusal(rejected, again.method, (name,))
                        return Refusal(rejected, again.nearest, (name, *again.given_up))
                return Refusal(rejected, None)
        """,
        "lists, and the peak by sorting": {
            "return min(fitting, key=lambda option: option.peak_bytes)": "return sorted(fitting, key=lambda o: o.peak_bytes)[0]",
            "chosen.method, tuple(given_up))": "chosen.method, list(given_up))",
            "None, tuple(given_up))": "None, given_up)",
        },
    },
)
