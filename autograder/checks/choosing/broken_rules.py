"""`broken_rules`: which of a job's rules a method breaks."""

import math

import torch

from autograder.checking.exercise import Exercise
from autograder.checks.choosing.cases import dice
from peftlab.jobs import ACCESS, Job, Option, Reason


def broken_rules(option: Option, job: Job) -> list[Reason]:
    """Return a reason for every rule that the option breaks, in the order of the rules."""
    broken = []
    if job.wish is not None and job.wish != option.method:
        broken.append(Reason("wish", option.method, job.wish))
    if ACCESS.index(option.access) > ACCESS.index(job.access):
        broken.append(Reason("access", option.access, job.access))
    if job.access == "weights":
        if option.peak_bytes > job.gpu_bytes:
            broken.append(Reason("training memory", option.peak_bytes, job.gpu_bytes))
        serving = option.base_bytes + job.tasks * option.task_bytes
        if serving > job.gpu_bytes:
            broken.append(Reason("serving memory", serving, job.gpu_bytes))
    added = 0.0 if option.mergeable and job.tasks == 1 else option.latency
    if added > job.latency:
        broken.append(Reason("latency", added, job.latency))
    if job.quality > 0 and (option.quality is None or option.quality - option.spread < job.quality):
        broken.append(Reason("quality", option.quality, job.quality))
    return broken


def rules_case(generator: torch.Generator, unit: int = 10**9) -> dict:
    """Return pairs of an option and a job around every border. Shares are sixty-fourths, so that sums of them are exact."""
    dicing = dice(generator)
    hair = 1 / 2**14  # no difference at all, for who rounds
    base, file, gpu = dicing.randrange(20, 30) * unit, dicing.randrange(1, 4) * unit, dicing.randrange(60, 90) * unit
    spread, target, added = (dicing.randrange(*ends) / 64 for ends in ((1, 4), (50, 60), (4, 12)))
    option = {
        "method": "lora",
        "access": "weights",
        "peak_bytes": base + 5 * unit,
        "base_bytes": base,
        "task_bytes": file,
        "quality": 63 / 64,
        "spread": spread,
        "latency": added,
        "mergeable": True,
    }
    job = {
        "gpu_bytes": gpu,
        "access": "weights",
        "tasks": 1,
        "quality": 0.0,
        "latency": math.inf,
        "prefer": "quality",
        "wish": None,
    }
    prompt = {"method": "prompt_tuning", "access": "embeddings", "mergeable": False, "task_bytes": unit // 1000}
    many = (gpu - base) // file
    pairs = {
        "where nothing is broken": ({}, {}),
        "where the training step just fits": ({"peak_bytes": gpu}, {}),
        "where the training step is one byte too large": ({"peak_bytes": gpu + 1}, {}),
        "where all the tasks just fit": ({"base_bytes": gpu - many * file}, {"tasks": many}),
        "where all the tasks are one byte too many": ({"base_bytes": gpu - many * file + 1}, {"tasks": many}),
        "where nothing is shared, and each task is a whole model": (
            {"method": "full", "base_bytes": 0, "task_bytes": base, "latency": 0.0},
            {"tasks": 4, "latency": 0.0},
        ),
        "where one task is merged": ({}, {"latency": 0.0}),
        "where two tasks cannot both be merged": ({}, {"latency": 0.0, "tasks": 2}),
        "where nothing can be merged": ({"mergeable": False}, {"latency": added / 2}),
        "where as much is added as is allowed": ({"mergeable": False}, {"latency": added}),
        "where a little more is added than is allowed": ({"mergeable": False}, {"latency": added - hair}),
        "where the target is just met, less the spread": ({"quality": target + spread}, {"quality": target}),
        "where the target is missed by little, less the spread": ({"quality": target + spread - hair}, {"quality": target}),
        "where the target is met but for the spread": ({"quality": target}, {"quality": target}),
        "where only the spread could reach the target": ({"quality": target - spread}, {"quality": target}),
        "where the target is far away": ({"quality": target - 2 * spread}, {"quality": target}),
        "where a quality without spread just meets the target": ({"quality": target, "spread": 0.0}, {"quality": target}),
        "where the quality is not known and something is demanded": ({"quality": None}, {"quality": target}),
        "where the quality is not known and nothing is demanded": ({"quality": None}, {}),
        "where LoRA is wished for": ({}, {"wish": "lora"}),
        "where another method is wished for": ({}, {"wish": "adapters"}),
        "where weights are out of reach": ({}, {"access": "embeddings"}),
        "where embeddings are enough": (prompt, {"access": "embeddings"}),
        "where embeddings are enough and weights within reach": (prompt, {"access": "weights"}),
        "where only text goes in": (prompt, {"access": "text"}),
        "where others run a model too large for one's own GPU": (prompt | {"peak_bytes": 3 * gpu}, {"access": "embeddings"}),
        "where others serve a model too large for one's own GPU": (prompt | {"base_bytes": 3 * gpu}, {"access": "embeddings"}),
        "where everything is broken": (
            {"peak_bytes": 2 * gpu, "base_bytes": gpu, "mergeable": False, "quality": target / 2},
            {"wish": "bitfit", "latency": added / 4, "quality": target},
        ),
        "where everything that an API can break is broken": (
            {"peak_bytes": 2 * gpu, "mergeable": False, "quality": target / 2},
            {"wish": "bitfit", "latency": added / 4, "quality": target, "access": "text"},
        ),
    }
    return {"pairs": [[label, option | changed, job | demanded] for label, (changed, demanded) in pairs.items()]}


def drive_rules(broken_rules, pairs):
    """Ask which rules each option breaks in each job."""
    from peftlab.jobs import Job, Option

    seen = {}
    for label, option, job in pairs:
        broken = broken_rules(Option(**option), Job(**job))
        if not isinstance(broken, list | tuple):
            return {"what broken_rules returns": type(broken).__name__}
        seen[f"the list of reasons {label}"] = [list(reason) for reason in broken]
    return seen


_ADDED = "0.0 if option.mergeable and job.tasks == 1 else option.latency"
_SERVING = "serving = option.base_bytes + job.tasks * option.task_bytes"

check_broken_rules = Exercise(
    spec=[broken_rules],
    cases=lambda generator: [rules_case(generator)],
    driver=drive_rules,
    mistakes={
        "a training step that just fits is refused: as many bytes as there are may be used": {
            "option.peak_bytes > job.gpu_bytes": "option.peak_bytes >= job.gpu_bytes"
        },
        "tasks that just fit are refused: as many bytes as there are may be used": {
            "serving > job.gpu_bytes": "serving >= job.gpu_bytes"
        },
        "each task is counted with a base of its own: the base is there once": {
            _SERVING: "serving = job.tasks * (option.base_bytes + option.task_bytes)"
        },
        "one task is served, whatever the job says": {_SERVING: "serving = option.base_bytes + option.task_bytes"},
        "serving is not looked at: twenty copies of a model do not fit where one trains": {_SERVING: "serving = 0"},
        "memory is demanded where others run the model: these rules hold only with access to the weights": {
            'if job.access == "weights":': "if True:"
        },
        "prompt tuning is refused where weights can be reached: whoever has the weights has the embeddings": {
            "ACCESS.index(option.access) > ACCESS.index(job.access)": "option.access != job.access"
        },
        "levels of access are compared as words, in the order of the alphabet: use their place in ACCESS": {
            "ACCESS.index(option.access) > ACCESS.index(job.access)": "option.access > job.access"
        },
        "several tasks are taken to be merged at once: one copy of the weights holds one of them": {
            _ADDED: "0.0 if option.mergeable else option.latency"
        },
        "what can be merged is charged for latency with one task, too": {_ADDED: "option.latency"},
        "a single task is taken to add nothing though it cannot be merged": {
            _ADDED: "0.0 if job.tasks == 1 else option.latency"
        },
        "as much latency as is allowed is refused": {"if added > job.latency:": "if added >= job.latency and added > 0:"},
        "the spread is not looked at: a demand has to be met less the spread": {
            "option.quality - option.spread < job.quality": "option.quality < job.quality"
        },
        "the spread counts for the method: a noisier one would meet a higher demand": {
            "option.quality - option.spread < job.quality": "option.quality + option.spread < job.quality"
        },
        "what meets the demand exactly is refused": {
            "option.quality - option.spread < job.quality": "option.quality - option.spread <= job.quality"
        },
        "a demand that is missed by little counts as met: compare without rounding": {
            "option.quality - option.spread < job.quality": "option.quality - option.spread < job.quality - 0.001"
        },
        "a latency that is a little too large is let through: compare without rounding": {
            "if added > job.latency:": "if added > job.latency + 0.001:"
        },
        "an unmeasured quality passes a demand: what has not been measured cannot be promised": {
            "if job.quality > 0 and (option.quality is None or option.quality - option.spread < job.quality):": (
                "if option.quality is not None and option.quality - option.spread < job.quality:"
            ),
        },
        "an unmeasured quality is refused though nothing is demanded": {
            "if job.quality > 0 and (": "if (job.quality >= 0) and ("
        },
        "only the first reason is returned: return all of them": {"return broken\n": "return broken[:1]\n"},
        "the reasons are in another order than the rules": {"return broken\n": "return broken[::-1]\n"},
        "no wish is taken for a wish": {"job.wish is not None and ": ""},
        "wishes are not looked at": {"job.wish is not None and ": "False and "},
        "figure and limit have changed places: first what the option has, then what the job allows": {
            "return broken\n": "return [Reason(rule, limit, figure) for rule, figure, limit in broken]\n"
        },
    },
    variants={
        "a table of rules": """
            def broken_rules(option, job):
                serving = option.base_bytes + option.task_bytes * job.tasks
                added = option.latency * (not (option.mergeable and job.tasks == 1))
                own = job.access == "weights"
                short = option.quality is None or option.quality - option.spread < job.quality
                table = [
                    (job.wish not in (None, option.method), "wish", option.method, job.wish),
                    (ACCESS.index(job.access) < ACCESS.index(option.access), "access", option.access, job.access),
                    (own and job.gpu_bytes < option.peak_bytes, "training memory", option.peak_bytes, job.gpu_bytes),
                    (own and job.gpu_bytes < serving, "serving memory", serving, job.gpu_bytes),
                    (job.latency < added, "latency", added, job.latency),
                    (bool(job.quality) and short, "quality", option.quality, job.quality),
                ]
                return [Reason(*rest) for is_broken, *rest in table if is_broken]
        """,
        "plain tuples": {"return broken\n": "return tuple(tuple(reason) for reason in broken)\n"},
        "with a generator": """
            def broken_rules(option, job):
                def rules():
                    if job.wish and option.method != job.wish:
                        yield Reason("wish", option.method, job.wish)
                    within = ACCESS[: ACCESS.index(job.access) + 1]
                    if option.access not in within:
                        yield Reason("access", option.access, job.access)
                    if within == ACCESS:
                        needed = {"training memory": option.peak_bytes,
                                  "serving memory": option.base_bytes + sum([option.task_bytes] * job.tasks)}
                        for rule, size in needed.items():
                            if not size <= job.gpu_bytes:
                                yield Reason(rule, size, job.gpu_bytes)
                    if not (option.mergeable and job.tasks == 1) and option.latency > job.latency:
                        yield Reason("latency", option.latency, job.latency)
                    if job.quality and (option.quality is None or option.quality < job.quality + option.spread):
                        yield Reason("quality", option.quality, job.quality)
                return list(rules())
        """,
    },
)
